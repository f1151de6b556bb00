"""A model that is loaded as its memory plan says."""

from pathlib import Path
from typing import TYPE_CHECKING

from hi_diffusers.memory.fitting import kept_as
from hi_diffusers.memory.plan import MemoryPlan
from hi_diffusers.model_files import ModelSource
from hi_diffusers.options import ResolvedOptions
from hi_diffusers.placement import Placement
from hi_diffusers.presets import ModelPreset

if TYPE_CHECKING:
    from hi_diffusers import HiDreamImagePipeline
    from hi_diffusers.pipelines.prompts import PromptEmbeds


class Session:
    """One pipeline, or two where prompts are encoded before the transformer is loaded, or on another device.

    Args:
        preset, source: the model, and where its files are.
        placement: as asked for.
        memory: what was planned for the drawings.
        calibration_dir: where calibrations are looked up before the model's own.
    """

    def __init__(
        self,
        preset: ModelPreset,
        source: ModelSource,
        placement: Placement,
        memory: MemoryPlan,
        calibration_dir: Path | None = None,
    ):
        self.preset, self.source, self.calibration_dir = preset, source, calibration_dir
        self.placement = kept_as(placement, memory)
        self.frees_encoders = memory.strategy == "free encoders"
        self.in_halves = self.frees_encoders or placement.encoder_device is not None
        self._encoders: HiDreamImagePipeline | None = None
        self._pipe: HiDreamImagePipeline | None = None

    @property
    def pipe(self) -> "HiDreamImagePipeline":
        """What draws, loaded when it is first asked for."""
        self._pipe = self._pipe or self._load("drawing" if self.in_halves else "all")
        return self._pipe

    def encode(self, options: ResolvedOptions) -> tuple[list[str], "PromptEmbeds | None"]:
        """What of the prompt the model does not get to see, and the embeddings; None where `pipe` encodes itself."""
        from hi_diffusers.generation import encode_prompts, prompt_notices
        from hi_diffusers.loading import resolve_device

        if not self.in_halves:
            return prompt_notices(self.pipe, options), None
        encoders = self._encoders or self._load("encoders")
        notices, embeds = prompt_notices(encoders, options), encode_prompts(encoders, [options])
        if not self.frees_encoders:
            self._encoders = encoders
        return notices, embeds.to(resolve_device(self.placement.device))

    def _load(self, parts: str) -> "HiDreamImagePipeline":
        from hi_diffusers.loading import load_placed

        return load_placed(self.preset.name, self.source, self.placement, parts, self.calibration_dir)
