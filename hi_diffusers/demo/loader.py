"""How a page's models are kept in memory, request by request."""

from contextlib import AbstractContextManager
from functools import lru_cache
from pathlib import Path

import torch

from hi_diffusers.demo.requests import Request
from hi_diffusers.loading import resolve_device, resolve_dtype
from hi_diffusers.memory.architecture import Architecture
from hi_diffusers.memory.fitting import describe, explained, fit
from hi_diffusers.memory.plan import GIB, Drawing, MemoryPlan
from hi_diffusers.memory.sizes import anchor_bytes
from hi_diffusers.placement import Placement
from hi_diffusers.presets import ModelPreset
from hi_diffusers.session import Session


class Loader:
    """Loads models as their requests need them.

    Args:
        placement: as the flags have it.
        vram: GiB of the card that may be used; None is what is free now.
        calibration_dir: where calibrations are looked up before the models' own.
    """

    def __init__(self, placement: Placement, vram: float | None, calibration_dir: Path | None):
        self.device = resolve_device(placement.device)
        self._placement, self._calibration_dir = placement, calibration_dir
        if self.device.type == "cuda":
            vram = vram or torch.cuda.mem_get_info(self.device)[0] / GIB
        self._vram = vram
        self._plans: dict[tuple[object, ...], MemoryPlan] = {}

    def memory(self, request: Request) -> MemoryPlan:
        """How a request is kept on the device.

        Raises:
            ValueError: if it does not fit, with what would.
        """
        cache, options = request.cache, request.resolved
        kept = (cache.target, cache.max_order, options.width, options.height, options.guided)
        key = (request.model.preset.name, options.max_sequence_length, *kept)
        if key not in self._plans:
            self._plans[key] = fit(self._drawing(request), self.device, self._vram)
        return self._plans[key]

    def open(self, request: Request, memory: MemoryPlan) -> Session:
        """Load a request's model."""
        model = request.model
        return Session(model.preset, model.source, self._placement, memory, self._calibration_dir)

    def explained(self, request: Request) -> AbstractContextManager[None]:
        """Running out of memory inside raises a RuntimeError that says what would help."""
        return explained(self._drawing(request), self.device, self._vram)

    def cache_bytes(self, request: Request) -> int:
        """What the cache keeps of one picture of the request."""
        architecture, dtype = _architecture(request.model.preset), resolve_dtype(self._placement.dtype, self.device)
        return anchor_bytes(architecture, request.resolved, request.cache, 1, dtype)

    def _drawing(self, request: Request) -> Drawing:
        of_model = (request.model.preset, request.resolved, request.cache, request.model.source)
        return describe(*of_model, self._placement, self.device, keeps_encoders=True)


@lru_cache(maxsize=8)
def _architecture(preset: ModelPreset) -> Architecture:
    return Architecture.of(preset)
