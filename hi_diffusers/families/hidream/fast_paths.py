"""Faster ways to compute the same, each of which can be turned off to see what it is worth."""

from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class FastPaths:
    """Which of them are taken. None is taken where gradients are wanted; docs/performance.md tells what each is worth.

    Attributes:
        rotation: queries and keys are turned in place, as complex numbers, instead of being split, put together and
            joined with the text's.
        fewer_passes: a product that is added to something is one pass over memory, and one that nobody else reads is
            written over a factor.
        one_forecast: the forecasts of all blocks are one sum over all anchors (target module).
    """

    rotation: bool = True
    fewer_passes: bool = True
    one_forecast: bool = True

    @classmethod
    def none(cls) -> "FastPaths":
        """Everything in its plain form."""
        return cls(rotation=False, fewer_passes=False, one_forecast=False)


class HasFastPaths:
    """A part of a model that has faster ways; mixed into its class."""

    fast_paths = FastPaths()

    def takes(self, name: str) -> bool:
        """Whether a faster way is taken: it writes into its inputs, which autograd could not follow."""
        return getattr(self.fast_paths, name) and not torch.is_grad_enabled()


def set_fast_paths(model: nn.Module, paths: FastPaths) -> None:
    """Choose for a model and all its parts."""
    for module in model.modules():
        if isinstance(module, HasFastPaths):
            module.fast_paths = paths
