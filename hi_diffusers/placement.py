"""Where a model is kept and how it computes: data alone. `hi_diffusers.loading` checks it and loads by it."""

from dataclasses import dataclass


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
