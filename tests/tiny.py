"""Tiny HiDream transformers with random weights: ours and diffusers' class of the same name, the oracle.

Every parameter is random, also those that training starts at zero, so that nothing hides behind a closed gate.
"""

from dataclasses import dataclass, replace
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from hi_diffusers.families.hidream import published
from hi_diffusers.families.hidream.transformer import HiDreamImageTransformer2DModel

Oracle = diffusers.HiDreamImageTransformer2DModel

NUM_LLAMA_LAYERS = 5
TEXT_LENGTH = 6
TINY = {
    "patch_size": 2,
    "in_channels": 4,
    "num_layers": 2,
    "num_single_layers": 3,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "caption_channels": [12, 20],
    "text_emb_dim": 24,
    "num_routed_experts": 4,
    "num_activated_experts": 2,
    "axes_dims_rope": [8, 4, 4],
    "max_resolution": [16, 16],
    "llama_layers": [0, 1, 3, 3, 4],
}
TINY_BLOCKS = TINY["num_layers"] + TINY["num_single_layers"]
TINY_WIDTH = TINY["attention_head_dim"] * TINY["num_attention_heads"]

FULL_SIZE = published.TRANSFORMER


@dataclass(frozen=True)
class Inputs:
    """What a forward takes, in diffusers' order.

    Attributes:
        latents: [B,C,H,W].
        timesteps: [B], all different.
        t5: [B,T,12].
        llama: [L,B,T,20].
        pooled: [B,24].
    """

    latents: Tensor
    timesteps: Tensor
    t5: Tensor
    llama: Tensor
    pooled: Tensor

    @property
    def positional(self) -> tuple[Tensor, ...]:
        """The arguments of a forward."""
        return self.latents, self.timesteps, self.t5, self.llama, self.pooled

    @property
    def text(self) -> tuple[Tensor, ...]:
        """The first arguments of `prepare`."""
        return self.t5, self.llama, self.pooled

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.latents.shape[-2] // 2, self.latents.shape[-1] // 2

    def to(self, *args: Any) -> "Inputs":
        """The same in another dtype or on another device; timesteps keep their dtype."""
        moved = [tensor.to(*args) for tensor in self.positional]
        return Inputs(*moved[:1], moved[1].to(self.timesteps.dtype), *moved[2:])

    def at(self, timestep: float, latents: Tensor | None = None) -> "Inputs":
        """The same at one timestep for the whole batch."""
        return replace(
            self,
            latents=self.latents if latents is None else latents,
            timesteps=torch.full_like(self.timesteps, timestep),
        )


def randomize(model: nn.Module, seed: int = 0) -> None:
    """Draw every parameter: weights with unit gain, biases and norms around their usual values."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(noise / parameter.shape[-1] ** 0.5)
            elif "norm" in name:
                parameter.copy_(1 + 0.2 * noise)
            else:
                parameter.copy_(0.2 * noise)


def make_oracle(seed: int = 0, **changes: Any) -> Oracle:
    """diffusers' transformer at tiny size."""
    model = Oracle(**{**TINY, **changes})
    randomize(model, seed)
    return model.eval().requires_grad_(False)


def make_ours(oracle: Oracle) -> HiDreamImageTransformer2DModel:
    """Our transformer with the oracle's configuration and weights."""
    model = HiDreamImageTransformer2DModel.from_config(dict(oracle.config))
    model.load_state_dict(oracle.state_dict())
    return model.eval().requires_grad_(False)


def make_tiny(seed: int = 0, **changes: Any) -> HiDreamImageTransformer2DModel:
    """Our transformer at tiny size."""
    model = HiDreamImageTransformer2DModel(**{**TINY, **changes})
    randomize(model, seed)
    return model.eval().requires_grad_(False)


def make_inputs(batch: int = 2, height: int = 8, width: int = 8, seed: int = 1, channels: int = 4) -> Inputs:
    """Random inputs of a forward."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    return Inputs(
        latents=draw(batch, channels, height, width),
        timesteps=torch.linspace(873.0, 120.0, batch),
        t5=draw(batch, TEXT_LENGTH, 12),
        llama=draw(NUM_LLAMA_LAYERS, batch, TEXT_LENGTH, 20),
        pooled=draw(batch, 24),
    )


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Largest absolute difference as a share of the expected tensor's largest magnitude."""
    assert actual.shape == expected.shape, f"shapes differ: {tuple(actual.shape)} and {tuple(expected.shape)}"
    assert actual.isfinite().all() and expected.isfinite().all(), "there are values that are not finite"
    return ((actual.double() - expected.double()).abs().max() / expected.double().abs().max()).item()
