"""fp8: the blocks' matrix products in 8-bit floating point, e4m3, with one scale per row of either factor.

Weights are rounded once. Tokens are rounded at every product, each scaled by its own largest number (rowwise dynamic
scaling, as in arXiv 2209.05433 with finer scales). GPUs from Ada and Hopper on multiply fp8 at twice the rate of bf16,
with the product in bf16. Elsewhere the product of the rounded numbers is computed in fp32: it has the same rounding
error, and saves memory only.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.functional import ScalingType

from hi_diffusers.weights.layers import Layer

DTYPE = torch.float8_e4m3fn
LARGEST = torch.finfo(DTYPE).max
MULTIPLE = 16  # the GPUs' kernels need both sides to be multiples of it
CAPABILITY = (8, 9)


class Fp8Linear(nn.Module):
    """A Linear whose weight is kept, and whose product is computed, in fp8.

    Args:
        linear: the Linear that it replaces.
    """

    weight: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight, scale = round_rows(linear.weight.detach())
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    def _apply(self, fn: Any, recurse: bool = True) -> "Fp8Linear":
        """Move the layer between devices; fp8 numbers and their scales keep their dtypes."""
        weight, scale = self.weight, self.scale
        super()._apply(fn, recurse)
        self.weight, self.scale = weight.to(self.weight.device), scale.to(self.scale.device)
        return self

    def forward(self, x: Tensor) -> Tensor:
        """[...,in_features] to [...,out_features], in the dtype of x."""
        rows, scale = round_rows(x.reshape(-1, self.in_features))
        if multiplies_fp8(x.device):
            by_row = (ScalingType.RowWise, ScalingType.RowWise)
            product = F.scaled_mm(rows, self.weight.t(), scale, by_row[0], self.scale.t(), by_row[1]).to(x.dtype)
        else:
            product = F.linear(rows.float() * scale, self.weight.float() * self.scale).to(x.dtype)
        if self.bias is not None:
            product = product + self.bias
        return product.unflatten(0, x.shape[:-1])


def round_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Round rows [N,I] to fp8 numbers [N,I] and fp32 scales [N,1], whose product approximates them."""
    scale = rows.abs().amax(dim=1, keepdim=True).float().clamp(min=torch.finfo(torch.float32).tiny) / LARGEST
    return (rows.float() / scale).clamp(-LARGEST, LARGEST).to(DTYPE), scale


def multiplies_fp8(device: torch.device) -> bool:
    """Whether the device multiplies in fp8."""
    nvidia = device.type == "cuda" and torch.version.hip is None  # AMD's GPUs have another e4m3, or none
    return nvidia and torch.cuda.get_device_capability(device) >= CAPABILITY


def fp8_fits(in_features: int, out_features: int) -> bool:
    """Whether the GPUs' kernels can multiply with a weight of that size."""
    return in_features % MULTIPLE == 0 and out_features % MULTIPLE == 0


def fp8_bytes(layer: Layer) -> int:
    """Bytes of a Linear's weight in fp8: one per number, and its rows' scales."""
    return layer.in_features * layer.out_features + layer.out_features * 4


def to_fp8(model: nn.Module, takes: Callable[[str], bool]) -> None:
    """Replace Linears of a model by Fp8Linear; the weights are rounded one by one, on their device.

    Args:
        takes: whether the Linear of that name is replaced.
    """
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and takes(name) and fp8_fits(module.in_features, module.out_features):
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, Fp8Linear(module))
