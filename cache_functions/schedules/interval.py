"""The paper's schedule: after `first_enhance` full steps, every `fresh_threshold`-th step is full.

Source: TaylorSeer, arXiv 2503.06923 (there N is `fresh_threshold`). `last_enhance` is ours: that many final steps
are full whatever the interval says.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cache_functions.cache_init import CacheConfig

SETTINGS = ("fresh_threshold", "full_steps", "first_enhance", "last_enhance")
DEFAULT_FRESH_THRESHOLD = 4


def plan(num_steps: int, config: "CacheConfig") -> list[int]:
    """The full steps: at the start, at the end, and `fresh_threshold` after the last one."""
    fresh_threshold = config.fresh_threshold or DEFAULT_FRESH_THRESHOLD
    full_steps = [0]
    for step in range(1, num_steps):
        enhanced = step < config.first_enhance or step >= num_steps - config.last_enhance
        if enhanced or step - full_steps[-1] >= fresh_threshold:
            full_steps.append(step)
    return full_steps
