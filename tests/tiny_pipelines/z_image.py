"""Z-Image: guided throughout, guided up to a noise level."""

from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel

from tests.tiny_pipelines.variant import Variant, noise, quiet, seeded


def transformer() -> Any:
    network = seeded(
        ZImageTransformer2DModel,
        in_channels=4,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=32,
        axes_dims=[8, 4, 4],
        axes_lens=[128, 16, 16],
    )
    with torch.no_grad():
        for seed, token in enumerate((network.x_pad_token, network.cap_pad_token)):
            token.copy_(noise(*token.shape, seed=seed) * 0.1)
    return network


def pipeline() -> Any:
    return quiet(ZImagePipeline(FlowMatchEulerDiscreteScheduler(shift=3.0), None, None, None, transformer()))


def arguments(batch: int) -> dict[str, Any]:
    """Every prompt has a length of its own."""
    return {
        "prompt_embeds": [noise(6 + i, 32, seed=1 + i) for i in range(batch)],
        "negative_prompt_embeds": [noise(4 + i, 32, seed=11 + i) for i in range(batch)],
        "guidance_scale": 4.0,
        "height": 64,
        "width": 64,
        "output_type": "latent",
    }


def cut(batch: int) -> dict[str, Any]:
    return arguments(batch) | {"cfg_truncation": 0.4}


VARIANTS = [
    Variant("z-image", pipeline, arguments),
    Variant("z-image, cut guidance", pipeline, cut),
]
