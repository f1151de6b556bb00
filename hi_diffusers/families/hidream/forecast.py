"""The forecasts of all blocks as one sum: the tokens plus the gated forecast of every sub-layer's output.

    tokens + sum over features f of gate_f * (sum over anchors j of weight_j * anchor_fj)

Shapes: B batch, S image tokens, D width, F features (two per block).
"""

import logging
from collections.abc import Callable, Sequence
from functools import lru_cache
from importlib.util import find_spec
from typing import TypeGuard

import torch
from torch import Tensor

log = logging.getLogger(__name__)


def add_forecasts(
    tokens: Tensor, gates: Tensor, anchors: Sequence[Sequence[Tensor]], weights: Sequence[float]
) -> Tensor:
    """Add the forecasts of all features to the tokens, accumulated in fp32.

    Args:
        tokens: [B,S,D].
        gates: [F,B,D].
        anchors: anchors [B,S,D] of each feature, oldest first.
        weights: one per anchor; anchors of weight 0 are not read.

    Returns:
        [B,S,D], in the tokens' dtype.
    """
    read = [index for index, weight in enumerate(weights) if weight != 0.0]
    kernel = find_kernel(tokens.device)
    if kernel is None or not read:
        return add_forecasts_plainly(tokens, gates, anchors, weights)
    return kernel(
        tokens, gates, [[kept[index] for index in read] for kept in anchors], [weights[index] for index in read]
    )


@lru_cache
def find_kernel(device: torch.device) -> Callable[..., Tensor] | None:
    """The kernel, tested once per device; None if Triton is not installed, or cannot compile for the device."""
    if device.type != "cuda" or find_spec("triton") is None:
        return None
    try:
        from hi_diffusers.families.hidream.forecast_kernel import add_forecasts_in_one_pass

        one = torch.ones(1, 1, 16, device=device)
        add_forecasts_in_one_pass(one, one, [[one]], [1.0])
    except Exception as error:  # no C compiler, an unknown GPU, ...: the plain sum gives the same
        log.warning("Triton does not work here (%s): forecasts are summed by torch", error)
        return None
    return add_forecasts_in_one_pass


def add_forecasts_plainly(
    tokens: Tensor, gates: Tensor, anchors: Sequence[Sequence[Tensor]], weights: Sequence[float]
) -> Tensor:
    """`add_forecasts` with one pass over the sum per anchor: the kernel's reference."""
    total = tokens.to(torch.float32, copy=True)
    for gate, kept in zip(gates[:, :, None].float(), anchors, strict=True):
        for weight, anchor in zip(weights, kept, strict=True):
            if weight != 0.0:
                total.addcmul_(anchor.float(), gate, value=weight)
    return total.to(tokens.dtype)


def is_summable(anchors: Sequence[Sequence[object]], tokens: Tensor) -> TypeGuard[Sequence[Sequence[Tensor]]]:
    """Whether `add_forecasts` accepts these anchors: contiguous, with the tokens' dtype, device and shape."""
    return all(
        isinstance(anchor, Tensor)
        and anchor.dtype == tokens.dtype
        and anchor.device == tokens.device
        and anchor.shape == tokens.shape
        and anchor.is_contiguous()
        for kept in anchors
        for anchor in kept
    )
