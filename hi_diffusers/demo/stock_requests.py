"""Checks visitors' requests to a pipeline of diffusers. Every value comes from the network: none is trusted."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cache_functions import CacheConfig
from cache_functions.named import cache_with
from hi_diffusers.service.requests import Limits, whole
from hi_diffusers.stock.request import StockOptions, StockRequest, decide
from hi_diffusers.stock.source import StockSource

MAX_PIXELS = 2048 * 2048
MAX_FRAMES = 257
WHOLE = ("seed", "width", "height", "num_steps", "num_frames", "fps")
NUMBERS = ("guidance", "true_cfg", "guidance_2", "strength")
TEXTS = ("prompt", "negative_prompt")
OF_THE_PAGE = ("seed", "full_steps", "cache")
PICTURES = ("image", "mask_image")
FIELDS = (*TEXTS, *PICTURES, *WHOLE, *NUMBERS, *OF_THE_PAGE[1:])


@dataclass(frozen=True)
class StockOffer:
    """The pipeline of a page.

    Attributes:
        source: where it is.
        calibration_dir: folder that is searched for calibrations first.
        limits: limits of one request.
    """

    source: StockSource
    calibration_dir: Path | None
    limits: Limits

    def fields(self) -> list[str]:
        """The fields that its form has."""
        pipeline = self.source.pipeline_class
        taken = [name for name in FIELDS if name in OF_THE_PAGE or pipeline.takes(_option_of(name))]
        return [name for name in taken if name != "strength" or pipeline.traits.needs_image]

    def default(self, name: str) -> Any:
        """The value that a field begins with."""
        return None if name in PICTURES else self.source.default(name)

    def check(self, values: Mapping[str, Any]) -> StockRequest:
        """Turn the values of the form or of an API call into a request.

        Raises:
            ValueError: naming the field, its value and what is allowed.
        """
        given = {
            name: value for name, value in values.items() if value is not None and (value != "" or name == "prompt")
        }
        for name in (*WHOLE, *NUMBERS):
            if given.get(name) == 0 and name != "seed" and self.default(name) is None:
                del given[name]  # an empty field
        unknown = sorted(set(given) - set(self.fields()))
        if unknown:
            raise ValueError(f"{unknown[0][:60]} is not a setting of {self.source.pipeline_class.class_name}")
        for name in TEXTS:
            text = given.get(name, "")
            if not isinstance(text, str) or len(text) > self.limits.prompt_chars:
                raise ValueError(f"{name} must be text of at most {self.limits.prompt_chars} characters")
        for name in (*WHOLE, "full_steps"):
            if name in given:
                given[name] = whole(name, given[name], 0, 2**63 - 1)
        if given.get("num_frames", 0) > MAX_FRAMES:
            raise ValueError(f"num_frames must be at most {MAX_FRAMES} here, got {given['num_frames']}")
        sides = [given.get(name) or self.default(name) or MAX_PIXELS**0.5 / 2 for name in ("width", "height")]
        if sides[0] * sides[1] > MAX_PIXELS:
            raise ValueError(f"width and height must make at most {MAX_PIXELS} pixels here")
        steps = given.setdefault("num_steps", self.default("num_steps"))
        whole("num_steps", steps, 1, self.limits.num_steps)
        image, mask, budget = given.pop("image", None), given.pop("mask_image", None), given.pop("full_steps", 0)
        name = given.pop("cache", "on")
        if name not in ("on", "off"):
            raise ValueError(f"cache must be on or off, got {str(name)[:60]!r}")
        cache = CacheConfig.off() if name == "off" else cache_with("best", CacheConfig.best(), _budget(budget))
        files = {"images": (Path(image),) if image is not None else (), "mask_image": mask and Path(mask)}
        return decide(self.source, StockOptions(**({"prompt": ""} | given | files)), cache, self.calibration_dir)


def _option_of(field: str) -> str:
    """The option that a field sets."""
    return "images" if field == "image" else field


def _budget(full_steps: int) -> dict[str, int]:
    return {"full_steps": full_steps} if full_steps else {}
