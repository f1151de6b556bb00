"""The three trainings at tiny sizes, on pictures and latents that cost nothing to make."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.tiny_folder import TRANSFORMER
from training.latents import LatentPool
from training.scenes import CPU_TIER
from training.vae import VaeRecipe

# What `training.train` decides itself; the rest follows from the text encoders.
TRANSFORMER_SHAPE = {
    name: TRANSFORMER[name]
    for name in (
        "patch_size",
        "in_channels",
        "num_layers",
        "num_single_layers",
        "attention_head_dim",
        "num_attention_heads",
        "axes_dims_rope",
        "max_resolution",
    )
}
VAE_TIER = replace(CPU_TIER, image_size=16)
VAE_RECIPE = VaeRecipe(
    widths=(8, 16), latent_channels=2, steps=4, batch_size=2, learning_rate=1e-3, pool_size=8, encoder_steps=2
)


def fake_pictures(count: int = 80) -> np.ndarray:
    """uint8 [count,16,16,3]."""
    return np.random.default_rng(0).integers(0, 256, (count, 16, 16, 3), np.uint8)


def fake_latents(count: int = 6) -> LatentPool:
    """Latents [count,4,16,16] that belong to no picture."""
    values = np.random.default_rng(0).standard_normal((count, 4, 16, 16)).astype(np.float16)
    return LatentPool(CPU_TIER, 0, values)


def assert_same_state(left: Any, right: Any) -> None:
    """Two checkpoints hold the same values to the last bit; measured times aside."""
    if isinstance(left, torch.Tensor):
        torch.testing.assert_close(left, right, atol=0, rtol=0)
    elif isinstance(left, dict):
        assert left.keys() == right.keys()
        for name in left.keys() - {"seconds"}:
            assert_same_state(left[name], right[name])
    elif isinstance(left, list):
        for one, other in zip(left, right, strict=True):
            assert_same_state(one, other)
    else:
        assert left == right


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint as it is on disk."""
    return torch.load(path, weights_only=True)
