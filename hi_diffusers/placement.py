"""Where a model is kept and how it computes."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hi_diffusers.console import say
from hi_diffusers.model_files import ModelSource

if TYPE_CHECKING:
    from hi_diffusers.pipelines.hidream_image import HiDreamImagePipeline


@dataclass(frozen=True)
class Placement:
    """All that `load_pipeline` takes besides the files.

    Attributes:
        device, dtype, offload, tiled, compiled, fp8, attention_backend: as in `load_pipeline`.
        encoder_device: of the text encoders; None is `device`.
    """

    device: str = "auto"
    dtype: str = "auto"
    encoder_device: str | None = None
    offload: str = "none"
    tiled: bool = False
    compiled: bool = False
    fp8: bool = False
    attention_backend: str | None = None

    def load(
        self, model_type: str, source: ModelSource, parts: str = "all", calibration_dir: Path | None = None
    ) -> "HiDreamImagePipeline":
        """Load a model, or a part of it; arguments as in `load_pipeline`."""
        from hi_diffusers.loading import load_pipeline, resolve_device

        settings = asdict(self)
        encoder_device = settings.pop("encoder_device")
        if parts == "encoders" and encoder_device is not None:
            if self.dtype == "auto":  # embeddings are what they would be where the pictures are drawn
                settings["dtype"] = "bf16" if resolve_device(self.device).type == "cuda" else "fp32"
            settings |= {"device": encoder_device, "offload": "none"}
        return load_pipeline(model_type, parts=parts, calibration_dir=calibration_dir, **asdict(source), **settings)

    def check(self) -> None:
        """Refuse what this machine does not have, before a weight is read.

        Raises:
            ValueError: naming the device or the attention backend.
        """
        from hi_diffusers.loading import check_attention_backend, check_fp8, resolve_device
        from hi_diffusers.models.fp8 import multiplies_fp8

        device = resolve_device(self.device)
        if self.fp8:
            check_fp8(device, self.compiled)
        if self.fp8 and not multiplies_fp8(device):
            say(f"fp8 is emulated on this {device.type}, which has no such products: it shows the error, and is slow")
        if self.encoder_device is not None:
            try:
                same = resolve_device(self.encoder_device) == device
            except ValueError as error:
                raise ValueError(f"encoder_{error}") from None
            if same:
                say(f"encoder_device {self.encoder_device} has no effect: it is where the pictures are drawn")
        if self.attention_backend is not None:
            check_attention_backend(self.attention_backend)
