"""Stable Diffusion 3: text-to-image, image-to-image."""

from typing import Any

from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusion3Pipeline,
)

from tests.tiny_pipelines.flux import autoencoder, picture, text
from tests.tiny_pipelines.variant import Variant, quiet, seeded


def transformer() -> Any:
    """One block with the second attention of SD 3.5 medium, one without."""
    return seeded(
        SD3Transformer2DModel,
        sample_size=8,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=32,
        pooled_projection_dim=32,
        pos_embed_max_size=8,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )


def scheduler() -> Any:
    return FlowMatchEulerDiscreteScheduler(shift=3.0)


def text_to_image() -> Any:
    return quiet(StableDiffusion3Pipeline(transformer(), scheduler(), None, None, None, None, None, None, None))


def image_to_image() -> Any:
    vae = autoencoder()
    return quiet(StableDiffusion3Img2ImgPipeline(transformer(), scheduler(), vae, None, None, None, None, None, None))


def arguments(batch: int) -> dict[str, Any]:
    prompts = text(batch) | text(batch, "negative_", seed=3)
    return prompts | {"guidance_scale": 4.0, "height": 64, "width": 64, "output_type": "latent"}


def repainted(batch: int) -> dict[str, Any]:
    return arguments(batch) | {"image": picture(), "strength": 0.6}


VARIANTS = [
    Variant("sd3", text_to_image, arguments),
    Variant("sd3 img2img", image_to_image, repainted, strength=0.6),
]
