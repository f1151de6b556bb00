"""Full steps dense at both ends: at (S - 1) (1 - cos(pi j / (K - 1))) / 2 for j = 0 .. K - 1, made distinct.

S is the number of steps and K `full_steps`.
"""

import math
from collections.abc import Sequence


def plan(num_steps: int, *, full_steps: int) -> list[int]:
    """Exactly K full steps."""
    shares = [(1 - math.cos(math.pi * j / max(full_steps - 1, 1))) / 2 for j in range(full_steps)]
    return distinct_steps(shares, num_steps)


def distinct_steps(shares: Sequence[float], num_steps: int) -> list[int]:
    """Distinct steps at these shares (0..1, not falling) of the way from step 0 to the last step."""
    steps = [round((num_steps - 1) * share) for share in shares]
    for j in range(1, len(steps)):
        steps[j] = max(steps[j], steps[j - 1] + 1)
    return [min(step, num_steps - len(steps) + j) for j, step in enumerate(steps)]
