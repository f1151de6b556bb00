"""HunyuanVideo (text-to-video, image-to-video, 1.5) and HunyuanImage 2.1."""

from typing import Any

import torch
from diffusers import (
    AdaptiveProjectedMixGuidance,
    AutoencoderKLHunyuanVideo,
    AutoencoderKLHunyuanVideo15,
    ClassifierFreeGuidance,
    FlowMatchEulerDiscreteScheduler,
    HunyuanImagePipeline,
    HunyuanImageTransformer2DModel,
    HunyuanVideo15Pipeline,
    HunyuanVideo15Transformer3DModel,
    HunyuanVideoImageToVideoPipeline,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
)

from tests.tiny_pipelines.variant import Variant, noise, quiet, seeded


def scheduler(shift: float) -> Any:
    return FlowMatchEulerDiscreteScheduler(shift=shift)


def video_transformer(image_condition_type: str | None = None) -> Any:
    return seeded(
        HunyuanVideoTransformer3DModel,
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        num_single_layers=2,
        num_refiner_layers=1,
        text_embed_dim=32,
        pooled_projection_dim=32,
        rope_axes_dim=(4, 4, 8),
        image_condition_type=image_condition_type,
    )


def video() -> Any:
    return quiet(HunyuanVideoPipeline(None, None, video_transformer(), None, scheduler(7.0), None, None))


def image_to_video() -> Any:
    vae = seeded(
        AutoencoderKLHunyuanVideo,
        latent_channels=4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
    )
    denoiser = video_transformer("token_replace")
    return quiet(HunyuanVideoImageToVideoPipeline(None, None, denoiser, vae, scheduler(7.0), None, None, None))


def video_15() -> Any:
    """With 8 tokens for the picture it is not given, in place of 729."""
    denoiser = seeded(
        HunyuanVideo15Transformer3DModel,
        in_channels=9,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        num_refiner_layers=1,
        text_embed_dim=32,
        text_embed_2_dim=16,
        image_embed_dim=16,
        rope_axes_dim=(4, 4, 8),
    )
    vae = seeded(
        AutoencoderKLHunyuanVideo15,
        latent_channels=4,
        block_out_channels=(8, 8, 8, 8, 8),
        layers_per_block=1,
    )
    guider = ClassifierFreeGuidance(guidance_scale=6.0)
    pipe = HunyuanVideo15Pipeline(None, None, denoiser, vae, scheduler(5.0), None, None, guider)
    pipe.vision_num_semantic_tokens = 8
    return quiet(pipe)


def image() -> Any:
    denoiser = seeded(
        HunyuanImageTransformer2DModel,
        in_channels=16,
        out_channels=16,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        num_single_layers=2,
        num_refiner_layers=1,
        text_embed_dim=32,
        text_embed_2_dim=16,
        rope_axes_dim=(8, 8),
    )
    guider = AdaptiveProjectedMixGuidance()
    return quiet(HunyuanImagePipeline(scheduler(5.0), None, None, None, None, None, denoiser, guider))


def pooled_text(batch: int, length: int, prefix: str = "", seed: int = 1) -> dict[str, Any]:
    return {
        f"{prefix}prompt_embeds": noise(batch, length, 32, seed=seed),
        f"{prefix}pooled_prompt_embeds": noise(batch, 32, seed=seed + 1),
        f"{prefix}prompt_attention_mask": torch.ones(batch, length),
    }


def two_texts(batch: int, length: int, prefix: str = "", seed: int = 1) -> dict[str, Any]:
    return {
        f"{prefix}prompt_embeds": noise(batch, length, 32, seed=seed),
        f"{prefix}prompt_embeds_mask": torch.ones(batch, length),
        f"{prefix}prompt_embeds_2": noise(batch, 4, 16, seed=seed + 1),
        f"{prefix}prompt_embeds_mask_2": torch.ones(batch, 4),
    }


def video_arguments(batch: int) -> dict[str, Any]:
    return pooled_text(batch, 8) | {"height": 64, "width": 64, "num_frames": 5, "output_type": "latent"}


def guided(batch: int) -> dict[str, Any]:
    return video_arguments(batch) | pooled_text(batch, 5, "negative_", seed=3) | {"true_cfg_scale": 3.0}


def with_pictures(batch: int) -> dict[str, Any]:
    return video_arguments(batch) | {"image": noise(batch, 3, 64, 64, seed=5).sigmoid()}


def video_15_arguments(batch: int) -> dict[str, Any]:
    texts = two_texts(batch, 8) | two_texts(batch, 5, "negative_", seed=3)
    return texts | {"height": 64, "width": 64, "num_frames": 5, "output_type": "latent"}


def image_arguments(batch: int) -> dict[str, Any]:
    texts = two_texts(batch, 8) | two_texts(batch, 5, "negative_", seed=3)
    return texts | {"height": 128, "width": 128, "output_type": "latent"}


VARIANTS = [
    Variant("hunyuan-video", video, video_arguments),
    Variant("hunyuan-video, true guidance", video, guided, calls=2),
    Variant("hunyuan-video i2v", image_to_video, with_pictures),
    Variant("hunyuan-video-1.5", video_15, video_15_arguments, calls=2),
    Variant("hunyuan-image", image, image_arguments, calls=2),
]
