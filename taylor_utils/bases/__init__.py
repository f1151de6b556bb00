"""Bases: one file each, found by its name.

A basis is a module in this folder with one function

    weights(anchors: Sequence[int], step: int, max_order: int, **settings) -> list[float]

that gives one weight per anchor, oldest anchor first. Its keyword-only parameters are its settings.
Adding a file here adds the basis everywhere: `--basis` and `CacheConfig(basis=...)` look it up by name. A package can
provide one instead, as an entry point of the group "taylor_utils.bases": a module like these, or the function itself.
The function can also be given wherever a name is accepted.
"""

import itertools
from collections.abc import Callable, Sequence

from taylor_utils.plugins import Plugins, keyword_settings

Basis = str | Callable[..., Sequence[float]]
BASES = Plugins("taylor_utils.bases", "basis")


def basis_names() -> list[str]:
    """The names of all bases, sorted."""
    return BASES.names()


def basis_settings(basis: Basis) -> list[str]:
    """The names of a basis' own settings.

    Raises:
        ValueError: for an unknown name.
    """
    return keyword_settings(_weights(basis))


def basis_weights(basis: Basis, anchors: Sequence[int], step: int, max_order: int, **settings: object) -> list[float]:
    """Weights of the kept features in the forecast for one step.

    Args:
        basis: one of `basis_names()`, or a function like theirs.
        anchors: indices of the full steps whose features are kept, strictly increasing, at least one.
        step: index of the step to forecast, not before the newest anchor.
        max_order: highest order of the expansion, >= 0; it is lowered if there are too few anchors.
        settings: the basis' own settings.

    Returns:
        One float per anchor, oldest first.

    Raises:
        ValueError: for an unknown name or arguments out of range.
    """
    function = _weights(basis)
    if not anchors or any(later <= earlier for earlier, later in itertools.pairwise(anchors)):
        raise ValueError(f"anchors must be at least one step index, strictly increasing, got {list(anchors)}")
    if step < anchors[-1]:
        raise ValueError(f"step must not lie before the newest anchor {anchors[-1]}, got {step}")
    if max_order < 0:
        raise ValueError(f"max_order must be at least 0, got {max_order}")
    return list(function(anchors, step, max_order, **settings))


def _weights(basis: Basis) -> Callable[..., Sequence[float]]:
    if not isinstance(basis, str):
        return basis
    found = BASES.find(basis)
    weights: Callable[..., Sequence[float]] = found if callable(found) else found.weights
    return weights
