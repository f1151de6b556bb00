"""Bases: one file each, found by its name.

A basis is a module in this folder with one function

    weights(anchors: Sequence[int], step: int, max_order: int, **settings) -> list[float]

that gives one weight per anchor, oldest anchor first. Its keyword-only parameters are its settings.
Adding a file here adds the basis everywhere: `--basis` and `CacheConfig(basis=...)` look it up by name.
"""

import importlib
import inspect
import itertools
import pkgutil
import sys
from collections.abc import Sequence
from types import ModuleType


def basis_names() -> list[str]:
    """The names of all bases, sorted."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def basis_settings(name: str) -> list[str]:
    """The names of a basis' own settings.

    Raises:
        ValueError: for an unknown name.
    """
    parameters = inspect.signature(_find(name).weights).parameters.values()
    return [parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY]


def basis_weights(name: str, anchors: Sequence[int], step: int, max_order: int, **settings: object) -> list[float]:
    """Weights of the kept features in the forecast for one step.

    Args:
        name: a basis, one of `basis_names()`.
        anchors: indices of the full steps whose features are kept, strictly increasing, at least one.
        step: index of the step to forecast, not before the newest anchor.
        max_order: highest order of the expansion, >= 0; it is lowered where there are too few anchors.
        settings: the basis' own.

    Returns:
        One float per anchor, oldest first.

    Raises:
        ValueError: for an unknown name or arguments out of their domain.
    """
    basis = _find(name)
    if not anchors or any(later <= earlier for earlier, later in itertools.pairwise(anchors)):
        raise ValueError(f"anchors must be at least one step index, strictly increasing, got {list(anchors)}")
    if step < anchors[-1]:
        raise ValueError(f"step must not lie before the newest anchor {anchors[-1]}, got {step}")
    if max_order < 0:
        raise ValueError(f"max_order must be at least 0, got {max_order}")
    weights: list[float] = basis.weights(anchors, step, max_order, **settings)
    return weights


def _find(name: str) -> ModuleType:
    module = sys.modules.get(f"{__name__}.{name}")  # the folder is not searched again at every forecast step
    if module is None:
        if name not in basis_names():
            raise ValueError(f"basis must be one of {', '.join(basis_names())}, got {name!r}")
        module = importlib.import_module(f"{__name__}.{name}")
    return module
