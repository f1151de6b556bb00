"""Full steps along a power curve: at (S - 1) (j / (K - 1))^exponent for j = 0 .. K - 1, made distinct.

S is the number of steps and K `full_steps`. An `exponent` above 1 makes them dense at the start, below 1 at the end.
"""

from cache_functions.schedules.cosine import distinct_steps


def plan(num_steps: int, *, full_steps: int, exponent: float = 2.0) -> list[int]:
    """Exactly K full steps."""
    return distinct_steps([(j / max(full_steps - 1, 1)) ** exponent for j in range(full_steps)], num_steps)
