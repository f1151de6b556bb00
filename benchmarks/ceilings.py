"""What the machine could do at most: matrix products and copies, measured in the run that refers to them."""

from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.sizes import Subject
from benchmarks.speed import take_seconds
from hi_diffusers.families.hidream.moe import MoEFeedForward

MATRIX_SIDE = {"cpu": 2048, "cuda": 8192}
COPIED_BYTES = {"cpu": 2**28, "cuda": 2**31}
REPEATS = 15


@dataclass(frozen=True)
class Ceilings:
    """The best of several tries.

    Attributes:
        flops: floating-point operations a second, of a large square matrix product.
        bytes: a second, read and written by a large copy.
    """

    flops: float
    bytes: float


def measure_ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """Of a device and dtype."""
    side, size = MATRIX_SIDE[device.type], COPIED_BYTES[device.type] // dtype.itemsize
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    source, target = (torch.zeros(size, device=device, dtype=dtype) for _ in range(2))
    product = min(take_seconds(lambda: torch.mm(a, b), device) for _ in range(REPEATS))
    copy = min(take_seconds(lambda: target.copy_(source), device) for _ in range(REPEATS))
    return Ceilings(2 * side**3 / product, 2 * size * dtype.itemsize / copy)


@torch.no_grad()
def forward_flops(subject: Subject) -> int:
    """Of one guided evaluation by our class: all matrix products, counted, and attention, by its formula."""
    ours = subject.transformers.ours
    feed_forwards = [module for module in ours.modules() if isinstance(module, MoEFeedForward)]
    for one in feed_forwards:  # grouped products are not counted, single ones are
        one.stack_experts(allowed=False)
    with FlopCounterMode(display=False) as counter:
        subject.call_ours()
    for one in feed_forwards:
        one.stack_experts()
    products = sum(n for name, n in counter.get_flop_counts()["Global"].items() if "mm" in str(name))
    image, text, config = subject.size.num_image_tokens, subject.size.num_text_tokens, ours.config
    keys, blocks = image + 3 * text, config.num_layers + config.num_single_layers
    queries = (blocks - 1) * (image + 2 * text) + image  # of the last block the image's alone are read
    return int(products) + 2 * 4 * queries * keys * ours.inner_dim
