"""Full steps along a power curve: at (S - 1) (j / (K - 1))^exponent for j = 0 .. K - 1, made distinct.

S is the number of steps and K `full_steps`. An `exponent` above 1 makes them dense at the start, below 1 at the end.
"""

from typing import TYPE_CHECKING

from cache_functions.schedules.cosine import distinct_steps

if TYPE_CHECKING:
    from cache_functions.cache_init import CacheConfig

SETTINGS = ("full_steps", "exponent")


def plan(num_steps: int, config: "CacheConfig") -> list[int]:
    """Exactly K full steps."""
    count = config.full_steps or 1
    return distinct_steps([(j / max(count - 1, 1)) ** config.exponent for j in range(count)], num_steps)
