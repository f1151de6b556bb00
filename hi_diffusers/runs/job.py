"""What makes a run's pictures, told to whoever draws them."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from cache_functions import CacheConfig
from hi_diffusers.model_files import ModelSource
from hi_diffusers.options import ResolvedOptions, SamplingOptions
from hi_diffusers.placement import Placement
from hi_diffusers.presets import find_preset
from hi_diffusers.runs.units import Task
from hi_diffusers.safety import SafetySettings

if TYPE_CHECKING:
    from hi_diffusers import HiDreamImagePipeline


@dataclass(frozen=True)
class Job:
    """What a worker needs to know; can be pickled.

    Attributes:
        model_type, calibration_dir: as `load_pipeline` takes them.
        source: where the model's files are.
        placement: on which devices it is, and how it computes; device and dtype are not open.
        base: options of every picture but prompt and seed.
        cache: how to cache.
        suffix: of the pictures' files, such as ".png".
        add_metadata: pictures carry their prompt and all settings.
        threads: of the CPU, which the bits of a picture depend on.
        embeds: folder of the prompt embeddings.
        embeds_cache_gb: that it may hold; None is no limit.
        encodes: whether missing embeddings are made.
        safety: what is withheld; None is nothing.
        frees_encoders: all prompts are encoded before the transformer is loaded, for want of memory for both.
    """

    model_type: str
    source: ModelSource
    placement: Placement
    calibration_dir: Path | None
    base: SamplingOptions
    cache: CacheConfig
    suffix: str
    add_metadata: bool
    threads: int
    embeds: Path
    embeds_cache_gb: float | None
    encodes: bool
    safety: SafetySettings | None
    frees_encoders: bool = False

    def options(self, task: Task) -> ResolvedOptions:
        """Of one picture."""
        given = {**task.line.overrides, "prompt": task.line.prompt, "seed": task.seed}
        return replace(self.base, **given).resolve(find_preset(self.model_type))

    @property
    def max_sequence_length(self) -> int:
        """Tokens that prompts are padded or cut to, the same for all pictures."""
        return self.base.resolve(find_preset(self.model_type)).max_sequence_length

    def load(self, parts: str) -> "HiDreamImagePipeline":
        """The model; parts as in `load_pipeline`."""
        from hi_diffusers.loading import load_placed

        return load_placed(self.model_type, self.source, self.placement, parts, self.calibration_dir)
