"""The layers before and after the blocks: patches, timestep, pooled text, positions, and back to latents.

Shapes: B batch, S image tokens, D width, P patch size, C latent channels.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from torch import Tensor, nn

ROPE_THETA = 10000.0
TIMESTEP_FREQUENCIES = 256


class TimestepEmbed(nn.Module):
    """Embeds timesteps (0..1000)."""

    def __init__(self, width: int):
        super().__init__()
        self.time_proj = Timesteps(TIMESTEP_FREQUENCIES, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.timestep_embedder = TimestepEmbedding(TIMESTEP_FREQUENCIES, width)

    def forward(self, timesteps: Tensor, dtype: torch.dtype) -> Tensor:
        """Embed timesteps [B] as [B,D], computed in `dtype` after the sines, which are fp32."""
        return self.timestep_embedder(self.time_proj(timesteps).to(dtype))


class PooledEmbed(nn.Module):
    """Projects pooled CLIP vectors [B,text_emb_dim] to [B,D]."""

    def __init__(self, text_emb_dim: int, width: int):
        super().__init__()
        self.pooled_embedder = TimestepEmbedding(text_emb_dim, width)

    def forward(self, pooled: Tensor) -> Tensor:
        return self.pooled_embedder(pooled)


class PatchEmbed(nn.Module):
    """Projects patches [B,S,P*P*C] to tokens [B,S,D]."""

    def __init__(self, patch_size: int, in_channels: int, width: int):
        super().__init__()
        self.proj = nn.Linear(patch_size * patch_size * in_channels, width)

    def forward(self, patches: Tensor) -> Tensor:
        return self.proj(patches)


class CaptionProjection(nn.Module):
    """Projects one encoder's token states [B,T,caption_channels] to [B,T,D]."""

    def __init__(self, in_features: int, width: int):
        super().__init__()
        self.linear = nn.Linear(in_features, width, bias=False)

    def forward(self, states: Tensor) -> Tensor:
        return self.linear(states)


class OutEmbed(nn.Module):
    """Projects image tokens [B,S,D] to patches [B,S,P*P*C], modulated by the timestep."""

    def __init__(self, width: int, patch_size: int, out_channels: int):
        super().__init__()
        self.norm_final = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(width, patch_size * patch_size * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, tokens: Tensor, temb: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(temb)[:, None].chunk(2, dim=-1)
        return self.linear(self.norm_final(tokens) * (1 + scale) + shift)


class KeyMask(nn.Module):
    """Passes the padding mask [B or 1,S] on. A module, so that context parallelism can split what it returns."""

    def forward(self, mask: Tensor) -> Tensor:
        return mask


@dataclass(frozen=True)
class Rotary:
    """The rotation of every image token's query and key (text tokens sit at the origin and are not rotated).

    Attributes:
        cos, sin: [B or 1, S, 1, R/2], fp32; R is the rotated part of a head, the sum of `axes_dims_rope`.
    """

    cos: Tensor
    sin: Tensor

    @cached_property
    def turns(self) -> Tensor:
        """The rotations as complex numbers of length 1, [B or 1, S, 1, R/2]."""
        return torch.complex(self.cos, self.sin)

    def rotate_in_place(self, heads: Tensor) -> None:
        """`rotate` in place; the heads [B,S,H,head_dim] may be a part of a larger tensor."""
        channels = heads[..., : 2 * self.cos.shape[-1]]
        pairs = channels.unflatten(-1, (-1, 2))
        if heads.dtype == torch.float32:
            torch.view_as_complex(pairs).mul_(self.turns)
        else:
            turned = torch.view_as_complex(pairs.float()).mul_(self.turns)
            pairs.copy_(torch.view_as_real(turned))

    def rotate(self, heads: Tensor) -> Tensor:
        """Rotate neighbouring pairs of the first R channels of [B,S,H,head_dim]; fp32 inside, dtype kept."""
        rotated = 2 * self.cos.shape[-1]
        pairs = heads[..., :rotated].float().unflatten(-1, (-1, 2))
        even, odd = pairs.unbind(-1)
        turned = torch.stack((even * self.cos - odd * self.sin, even * self.sin + odd * self.cos), dim=-1)
        turned = turned.flatten(-2).to(heads.dtype)
        if rotated == heads.shape[-1]:
            return turned
        return torch.cat((turned, heads[..., rotated:]), dim=-1)


class RotaryTable(nn.Module):
    """Angles of every token: its position along each axis times theta^(-2i/dim) (arXiv 2104.09864, by axis).

    A module without weights, so that context parallelism can split what it returns.

    Args:
        axes_dims: number of channels that are rotated per axis.
    """

    def __init__(self, axes_dims: tuple[int, ...]):
        super().__init__()
        self.axes_dims = axes_dims

    def forward(self, positions: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
        """The table's `cos` and `sin`, see `Rotary`.

        Args:
            positions: [B or 1, S, axes], computed on the CPU in float64, which not every device has.
            device: device of the table.
        """
        angles = []
        for axis, dim in enumerate(self.axes_dims):
            omega = ROPE_THETA ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)
            angles.append(positions[..., axis, None].to("cpu", torch.float64) * omega)
        angle = torch.cat(angles, dim=-1)[:, :, None]
        return angle.cos().float().to(device), angle.sin().float().to(device)


def grid_positions(height: int, width: int, num_tokens: int) -> Tensor:
    """Positions (0, row, column) [1,num_tokens,3] of a height x width grid of patches; padding sits at the origin."""
    positions = torch.zeros(num_tokens, 3)
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    positions[: height * width, 1] = rows.flatten().float()
    positions[: height * width, 2] = columns.flatten().float()
    return positions[None]


def patchify(latents: Tensor, patch_size: int) -> Tensor:
    """Latents [B,C,H,W] to patches [B,S,P*P*C], rows first, channels innermost."""
    batch, channels, height, width = latents.shape
    rows, columns = height // patch_size, width // patch_size
    patches = latents.reshape(batch, channels, rows, patch_size, columns, patch_size)
    return patches.permute(0, 2, 4, 3, 5, 1).reshape(batch, rows * columns, -1)


def unpatchify(patches: Tensor, grid: tuple[int, int], patch_size: int) -> Tensor:
    """Patches [B,>=S,P*P*C] to latents [B,C,H,W]; tokens beyond the grid are padding and are dropped."""
    rows, columns = grid
    patches = patches[:, : rows * columns]
    patches = patches.reshape(patches.shape[0], rows, columns, patch_size, patch_size, -1)
    return patches.permute(0, 5, 1, 3, 2, 4).flatten(2, 3).flatten(3, 4)
