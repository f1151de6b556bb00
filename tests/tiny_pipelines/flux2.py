"""FLUX.2: dev, klein, klein with a KV cache of its input images."""

from typing import Any

import torch
from diffusers import (
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinKVPipeline,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
)

from tests.tiny_pipelines.flux import picture
from tests.tiny_pipelines.variant import Variant, noise, quiet, seeded


def transformer(guidance_embeds: bool = True) -> Any:
    """With matrices large enough for the text and the input image to be seen in the result."""
    network = seeded(
        Flux2Transformer2DModel,
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        timestep_guidance_channels=32,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=guidance_embeds,
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=0.14, generator=generator)
    return network


def autoencoder() -> Any:
    return seeded(
        AutoencoderKLFlux2,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
    )


def scheduler() -> Any:
    return FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)


def dev() -> Any:
    return quiet(Flux2Pipeline(scheduler(), None, None, None, transformer()))


def klein() -> Any:
    network = transformer(guidance_embeds=False)
    return quiet(Flux2KleinPipeline(scheduler(), autoencoder(), None, None, network))


def klein_kv() -> Any:
    network = transformer(guidance_embeds=False)
    return quiet(Flux2KleinKVPipeline(scheduler(), autoencoder(), None, None, network))


def arguments(batch: int) -> dict[str, Any]:
    return {"prompt_embeds": noise(batch, 8, 32), "height": 64, "width": 64, "output_type": "latent"}


def guided(batch: int) -> dict[str, Any]:
    return arguments(batch) | {"negative_prompt_embeds": noise(batch, 8, 32, seed=3), "guidance_scale": 4.0}


def edited(batch: int) -> dict[str, Any]:
    return arguments(batch) | {"image": picture()}


VARIANTS = [
    Variant("flux2", dev, arguments),
    Variant("flux2 klein", klein, guided, calls=2),
    Variant("flux2 klein kv", klein_kv, edited),
]
