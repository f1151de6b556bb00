"""HiCache's expansion (arXiv 2508.16984): TaylorSeer's differences times scaled Hermite polynomials.

At order 1 a sigma of sqrt(1/2) gives TaylorSeer's expansion, and a smaller sigma damps its slope. At order 2 the
polynomial has an offset at the anchor itself.
"""

import math
from collections.abc import Sequence

from taylor_utils.derivatives import difference_weights


def weights(
    anchors: Sequence[int], step: int, max_order: int, *, first_enhance: int = 1, sigma: float = 0.5
) -> list[float]:
    """One weight per anchor, oldest first: the sum over i of sigma^i H_i(sigma k) / i! times difference i.

    Args:
        first_enhance: number of leading full steps; anchors before them take part in no difference.
        sigma: factor of the paper's dual scaling.
    """
    x = sigma * (step - anchors[-1])
    result = [0.0] * len(anchors)
    polynomial, lower = 1.0, 0.0
    for order, difference in enumerate(difference_weights(anchors, max_order, first_enhance)):
        factor = sigma**order * polynomial / math.factorial(order)
        result = [total + factor * weight for total, weight in zip(result, difference, strict=True)]
        polynomial, lower = 2 * x * polynomial - 2 * order * lower, polynomial  # physicists' recurrence
    return result
