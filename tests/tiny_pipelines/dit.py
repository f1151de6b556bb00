"""DiT: DDIM, DPM-Solver++."""

from typing import Any

from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel, DPMSolverMultistepScheduler

from tests.tiny_pipelines.flux import autoencoder
from tests.tiny_pipelines.variant import Variant, quiet, seeded


def transformer() -> Any:
    """Learns its variance: twice as many channels out as in."""
    return seeded(
        DiTTransformer2DModel,
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=8,
    )


def ddim() -> Any:
    scheduler = DDIMScheduler(beta_start=0.0001, beta_end=0.02, clip_sample=False)
    return quiet(DiTPipeline(transformer(), autoencoder(), scheduler))


def dpm() -> Any:
    scheduler = DPMSolverMultistepScheduler(beta_start=0.0001, beta_end=0.02)
    return quiet(DiTPipeline(transformer(), autoencoder(), scheduler))


def arguments(batch: int) -> dict[str, Any]:
    return {"class_labels": list(range(1, batch + 1)), "guidance_scale": 4.0, "output_type": "np"}


VARIANTS = [
    Variant("dit ddim", ddim, arguments),
    Variant("dit dpm++", dpm, arguments),
]
