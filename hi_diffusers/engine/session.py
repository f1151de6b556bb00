"""A session with one model: fits drawings to a device, finds and loads the files, encodes prompts."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import torch

from cache_functions import CacheConfig, CalibrationShelf
from hi_diffusers.denoising.ranks import Ranks, Split
from hi_diffusers.engine.loading import check_placement, check_weights, load_files
from hi_diffusers.engine.orders import Load
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
    """A requested model. Nothing is read before `files` or `model` is first used.

    Args:
        preset, source: the model, and where its files are.
        placement: device of the model, and how it computes; `fit` chooses the offloading.
        calibrations: where the model's calibrations are, see `find_calibrations`; None: nowhere.
        vram: GiB of the GPU's memory that may be used; None is what is free.
        parts: parts of the model that are needed, as in `load_pipeline`.
        separate_encoders: load the text encoders apart, so that `drop_encoders` can free them.
        split: how a picture is split over processes, see `share_with`.
    """

    def __init__(
        self,
        preset: ModelPreset,
        source: ModelSource,
        placement: Placement,
        calibrations: CalibrationShelf | None = None,
        vram: float | None = None,
        parts: Parts = "all",
        separate_encoders: bool = False,
        split: Split | None = None,
    ):
        self.preset, self.source, self.placement = preset, source, placement
        self.calibrations, self.vram, self.parts = calibrations, vram, parts
        self.separate_encoders, self.frees_encoders = separate_encoders, False
        self.split = split or Split()
        self.ranks: Ranks | None = None
        self._encoders: Model | None = None

    def decide(self, options: SamplingOptions, cache: CacheConfig | None = None) -> Drawing:
        """See `hi_diffusers.request.drawing.decide`."""
        return decide(self.preset, options, cache, self.calibrations)

    @property
    def device(self) -> torch.device:
        """The device that draws; whether a named device exists is tested by `check`."""
        name = self.placement.device
        return resolve_device(name) if name == "auto" else torch.device(name)

    def check(self) -> list[str]:
        """Check that this machine and the weights allow the placement.

        Returns:
            Sentences about settings that have no effect or are slow.

        Raises:
            ValueError: naming the setting.
        """
        check_weights(self.preset, self.source, self.placement)
        return check_placement(self.placement)

    def demand(self, drawing: Drawing, device: torch.device | None = None, **more: Any) -> Demand:
        """The memory demand of a drawing, by default on the session's device; `more` as in `describe`.

        Raises:
            ValueError: if the drawing cannot be split over the processes.
        """
        demand = describe(drawing, self.source, self.placement, device or self.device, **more, split=self.split)
        demand.check_split()
        return demand

    def fit(self, demand: Demand) -> list[str]:
        """Choose how the model is kept in memory for this demand.

        Returns:
            Sentences about the choice.

        Raises:
            ValueError: if it does not fit, naming settings with which it would.
        """
        memory, notices = fit(demand, self.device, self.vram)
        self.placement = kept_as(self.placement, memory)
        self.frees_encoders = STRATEGIES[memory.strategy or "resident"].frees_encoders
        return notices

    def explained(self, demand: Demand) -> AbstractContextManager[None]:
        """A context in which running out of memory raises a RuntimeError that says what would help."""
        return explained(demand, self.device, self.vram)

    def share_with(self, ranks: Ranks, device: str) -> None:
        """Draw together with other processes, before anything is loaded.

        Args:
            ranks: the processes, of which this is the first; the others `follow` it.
            device: this one's device.
        """
        self.ranks, self.split, self.separate_encoders = ranks, ranks.split, True
        self.placement = replace(self.placement, device=device)

    @cached_property
    def files(self) -> ModelFiles:
        """The model's files; missing ones are downloaded. Raises ValueError if they are not available."""
        return find_family(self.preset).locate(self.preset, self.source, self.parts)

    @property
    def in_halves(self) -> bool:
        """Whether the text encoders are loaded separately from the parts that draw."""
        return self.separate_encoders or self.frees_encoders or self.placement.encoder_device is not None

    @cached_property
    def model(self) -> Model:
        """The model that draws; loaded when it is first used."""
        return self.load("drawing" if self.in_halves else "all")

    def load(self, parts: Parts) -> Model:
        """Load these parts of the model, as in `load_pipeline`; what draws is loaded by all ranks."""
        load = partial(load_files, self.preset, self.source, self.files, self.placement, self.calibrations, parts)
        ranks = self.ranks
        if ranks is None or parts == "encoders":
            return load()
        ranks.share(Load(self.preset, self.source, self.placement, torch.get_num_threads()))

        def load_for_ranks() -> Model:
            model = load()
            model.draw_with(ranks)
            return model

        return ranks.together(load_for_ranks)

    def encode(self, drawings: Sequence[Drawing]) -> tuple[list[str], Any]:
        """Check a batch's prompts, and encode them if the text encoders are loaded separately.

        Returns:
            Sentences about words of the first prompt that are cut off or unknown, and the embeddings on the drawing
            device; None if the drawing encodes the prompts itself.
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

    def drop_encoders(self) -> None:
        """Free the text encoders, if they are loaded separately; `encode` loads them again."""
        self._encoders = None
