"""Qwen-Image: text-to-image, Edit, Edit Plus, 2.1."""

from typing import Any

import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImage21Pipeline,
    QwenImage21Transformer2DModel,
    QwenImageEditPipeline,
    QwenImageEditPlusPipeline,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus
from PIL import Image

from tests.tiny_pipelines.variant import Variant, noise, quiet, seeded

SIDE = 64


class Processor:
    """What Qwen-Image 2.1 asks its processor while it is built: how long the template is, and a token's number."""

    def __init__(self) -> None:
        self.tokenizer = self

    def apply_chat_template(self, conversation: list[dict[str, Any]], **options: Any) -> list[list[int]]:
        return [[0]]

    def encode(self, text: str) -> list[int]:
        return [0]


def scheduler() -> Any:
    return FlowMatchEulerDiscreteScheduler(
        base_shift=0.5,
        max_shift=0.9,
        max_image_seq_len=8192,
        shift_terminal=0.02,
        use_dynamic_shifting=True,
    )


def transformer() -> Any:
    return seeded(
        QwenImageTransformer2DModel,
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=(4, 4, 8),
    )


def vae() -> Any:
    return seeded(
        AutoencoderKLQwenImage,
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        latents_mean=[0.4, -0.1, -0.3, 0.3],
        latents_std=[0.05] * 4,
    )


def image() -> Any:
    return quiet(QwenImagePipeline(scheduler(), None, None, None, transformer()))


def edit() -> Any:
    """The pipeline resizes the given picture to one megapixel: here to the side of the one drawn."""
    pipeline_qwenimage_edit.calculate_dimensions = small_dimensions
    return quiet(QwenImageEditPipeline(scheduler(), vae(), None, None, None, transformer()))


def small_dimensions(area: int, ratio: float) -> tuple[int, int, None]:
    return SIDE, SIDE, None


def edit_plus() -> Any:
    """The pipeline resizes the given pictures to one megapixel: here to the side of the one drawn."""
    pipeline_qwenimage_edit_plus.VAE_IMAGE_SIZE = SIDE * SIDE
    return quiet(QwenImageEditPlusPipeline(scheduler(), vae(), None, None, None, transformer()))


def image_21() -> Any:
    denoiser = seeded(
        QwenImage21Transformer2DModel,
        in_channels=16,
        out_channels=16,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        context_in_dim=32,
        axes_dims_rope=(4, 4, 8),
    )
    return quiet(QwenImage21Pipeline(scheduler(), None, None, Processor(), denoiser))


def text(batch: int, length: int, prefix: str = "", seed: int = 1) -> dict[str, Any]:
    return {
        f"{prefix}prompt_embeds": noise(batch, length, 32, seed=seed),
        f"{prefix}prompt_embeds_mask": torch.ones(batch, length, dtype=torch.bool),
    }


def picture(seed: int = 5) -> Image.Image:
    return Image.fromarray((noise(SIDE, SIDE, 3, seed=seed).sigmoid() * 255).byte().numpy())


def arguments(batch: int) -> dict[str, Any]:
    texts = text(batch, 8) | text(batch, 5, "negative_", seed=3)
    return texts | {"true_cfg_scale": 3.0, "height": SIDE, "width": SIDE, "output_type": "latent"}


def with_picture(batch: int) -> dict[str, Any]:
    return arguments(batch) | {"image": picture()}


def with_pictures(batch: int) -> dict[str, Any]:
    """The pipeline takes one text only."""
    return arguments(1) | {"image": [picture(), picture(seed=6)], "num_images_per_prompt": batch}


VARIANTS = [
    Variant("qwen-image", image, arguments, calls=2),
    Variant("qwen-image-edit", edit, with_picture, calls=2),
    Variant("qwen-image-edit-plus", edit_plus, with_pictures, calls=2),
    Variant("qwen-image 2.1", image_21, arguments, calls=2),
]
