"""The parts of a denoiser's blocks that target module forecasts, found by their names."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from cache_functions import FeatureName

# Names in diffusers' blocks: what is forecast, and what nobody reads when it is. Joint attention returns (image, text).
FORECAST = ("attn", "attn1", "attn2", "attention", "ff", "ff_i", "ffn", "feed_forward", "img_mlp", "proj_out")
NEEDLESS = ("ff_context", "ff_t", "txt_mlp")
# Blocks that compute attention and feed-forward side by side and join them in proj_out, e.g. FLUX's single blocks.
JOINED, NEEDLESS_IF_JOINED = "proj_out", ("attn", "proj_mlp")


@dataclass(frozen=True)
class Part:
    """A module of a block.

    Attributes:
        module: the module.
        layer: number of its block over all stacks.
        name: its name in the block.
        is_forecast: whether its result is forecast; else it is only left out on forecast steps.
    """

    module: nn.Module
    layer: int
    name: str
    is_forecast: bool

    def feature(self, place: int = 0) -> FeatureName:
        """The name of one of its results."""
        return FeatureName("module", self.layer, self.name, place)


def parts(denoiser: Any) -> Iterator[Part]:
    """The parts of a denoiser: those of all blocks in module lists that are its children.

    Raises:
        ValueError: if a feed-forward is computed in chunks.
    """
    network, layer = getattr(denoiser, "_orig_mod", denoiser), 0
    for stack in network.children():
        if not isinstance(stack, nn.ModuleList):
            continue
        for block in stack:
            block = getattr(block, "_orig_mod", block)
            block = getattr(block, "block", block)
            if getattr(block, "_chunk_size", None) is not None:
                raise ValueError("target module needs whole feed-forwards: undo set_chunk_feed_forward")
            yield from _of_block(block, layer)
            layer += 1


def _of_block(block: nn.Module, layer: int) -> Iterator[Part]:
    children = dict(block.named_children())
    is_joined = JOINED in children and set(NEEDLESS_IF_JOINED) & set(children)
    for name, module in children.items():
        if is_joined and name != JOINED:
            if name in NEEDLESS_IF_JOINED:
                yield Part(module, layer, name, is_forecast=False)
        elif name in FORECAST and (name != JOINED or is_joined):
            yield Part(module, layer, name, is_forecast=True)
        elif name in NEEDLESS:
            yield Part(module, layer, name, is_forecast=False)
