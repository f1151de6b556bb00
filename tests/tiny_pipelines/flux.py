"""FLUX.1: dev, schnell, image-to-image, Kontext."""

from typing import Any

import numpy as np
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxImg2ImgPipeline,
    FluxKontextPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
)
from PIL import Image

from tests.tiny_pipelines.variant import Variant, noise, quiet, seeded


def transformer(guidance_embeds: bool = True) -> Any:
    return seeded(
        FluxTransformer2DModel,
        patch_size=1,
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=guidance_embeds,
    )


def autoencoder() -> Any:
    """8 pixels a latent, 4 channels."""
    return seeded(
        AutoencoderKL,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        latent_channels=4,
        norm_num_groups=4,
        scaling_factor=0.5,
        shift_factor=0.1,
    )


def picture(seed: int = 5) -> Image.Image:
    """64×64 random pixels."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (64, 64, 3), dtype=np.uint8))


def dev_scheduler() -> Any:
    return FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)


def dev() -> Any:
    return quiet(FluxPipeline(dev_scheduler(), None, None, None, None, None, transformer()))


def schnell() -> Any:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    return quiet(FluxPipeline(scheduler, None, None, None, None, None, transformer(guidance_embeds=False)))


def image_to_image() -> Any:
    return quiet(FluxImg2ImgPipeline(dev_scheduler(), autoencoder(), None, None, None, None, transformer()))


def kontext() -> Any:
    return quiet(FluxKontextPipeline(dev_scheduler(), autoencoder(), None, None, None, None, transformer()))


def text(batch: int, prefix: str = "", seed: int = 1) -> dict[str, Any]:
    return {
        f"{prefix}prompt_embeds": noise(batch, 8, 32, seed=seed),
        f"{prefix}pooled_prompt_embeds": noise(batch, 32, seed=seed + 1),
    }


def arguments(batch: int) -> dict[str, Any]:
    return text(batch) | {"height": 64, "width": 64, "output_type": "latent"}


def guided(batch: int) -> dict[str, Any]:
    return arguments(batch) | text(batch, "negative_", seed=3) | {"true_cfg_scale": 3.0}


def repainted(batch: int) -> dict[str, Any]:
    return arguments(batch) | {"image": picture(), "strength": 0.6}


def edited(batch: int) -> dict[str, Any]:
    return arguments(batch) | {"image": picture(), "max_area": 64 * 64, "_auto_resize": False}


VARIANTS = [
    Variant("flux dev", dev, arguments),
    Variant("flux dev, true guidance", dev, guided, calls=2),
    Variant("flux schnell", schnell, arguments),
    Variant("flux img2img", image_to_image, repainted, strength=0.6),
    Variant("flux kontext", kontext, edited),
]
