"""Full steps where the forecasts need them, at most `full_steps`, as an ODE solver controls its step size.

At a full step the error that a forecast of it would have had costs nothing to measure. If the error grows as the gap to
the power p = order + 1, the usual error so far would come from the gap (usual / error)^(1/p) (E. Hairer, S. P. Norsett
and G. Wanner, Solving Ordinary Differential Equations I, section II.4). Here this ratio scales the even gap that the
remaining budget allows, within a factor of two.
"""

import itertools
import statistics
from collections.abc import Sequence

WIDEST = 2.0


def is_full(
    step: int, computed: Sequence[int], errors: Sequence[float], num_steps: int, *, full_steps: int, max_order: int = 1
) -> bool:
    """Whether `step` is computed."""
    left = full_steps - len(computed)
    if left <= 0:
        return False
    even_gap = (num_steps - computed[-1]) / (left + 1)
    return step - computed[-1] >= max(1, round(even_gap * gap_factor(computed, errors, max_order)))


def gap_factor(full_steps: Sequence[int], errors: Sequence[float], max_order: int) -> float:
    """How much wider than an even one the next gap may be, 1/2 to 2.

    Args:
        full_steps: the full steps so far.
        errors: errors of the forecasts at all of these but the first.
        max_order: order of the forecasts.
    """
    if not errors:
        return 1.0
    power = max_order + 1
    gaps = [later - earlier for earlier, later in itertools.pairwise(full_steps)]
    densities = [max(error, 1e-12) / gap**power for error, gap in zip(errors, gaps, strict=True)]
    factor = (statistics.median(densities) / densities[-1]) ** (1 / power)
    return float(min(max(factor, 1 / WIDEST), WIDEST))
