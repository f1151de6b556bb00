"""TaylorSeer's expansion (arXiv 2503.06923, section 3.3) as weights of the anchors.

The published recursion divides the differences of every order by the last gap. Orders 0 and 1 are exact for any gaps
(constant and linear features); order 2 and higher are not even for equal ones, because the differences are backward
differences.
"""

import math
from collections.abc import Sequence

from taylor_utils.derivatives import difference_weights


def weights(
    anchors: Sequence[int], step: int, max_order: int, *, first_enhance: int = 1, sigma: float = 1.0
) -> list[float]:
    """One weight per anchor, oldest first: the sum over i of (sigma^2 k)^i / i! times difference i.

    Args:
        first_enhance: number of leading full steps; anchors before them take part in no difference.
        sigma: HiCache's dual scaling (arXiv 2508.16984) without its polynomials: below 1 it damps order i by
            sigma^(2i). 1 is the paper.
    """
    scaled = sigma * sigma * (step - anchors[-1])
    result = [0.0] * len(anchors)
    for order, difference in enumerate(difference_weights(anchors, max_order, first_enhance)):
        factor = scaled**order / math.factorial(order)
        result = [total + factor * weight for total, weight in zip(result, difference, strict=True)]
    return result
