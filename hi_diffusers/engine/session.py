"""The one opening of a model: its drawings are fitted to a device, its files found and loaded, its prompts encoded."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from typing import Any

import torch

from cache_functions import CacheConfig, CalibrationShelf
from hi_diffusers.engine.loading import check_placement, check_weights, load_files
from hi_diffusers.families.family import Model
from hi_diffusers.families.table import find_family
from hi_diffusers.memory.fitting import describe, explained, fit, kept_as
from hi_diffusers.memory.plan import STRATEGIES, Demand
from hi_diffusers.preset import ModelPreset
from hi_diffusers.request.drawing import Drawing, decide
from hi_diffusers.request.options import SamplingOptions
from hi_diffusers.request.placement import Placement, resolve_device
from hi_diffusers.weights.source import ModelFiles, ModelSource, Parts


class Session:
    """A model that was asked for. Nothing is read before `files` or `model` is first asked for.

    Args:
        preset, source: the model, and where its files are.
        placement: on which device it is to be kept, and how it computes; `fit` settles what it leaves open.
        calibrations: of the model, see `find_calibrations`; None: nowhere.
        vram: GiB of the card that may be used; None is what is free.
        parts: what of the files is needed, as in `load_pipeline`.
    """

    def __init__(
        self,
        preset: ModelPreset,
        source: ModelSource,
        placement: Placement,
        calibrations: CalibrationShelf | None = None,
        vram: float | None = None,
        parts: Parts = "all",
    ):
        self.preset, self.source, self.placement = preset, source, placement
        self.calibrations, self.vram, self.parts = calibrations, vram, parts
        self.frees_encoders = False
        self._encoders: Model | None = None

    def decide(self, options: SamplingOptions, cache: CacheConfig | None = None) -> Drawing:
        """See `hi_diffusers.request.drawing.decide`."""
        return decide(self.preset, options, cache, self.calibrations)

    @property
    def device(self) -> torch.device:
        """What draws; a device that is named is taken at its word until `check`."""
        name = self.placement.device
        return resolve_device(name) if name == "auto" else torch.device(name)

    def check(self) -> list[str]:
        """Refuse what this machine does not have or the weights do not go with.

        Returns:
            Sentences about what has no effect or is slow.

        Raises:
            ValueError: naming the setting.
        """
        check_weights(self.preset, self.source, self.placement)
        return check_placement(self.placement)

    def demand(self, drawing: Drawing, device: torch.device | None = None, **more: Any) -> Demand:
        """What a drawing asks of a device, usually the session's own; `more` as in `describe`."""
        return describe(drawing, self.source, self.placement, device or self.device, **more)

    def fit(self, demand: Demand) -> list[str]:
        """Settle how the model is kept while this is drawn.

        Returns:
            Sentences about what was chosen.

        Raises:
            ValueError: if it does not fit, with what would.
        """
        memory, notices = fit(demand, self.device, self.vram)
        self.placement = kept_as(self.placement, memory)
        self.frees_encoders = STRATEGIES[memory.strategy or "resident"].frees_encoders
        return notices

    def explained(self, demand: Demand) -> AbstractContextManager[None]:
        """Running out of memory inside raises a RuntimeError that says what would help."""
        return explained(demand, self.device, self.vram)

    @cached_property
    def files(self) -> ModelFiles:
        """The model's files, downloaded as far as they are absent; raises ValueError if they are not to be had."""
        return find_family(self.preset).locate(self.preset, self.source, self.parts)

    @property
    def in_halves(self) -> bool:
        """Whether prompts are encoded by another model than the one that draws."""
        return self.frees_encoders or self.placement.encoder_device is not None

    @cached_property
    def model(self) -> Model:
        """What draws."""
        return self.load("drawing" if self.in_halves else "all")

    def load(self, parts: Parts) -> Model:
        """Load these parts; as in `load_pipeline`."""
        return load_files(self.preset, self.source, self.files, self.placement, self.calibrations, parts)

    def encode(self, drawings: Sequence[Drawing]) -> tuple[list[str], Any]:
        """Read a batch's prompts, and encode them where another model than the one that draws does that.

        Returns:
            What of the first prompt the model does not get to see, and the embeddings on the drawing device; None
            where the drawing encodes itself.
        """
        from hi_diffusers.engine.generation import encode_prompts, prompt_notices

        options = [one.options for one in drawings]
        if not self.in_halves:
            return prompt_notices(self.model, options[0]), None
        encoders = self._encoders or self.load("encoders")
        notices, embeds = prompt_notices(encoders, options[0]), encode_prompts(encoders, options)
        if not self.frees_encoders:
            self._encoders = encoders
        return notices, embeds.to(self.device)
