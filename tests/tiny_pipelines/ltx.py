"""LTX-Video: from text, an image, or conditions on some frames; LTX-2, which draws video and audio."""

from typing import Any

import torch
from diffusers import (
    AutoencoderKLLTX2Audio,
    AutoencoderKLLTX2Video,
    AutoencoderKLLTXVideo,
    FlowMatchEulerDiscreteScheduler,
    LTX2Pipeline,
    LTX2VideoTransformer3DModel,
    LTXConditionPipeline,
    LTXImageToVideoPipeline,
    LTXPipeline,
    LTXVideoTransformer3DModel,
)
from diffusers.pipelines.ltx.pipeline_ltx_condition import LTXVideoCondition
from diffusers.pipelines.ltx2 import LTX2TextConnectors

from tests.tiny_pipelines.variant import Variant, noise, quiet, seeded

LATENT_CHANNELS = 8
TEXT_LENGTH = 8
TEXT_WIDTH = 32
FRAMES, HEIGHT, WIDTH = 17, 64, 96
AUDIO_CHANNELS, MEL_BINS, MEL_COMPRESSION = 2, 16, 4
AUDIO_WIDTH = AUDIO_CHANNELS * MEL_BINS // MEL_COMPRESSION


def scheduler() -> Any:
    return FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True,
        base_shift=0.95,
        max_shift=2.05,
        base_image_seq_len=1024,
        max_image_seq_len=4096,
        shift_terminal=0.1,
    )


def transformer() -> Any:
    return seeded(
        LTXVideoTransformer3DModel,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_attention_heads=2,
        attention_head_dim=16,
        cross_attention_dim=32,
        num_layers=2,
        caption_channels=TEXT_WIDTH,
    )


def vae() -> Any:
    return seeded(
        AutoencoderKLLTXVideo,
        latent_channels=LATENT_CHANNELS,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
    )


def text_to_video() -> Any:
    return quiet(LTXPipeline(scheduler(), None, None, None, transformer()))


def image_to_video() -> Any:
    return quiet(LTXImageToVideoPipeline(scheduler(), vae(), None, None, transformer()))


def conditioned() -> Any:
    return quiet(LTXConditionPipeline(FlowMatchEulerDiscreteScheduler(), vae(), None, None, transformer()))


def transformer_2() -> Any:
    return seeded(
        LTX2VideoTransformer3DModel,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_attention_heads=2,
        attention_head_dim=16,
        cross_attention_dim=32,
        audio_in_channels=AUDIO_WIDTH,
        audio_out_channels=AUDIO_WIDTH,
        audio_num_attention_heads=2,
        audio_attention_head_dim=8,
        audio_cross_attention_dim=16,
        num_layers=2,
        caption_channels=TEXT_WIDTH,
        perturbed_attn=True,
    )


def vae_2() -> Any:
    return seeded(
        AutoencoderKLLTX2Video,
        latent_channels=LATENT_CHANNELS,
        block_out_channels=(8,),
        decoder_block_out_channels=(8,),
        layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        spatio_temporal_scaling=(True,),
        decoder_spatio_temporal_scaling=(True,),
        decoder_inject_noise=(False, False),
        downsample_type=("spatial",),
        upsample_residual=(False,),
        upsample_factor=(1,),
        spatial_compression_ratio=32,
        temporal_compression_ratio=8,
    )


def audio_vae() -> Any:
    return seeded(
        AutoencoderKLLTX2Audio,
        base_channels=AUDIO_WIDTH,
        ch_mult=(1,),
        num_res_blocks=1,
        resolution=32,
        latent_channels=AUDIO_CHANNELS,
        mel_bins=MEL_BINS,
    )


def connectors() -> Any:
    return seeded(
        LTX2TextConnectors,
        caption_channels=TEXT_WIDTH,
        text_proj_in_factor=2,
        video_connector_num_attention_heads=2,
        video_connector_attention_head_dim=TEXT_WIDTH // 2,
        video_connector_num_layers=1,
        video_connector_num_learnable_registers=None,
        audio_connector_num_attention_heads=2,
        audio_connector_attention_head_dim=TEXT_WIDTH // 2,
        audio_connector_num_layers=1,
        audio_connector_num_learnable_registers=None,
    )


def video_and_audio() -> Any:
    return quiet(
        LTX2Pipeline(scheduler(), vae_2(), audio_vae(), None, None, connectors(), transformer_2(), vocoder=None)
    )


def text(batch: int, width: int) -> dict[str, Any]:
    return {
        "prompt_embeds": noise(batch, TEXT_LENGTH, width, seed=1),
        "prompt_attention_mask": torch.ones(batch, TEXT_LENGTH),
        "negative_prompt_embeds": noise(batch, TEXT_LENGTH, width, seed=2),
        "negative_prompt_attention_mask": torch.ones(batch, TEXT_LENGTH),
        "height": HEIGHT,
        "width": WIDTH,
        "num_frames": FRAMES,
        "output_type": "latent",
    }


def images(batch: int, seed: int) -> torch.Tensor:
    return noise(batch, 3, HEIGHT, WIDTH, seed=seed).sigmoid()


def arguments(batch: int) -> dict[str, Any]:
    return text(batch, TEXT_WIDTH)


def from_image(batch: int) -> dict[str, Any]:
    return arguments(batch) | {"image": images(batch, seed=3)}


def from_conditions(batch: int) -> dict[str, Any]:
    first = LTXVideoCondition(image=images(batch, seed=3), frame_index=0, strength=1.0)
    later = LTXVideoCondition(image=images(batch, seed=4), frame_index=8, strength=0.5)
    return arguments(batch) | {"conditions": [first, later]}


def all_guidances(batch: int) -> dict[str, Any]:
    return text(batch, 2 * TEXT_WIDTH) | {"spatio_temporal_guidance_blocks": [1]}


VARIANTS = [
    Variant("ltx", text_to_video, arguments),
    Variant("ltx i2v", image_to_video, from_image),
    Variant("ltx condition", conditioned, from_conditions),
    Variant("ltx-2", video_and_audio, all_guidances, calls=3),
]
