"""The weighted sum of kept features, which is a forecast's only arithmetic."""

from collections.abc import Sequence

import torch
from torch import Tensor


def weighted_sum(weights: Sequence[float], anchors: Sequence[Tensor], dtype: torch.dtype | None = None) -> Tensor:
    """Sum weight times anchor, accumulated in fp32.

    Args:
        weights: one float per anchor. Anchors of weight 0 are not read.
        anchors: tensors of one shape, oldest first, any floating dtype.
        dtype: dtype of the result; None is the newest anchor's.

    Returns:
        A new tensor of the anchors' shape.

    Raises:
        ValueError: if weights and anchors differ in length or are empty.
    """
    if len(weights) != len(anchors) or not anchors:
        raise ValueError(
            f"weights must be one per anchor and at least one, got {len(weights)} for {len(anchors)} anchors"
        )
    dtype = dtype or anchors[-1].dtype
    total: Tensor | None = None
    for weight, anchor in zip(weights, anchors, strict=True):
        if weight == 0.0:
            continue
        if total is None:
            total = anchor.to(torch.float32) * weight
        else:
            total.add_(anchor, alpha=weight)
    if total is None:
        return torch.zeros_like(anchors[-1], dtype=dtype)
    return total.to(dtype)
