"""An explicit list of full steps: the user's own, or a calibration's optimum for `full_steps`."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cache_functions.cache_init import CacheConfig

SETTINGS = ("full_steps", "mask")


def plan(num_steps: int, config: "CacheConfig") -> Sequence[int]:
    """The list."""
    if config.mask is None:
        raise ValueError("schedule mask needs its list of full steps: give mask, or a calibration")
    return config.mask
