"""Checks what the page's fields say, one request at a time."""

import threading
from collections.abc import Mapping
from typing import Any

from hi_diffusers.demo.controls import FREE_SIZE
from hi_diffusers.demo.starts import LOST, mask_of, refreshed
from hi_diffusers.service.offered import LoraFolder, OfferedModel
from hi_diffusers.service.requests import OF_START, Limits, Request, check, find_model

DRAW_PATIENCE = 60.0  # seconds that a drawing waits for others' schedules to be computed


class Desk:
    """Checks requests one at a time, since a schedule that is not calibrated takes a second and 100 MB.

    Args:
        models: the offered models, by name.
        limits: limits of one request.
        loras: the LoRAs that may be added.
    """

    def __init__(self, models: Mapping[str, OfferedModel], limits: Limits, loras: LoraFolder | None = None):
        self.models, self.limits, self.loras = dict(models), limits, loras or LoraFolder()
        self._deciding = threading.Lock()

    def check(self, values: Mapping[str, Any], patience: float = DRAW_PATIENCE) -> Request:
        """Check a request.

        Args:
            values: as in `requests.check`, and "lora" and "lora_scale" as in `LoraFolder.added`.
            patience: seconds that it waits for its turn.

        Raises:
            ValueError: if the request cannot be drawn, or its turn does not come.
        """
        if not self._deciding.acquire(timeout=patience):
            raise ValueError("the server is busy with other requests: try again in a moment")
        try:
            given = dict(values)
            lora, scale, name = given.pop("lora", None), given.pop("lora_scale", None), given.get("model")
            models = self.models
            if lora:
                plain = find_model(name, models)
                models = models | {plain.preset.name: self.loras.added(plain, lora, scale)}
            return check(given, self.limits, models)
        finally:
            self._deciding.release()

    def of_fields(self, values: dict[str, Any], patience: float = DRAW_PATIENCE) -> Request:
        """The request that the page's fields describe.

        Args:
            values: values of FIELDS, and "paint", the opacity of what is painted over the picture to start from.
            patience: as in `check`.

        Raises:
            ValueError: as in `check`.
        """
        image, paint, size = (values.pop(name, None) for name in ("image", "paint", "size"))
        if image == LOST:
            raise ValueError("the picture to start from is not there (yet): wait a moment, or choose it again")
        if image is None:
            values = {name: value for name, value in values.items() if name not in OF_START}
        else:
            values |= {"image": refreshed(image), "mask_image": mask_of(paint, image)}
        if size != FREE_SIZE:
            width, _, height = str(size).partition("x")
            values |= {"width": width, "height": height}
        return self.check(values, patience)
