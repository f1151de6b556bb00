"""`forecast.add_forecasts` as one Triton kernel: every anchor is read once, and the tokens are written once."""

from collections.abc import Sequence
from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024  # elements per program


@triton.jit
def _add_forecasts(
    tokens,
    gates,
    anchors,
    weights,
    output,
    num_elements,
    per_picture,
    batch_width,
    width,
    num_features,
    NUM_ANCHORS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < num_elements
    gate_at = at // per_picture * width + at % width
    kind = tokens.dtype
    total = tl.load(tokens + at, mask=inside, other=0.0).to(tl.float32)
    for feature in range(num_features):
        forecast = tl.zeros((BLOCK,), dtype=tl.float32)
        for index in tl.static_range(NUM_ANCHORS):
            anchor = tl.load(anchors + feature * NUM_ANCHORS + index).to(kind)
            forecast += tl.load(weights + index) * tl.load(anchor + at, mask=inside, other=0.0).to(tl.float32)
        gate = tl.load(gates + feature * batch_width + gate_at, mask=inside, other=0.0).to(tl.float32)
        total += gate * forecast
    tl.store(output + at, total.to(output.dtype.element_ty), mask=inside)


def add_forecasts_in_one_pass(
    tokens: Tensor, gates: Tensor, anchors: Sequence[Sequence[Tensor]], weights: Sequence[float]
) -> Tensor:
    """`forecast.add_forecasts` as one kernel; all anchors are read.

    Args:
        tokens: [B,S,D], contiguous, as all anchors are.
        gates: [F,B,D].
        anchors: per feature as many as there are weights, of the tokens' dtype and device.
        weights: at least one.
    """
    batch, num_tokens, width = tokens.shape
    tokens, gates, output = tokens.contiguous(), gates.contiguous(), torch.empty_like(tokens)
    addresses = torch.tensor([anchor.data_ptr() for kept in anchors for anchor in kept], dtype=torch.int64)
    here = torch.cuda.device(tokens.device) if tokens.is_cuda else nullcontext()
    with here:  # Triton launches on the current device, not on its tensors' device
        _add_forecasts[(triton.cdiv(tokens.numel(), BLOCK),)](
            tokens,
            gates,
            addresses.to(tokens.device, non_blocking=True),
            torch.tensor(weights, dtype=torch.float32).to(tokens.device, non_blocking=True),
            output,
            tokens.numel(),
            num_tokens * width,
            batch * width,
            width,
            len(anchors),
            NUM_ANCHORS=len(weights),
            BLOCK=BLOCK,
        )
    return output
