"""TaylorSeer's recursion in the paper's form: factors are stored, not anchors.

The cache itself stores anchors and uses `taylor_utils.bases.taylor`, which is the same sum written as weights
(a test checks that the two are equal). This form is kept because it is the definition, and for code that builds on it.
Source: TaylorSeer, arXiv 2503.06923, section 3.3.
"""

import math
from collections.abc import Sequence
from typing import TypeVar

from torch import Tensor

Feature = TypeVar("Feature", float, Tensor)


def derivative_approximation(factors: Sequence[Feature], feature: Feature, gap: int, max_order: int) -> list[Feature]:
    """Update the finite differences at a full step.

    Args:
        factors: the differences after the last full step, order 0 first; empty at the first full step.
        feature: the feature just computed, any shape.
        gap: steps since the last full step, > 0. It divides the differences of every order.
        max_order: highest order kept, >= 0.

    Returns:
        The new differences, order 0 (the feature itself) first, at most one order more than before.

    Raises:
        ValueError: if gap or max_order is out of range.
    """
    if gap < 1:
        raise ValueError(f"gap must be at least 1 step, got {gap}")
    if max_order < 0:
        raise ValueError(f"max_order must be at least 0, got {max_order}")
    renewed = [feature]
    for factor in factors[:max_order]:
        renewed.append((renewed[-1] - factor) / gap)
    return renewed


def taylor_formula(factors: Sequence[Feature], distance: int) -> Feature:
    """Forecast the feature `distance` steps after the last full step: sum over i of factor_i distance^i / i!.

    Args:
        factors: differences as `derivative_approximation` returns them, order 0 first, at least one.
        distance: steps since the last full step.

    Raises:
        ValueError: if there are no factors.
    """
    if not factors:
        raise ValueError("a forecast needs at least one factor, got none")
    forecast = factors[0]
    for order, factor in enumerate(factors[1:], start=1):
        forecast = forecast + factor * (distance**order / math.factorial(order))
    return forecast


def difference_weights(anchors: Sequence[int], max_order: int, first_enhance: int = 1) -> list[list[float]]:
    """The recursion's differences after the newest anchor, written as weights of the kept features.

    Published code takes differences only at steps after first_enhance - 2: only those anchors and the one before them
    are used.

    Args:
        anchors: full steps, oldest first, at least one.
        max_order: highest order, >= 0.
        first_enhance: number of leading full steps, >= 1.

    Returns:
        One list per order, order 0 first; each holds one float per anchor, oldest first.
    """
    past_gate = sum(anchor > first_enhance - 2 for anchor in anchors)
    counted = anchors[-min(past_gate, max_order) - 1 :]
    by_anchor = []
    for unit in range(len(counted)):
        factors: list[float] = []
        gap = 1
        for index, anchor in enumerate(counted):
            if index:
                gap = anchor - counted[index - 1]
            factors = derivative_approximation(factors, float(index == unit), gap, max_order)
        by_anchor.append(factors)
    unread = [0.0] * (len(anchors) - len(counted))
    return [unread + list(weights) for weights in zip(*by_anchor, strict=True)]
