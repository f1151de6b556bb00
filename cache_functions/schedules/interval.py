"""The paper's schedule: after `first_enhance` full steps, every `fresh_threshold`-th step is full.

Source: TaylorSeer, arXiv 2503.06923 (there N is `fresh_threshold`). `last_enhance` is ours: that many final steps
are full whatever the interval says.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cache_functions.cache_init import CacheConfig

DEFAULT_FRESH_THRESHOLD = 4


def is_full(step: int, full_steps: Sequence[int], num_steps: int, config: "CacheConfig") -> bool:
    """Whether `step` is computed: at the start, at the end, or `fresh_threshold` after the last full step."""
    fresh_threshold = config.fresh_threshold or DEFAULT_FRESH_THRESHOLD
    return (
        step < config.first_enhance
        or step >= num_steps - config.last_enhance
        or step - full_steps[-1] >= fresh_threshold
    )
