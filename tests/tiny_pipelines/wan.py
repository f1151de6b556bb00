"""Wan: text, image and video to video, and the two experts of Wan 2.2."""

from typing import Any

import torch
from diffusers import (
    AutoencoderKLWan,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
    WanVideoToVideoPipeline,
)

from tests.tiny_pipelines.variant import Variant, noise, quiet, seeded

LATENT_CHANNELS = 16
CONDITION_CHANNELS = LATENT_CHANNELS + 4  # the encoded image, and a mask for each of the frames in a latent frame
FRAMES, HEIGHT, WIDTH = 9, 32, 48
EXPERT_SWITCH = 0.78  # between the timesteps of steps 5 and 6 of 12
V2V_STRENGTH = 0.6


def transformer(kind: Any = WanTransformer3DModel, in_channels: int = LATENT_CHANNELS) -> Any:
    return seeded(
        kind,
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=in_channels,
        out_channels=LATENT_CHANNELS,
        text_dim=32,
        freq_dim=32,
        ffn_dim=64,
        num_layers=2,
        rope_max_seq_len=32,
    )


def low_noise_expert(**config: Any) -> Any:
    """A transformer with other weights than that of `transformer`."""
    torch.manual_seed(1)
    return WanTransformer3DModel(**config)


def vae() -> Any:
    return seeded(AutoencoderKLWan, base_dim=4, z_dim=LATENT_CHANNELS, dim_mult=[1, 1, 1, 1], num_res_blocks=1)


def scheduler() -> Any:
    return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)


def text_to_video() -> Any:
    return quiet(WanPipeline(None, None, None, scheduler(), transformer()))


def image_to_video() -> Any:
    denoiser = transformer(in_channels=LATENT_CHANNELS + CONDITION_CHANNELS)
    return quiet(WanImageToVideoPipeline(None, None, vae(), scheduler(), transformer=denoiser))


def video_to_video() -> Any:
    return quiet(WanVideoToVideoPipeline(None, None, transformer(), vae(), scheduler()))


def two_experts() -> Any:
    experts = transformer(), transformer(low_noise_expert)
    return quiet(WanPipeline(None, None, None, scheduler(), *experts, boundary_ratio=EXPERT_SWITCH))


def text(batch: int) -> dict[str, Any]:
    return {
        "prompt_embeds": noise(batch, 8, 32, seed=1),
        "negative_prompt_embeds": noise(batch, 8, 32, seed=2),
        "guidance_scale": 3.0,
        "height": HEIGHT,
        "width": WIDTH,
        "output_type": "latent",
    }


def arguments(batch: int) -> dict[str, Any]:
    return text(batch) | {"num_frames": FRAMES}


def from_image(batch: int) -> dict[str, Any]:
    return arguments(batch) | {"image": noise(1, 3, HEIGHT, WIDTH, seed=3).sigmoid()}


def from_video(batch: int) -> dict[str, Any]:
    video = noise(batch, FRAMES, 3, HEIGHT, WIDTH, seed=3).sigmoid()
    return text(batch) | {"video": video, "strength": V2V_STRENGTH}


def two_scales(batch: int) -> dict[str, Any]:
    return arguments(batch) | {"guidance_scale_2": 2.0}


VARIANTS = [
    Variant("wan t2v", text_to_video, arguments, calls=2),
    Variant("wan i2v", image_to_video, from_image, calls=2),
    Variant("wan v2v", video_to_video, from_video, calls=2, strength=V2V_STRENGTH),
    Variant("wan 2.2 t2v", two_experts, two_scales, calls=2),
]
