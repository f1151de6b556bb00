"""TaylorSeer's expansion (arXiv 2503.06923, section 3.3) as weights of the anchors.

The published recursion divides the differences of every order by the last gap; it is linear in the features, so
running it on unit vectors gives each anchor's weight. Orders 0 and 1 are exact for any gaps (constant and linear
features); order 2 and higher are not even for equal ones, because the differences are backward differences.
"""

from collections.abc import Sequence

from taylor_utils.derivatives import derivative_approximation, taylor_formula


def weights(anchors: Sequence[int], step: int, max_order: int, *, first_enhance: int = 1) -> list[float]:
    """One weight per anchor, oldest first.

    Args:
        first_enhance: number of leading full steps. Published code takes differences only at steps after
            first_enhance - 2: what counts is those anchors and the one before them.
    """
    past_gate = sum(anchor > first_enhance - 2 for anchor in anchors)
    counted = anchors[-min(past_gate, max_order) - 1 :]
    result = [0.0] * (len(anchors) - len(counted))
    for unit in range(len(counted)):
        factors: list[float] = []
        gap = 1
        for index, anchor in enumerate(counted):
            if index:
                gap = anchor - counted[index - 1]
            factors = derivative_approximation(factors, float(index == unit), gap, max_order)
        result.append(taylor_formula(factors, step - counted[-1]))
    return result
