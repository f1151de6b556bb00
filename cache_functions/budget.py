"""The budget: how many steps are full."""

import math
from collections.abc import Callable

STEPS_PER_FULL_STEP = 4


def default_full_steps(num_steps: int) -> int:
    """One step in four, rounded up: 13 of 50."""
    return full_steps_for(STEPS_PER_FULL_STEP, num_steps)


def full_steps_for(speedup: float, num_steps: int) -> int:
    """The budget whose ceiling is `speedup`: num_steps / speedup, rounded up.

    Args:
        speedup: >= 1; what the denoising loop would gain if forecast steps cost nothing.
        num_steps: steps of the generation, >= 1.

    Raises:
        ValueError: if speedup is below 1 or no number.
    """
    if not 1 <= speedup < math.inf:
        raise ValueError(f"speedup must be a number of at least 1, got {speedup!r}")
    return max(1, math.ceil(num_steps / speedup))


def interval_for(full_steps: int, num_steps: int, count: Callable[[int], int]) -> int:
    """The interval that makes exactly `full_steps` full steps.

    Args:
        full_steps: the budget.
        num_steps: steps of the generation.
        count: interval -> the number of full steps it makes; it falls as the interval grows.

    Raises:
        ValueError: if there is none, naming the nearest budget that an interval makes.
    """
    made = {count(interval): interval for interval in range(num_steps, 0, -1)}
    if full_steps not in made:
        nearest = min(made, key=lambda number: (abs(number - full_steps), number))
        raise ValueError(
            f"full_steps {full_steps} of {num_steps} cannot be made by schedule interval; the nearest is {nearest}"
            f" (fresh_threshold {made[nearest]}). Schedules cosine, power and mask make any"
        )
    return made[full_steps]
