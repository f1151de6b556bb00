"""Faster ways to compute the same result; each can be turned off to measure its gain."""

from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class FastPaths:
    """The fast paths that are used; none is used with gradients. docs/performance.md has the gain of each.

    Attributes:
        rotation: rotate queries and keys in place, as complex numbers, instead of splitting them, stacking the parts
            and joining them with the text's.
        fewer_passes: multiply and add in one pass over memory, and write a product over a factor that is not needed
            any more.
        one_forecast: compute the forecasts of all blocks as one sum over all anchors (target module).
    """

    rotation: bool = True
    fewer_passes: bool = True
    one_forecast: bool = True

    @classmethod
    def none(cls) -> "FastPaths":
        """No fast path."""
        return cls(rotation=False, fewer_passes=False, one_forecast=False)


class HasFastPaths:
    """Mixin for a part of a model that has fast paths."""

    fast_paths = FastPaths()

    def takes(self, name: str) -> bool:
        """Whether a fast path is used; with gradients none is, since it writes into its inputs."""
        return getattr(self.fast_paths, name) and not torch.is_grad_enabled()


def set_fast_paths(model: nn.Module, paths: FastPaths) -> None:
    """Choose the fast paths of a model and all its parts."""
    for module in model.modules():
        if isinstance(module, HasFastPaths):
            module.fast_paths = paths
