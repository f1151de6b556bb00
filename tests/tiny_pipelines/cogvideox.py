"""CogVideoX: 2b with its DDIM scheduler, and as 5b with the DPM scheduler, which adds noise at every step."""

from typing import Any

from diffusers import (
    CogVideoXDDIMScheduler,
    CogVideoXDPMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
)

from tests.tiny_pipelines.variant import Variant, noise, quiet, seeded

TEXT_LENGTH = 8
SCHEDULE = {
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
}


def transformer(rotary: bool) -> Any:
    return seeded(
        CogVideoXTransformer3DModel,
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=32,
        text_embed_dim=32,
        num_layers=2,
        sample_width=8,
        sample_height=8,
        sample_frames=9,
        max_text_seq_length=TEXT_LENGTH,
        use_rotary_positional_embeddings=rotary,
    )


def ddim() -> Any:
    scheduler = CogVideoXDDIMScheduler(snr_shift_scale=3.0, **SCHEDULE)
    return quiet(CogVideoXPipeline(None, None, None, transformer(rotary=False), scheduler))


def dpm() -> Any:
    scheduler = CogVideoXDPMScheduler(snr_shift_scale=1.0, **SCHEDULE)
    return quiet(CogVideoXPipeline(None, None, None, transformer(rotary=True), scheduler))


def arguments(batch: int) -> dict[str, Any]:
    return {
        "prompt_embeds": noise(batch, TEXT_LENGTH, 32, seed=1),
        "negative_prompt_embeds": noise(batch, TEXT_LENGTH, 32, seed=2),
        "guidance_scale": 6.0,
        "height": 64,
        "width": 64,
        "num_frames": 9,
        "output_type": "latent",
    }


VARIANTS = [
    Variant("cogvideox ddim", ddim, arguments),
    Variant("cogvideox dpm", dpm, arguments, renoises=True),
]
