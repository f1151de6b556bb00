"""Where a model is kept and how it computes."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hi_diffusers.model_files import ModelSource

if TYPE_CHECKING:
    from hi_diffusers.pipelines.hidream_image import HiDreamImagePipeline


@dataclass(frozen=True)
class Placement:
    """All that `load_pipeline` takes besides the files.

    Attributes:
        device, dtype, offload, tiled, compiled, attention_backend: as in `load_pipeline`.
        encoder_device: of the text encoders; None is `device`.
    """

    device: str = "auto"
    dtype: str = "auto"
    encoder_device: str | None = None
    offload: str = "none"
    tiled: bool = False
    compiled: bool = False
    attention_backend: str | None = None

    def load(
        self, model_type: str, source: ModelSource, parts: str = "all", calibration_dir: Path | None = None
    ) -> "HiDreamImagePipeline":
        """Load a model, or a part of it; arguments as in `load_pipeline`."""
        from hi_diffusers.loading import load_pipeline

        settings = asdict(self)
        encoder_device = settings.pop("encoder_device")
        if parts == "encoders" and encoder_device is not None:
            settings |= {"device": encoder_device, "offload": "none"}
        return load_pipeline(model_type, parts=parts, calibration_dir=calibration_dir, **asdict(source), **settings)
