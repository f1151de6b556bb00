"""Decides for each request how the model is kept in memory."""

from contextlib import AbstractContextManager
from functools import lru_cache

import torch

from hi_diffusers.denoising.ranks import Ranks
from hi_diffusers.engine.session import Session
from hi_diffusers.families.family import Shapes
from hi_diffusers.families.table import find_family
from hi_diffusers.memory.plan import Demand
from hi_diffusers.memory.sizes import anchor_bytes
from hi_diffusers.preset import ModelPreset
from hi_diffusers.request.placement import Placement, resolve_device, resolve_dtype
from hi_diffusers.service.offered import OfferedModel
from hi_diffusers.service.requests import Request
from hi_diffusers.weights.source import GIB, ModelSource


class Loader:
    """Opens models in the way that a request needs.

    Args:
        placement: the placement from the flags.
        vram: GiB of the GPU's memory that may be used; None is what is free now.
        separate_encoders: as in `Session`.
        batch_size: pictures that are drawn together, at most; memory is planned for so many.
        ranks: the processes that draw together, of which this is the first; None: this one alone.
    """

    def __init__(
        self,
        placement: Placement,
        vram: float | None,
        separate_encoders: bool = False,
        batch_size: int = 1,
        ranks: Ranks | None = None,
    ):
        self.device, self.ranks = resolve_device(placement.device), ranks
        self._placement, self._separate_encoders, self._batch_size = placement, separate_encoders, batch_size
        if self.device.type == "cuda":
            vram = vram or torch.cuda.mem_get_info(self.device)[0] / GIB
        self._vram = vram
        self._placements: dict[tuple[object, ...], tuple[Placement, list[str]]] = {}

    def placement(self, request: Request) -> Placement:
        """The placement with which a request fits the device's memory.

        Raises:
            ValueError: if it does not fit, naming settings with which it would.
        """
        return self._fitted(request)[0]

    def open(self, request: Request) -> tuple[Session, list[str]]:
        """The session of a request's model, not loaded yet, and sentences about how the model is kept."""
        session, (placement, notices) = self._session(request.model), self._fitted(request)
        session.placement = placement
        return session, notices

    def explained(self, request: Request) -> AbstractContextManager[None]:
        """A context in which running out of memory raises a RuntimeError that says what would help."""
        session = self._session(request.model)
        return session.explained(self._demand(session, request))

    def cache_bytes(self, request: Request) -> int:
        """Bytes that the cache keeps per picture of the request."""
        dtype = resolve_dtype(self._placement.dtype, self.device)
        return anchor_bytes(_shapes(request.model.preset), request.options, request.cache, 1, dtype)

    def _session(self, model: OfferedModel) -> Session:
        session = Session(
            model.preset,
            model.source,
            self._placement,
            model.calibrations,
            self._vram,
            separate_encoders=self._separate_encoders,
        )
        if self.ranks is not None:
            session.share_with(self.ranks, str(self.device))
        return session

    def _demand(self, session: Session, request: Request) -> Demand:
        return session.demand(request.drawings[0], keeps_encoders=True, batch_size=self._batch_size)

    def _fitted(self, request: Request) -> tuple[Placement, list[str]]:
        cache, options = request.cache, request.options
        kept = (cache.target, cache.max_order, options.width, options.height, options.guided, options.image is None)
        key = (request.model.preset.name, request.model.source, options.max_sequence_length, *kept)
        if key not in self._placements:
            session = self._session(request.model)
            notices = session.fit(self._demand(session, request))
            self._placements[key] = (session.placement, notices)
        return self._placements[key]


@lru_cache(maxsize=8)
def _shapes(preset: ModelPreset) -> Shapes:
    return find_family(preset).shapes(preset, ModelSource())
