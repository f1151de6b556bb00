"""The settings that determine a run's pictures, as workers receive them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cache_functions import CacheConfig
from hi_diffusers.engine.embeds import EmbedsCache
from hi_diffusers.engine.session import Session
from hi_diffusers.families.table import find_family
from hi_diffusers.pictures.safety import SafetySettings
from hi_diffusers.preset import ModelPreset
from hi_diffusers.request.options import SamplingOptions
from hi_diffusers.request.placement import Placement
from hi_diffusers.runs.decisions import Decisions
from hi_diffusers.weights.identity import find_calibrations
from hi_diffusers.weights.source import ModelSource, Parts


@dataclass(frozen=True)
class Job:
    """The settings that a worker needs; can be pickled.

    Attributes:
        preset: the model.
        source: where its files are.
        placement: its devices and how it computes; device and dtype are decided, not "auto".
        calibration_dir: where calibrations are looked up before the model's own.
        base: options of every picture but prompt and seed.
        cache: the requested cache configuration.
        folder: folder of the prompt file, in which the lines' pictures lie.
        of_pictures: options of the lines that start from a picture, unless they say otherwise.
        max_sequence_length: tokens that prompts are padded or cut to, the same for all pictures.
        suffix: suffix of the pictures' files, such as ".png".
        add_metadata: whether pictures carry their prompt and all settings.
        threads: number of CPU threads, which the bits of a picture depend on.
        embeds: folder of the prompt embeddings.
        embeds_limit: bytes that this folder may hold; None is no limit.
        encodes: whether missing embeddings are made.
        safety: settings of the safety filter; None is no filter.
        frees_encoders: whether all prompts are encoded before the transformer is loaded, to save memory.
    """

    preset: ModelPreset
    source: ModelSource
    placement: Placement
    calibration_dir: Path | None
    base: SamplingOptions
    cache: CacheConfig
    folder: Path
    of_pictures: dict[str, Any]
    max_sequence_length: int
    suffix: str
    add_metadata: bool
    threads: int
    embeds: Path
    embeds_limit: float | None
    encodes: bool
    safety: SafetySettings | None
    frees_encoders: bool = False

    def open(self) -> tuple[Session, Decisions]:
        """Make the session and the decisions anew, as a worker on another host must."""
        shelf = find_calibrations(self.preset, self.source, self.calibration_dir)
        session = Session(self.preset, self.source, self.placement, shelf, parts=self.parts)
        return session, Decisions(self.preset, self.base, self.cache, shelf, self.folder, self.of_pictures)

    @property
    def device(self) -> str:
        """The device that draws."""
        return self.placement.device

    @property
    def parts(self) -> Parts:
        """The parts of the model that are needed, as in `load_pipeline`."""
        return "all" if self.encodes else "drawing"

    def embeds_cache(self) -> EmbedsCache:
        """The cache over the folder of the prompt embeddings."""
        return EmbedsCache(self.embeds, find_family(self.preset).embeds, self.max_sequence_length, self.embeds_limit)
