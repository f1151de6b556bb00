"""The budget: how many steps are full."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from cache_functions.config import CacheConfig
from cache_functions.schedules import Schedule, decides_on_the_way, find_schedule, schedule_settings
from cache_functions.schedules.interval import DEFAULT_FRESH_THRESHOLD
from taylor_utils.plugins import rule_name

STEPS_PER_FULL_STEP = 4


def default_full_steps(num_steps: int) -> int:
    """One step in four, rounded up: 13 of 50."""
    return full_steps_for(STEPS_PER_FULL_STEP, num_steps)


def full_steps_for(speedup: float, num_steps: int) -> int:
    """The budget for a speedup: num_steps / speedup, rounded up.

    Args:
        speedup: >= 1; speedup of the denoising loop if forecast steps cost nothing.
        num_steps: steps of the generation, >= 1.

    Raises:
        ValueError: if speedup is below 1 or not a finite number.
    """
    if not 1 <= speedup < math.inf:
        raise ValueError(f"speedup must be a number of at least 1, got {speedup!r}")
    return max(1, math.ceil(num_steps / speedup))


def interval_for(full_steps: int, num_steps: int, count: Callable[[int], int]) -> int:
    """The interval that makes exactly `full_steps` full steps.

    Args:
        full_steps: the budget.
        num_steps: steps of the generation.
        count: interval -> its number of full steps, which falls as the interval grows.

    Raises:
        ValueError: if no interval does, naming the nearest budget that an interval makes.
    """
    made = {count(interval): interval for interval in range(num_steps, 0, -1)}
    if full_steps not in made:
        nearest = min(made, key=lambda number: (abs(number - full_steps), number))
        raise ValueError(
            f"full_steps {full_steps} of {num_steps} cannot be made by schedule interval; the nearest is {nearest}"
            f" (fresh_threshold {made[nearest]}). Schedules cosine, power and mask can make any budget"
        )
    return made[full_steps]


def settle(config: CacheConfig, num_steps: int) -> CacheConfig:
    """Fill in an open budget: fresh_threshold where the schedule reads one, full_steps elsewhere.

    Args:
        num_steps: steps of the generation, >= 1.

    Raises:
        ValueError: if the budget cannot be kept in that many steps.
    """
    if config.is_off:
        return config
    if config.full_steps is not None and config.full_steps > num_steps:
        raise ValueError(f"full_steps must be at most num_steps {num_steps}, got {config.full_steps}")
    settings = schedule_settings(config.schedule)
    if "fresh_threshold" in settings and "full_steps" not in settings:
        return replace(config, fresh_threshold=_threshold(config, num_steps), full_steps=None)
    if config.mask is not None:
        if config.mask[-1] >= num_steps:
            raise ValueError(f"mask must hold steps below {num_steps}, got {config.mask[-1]}")
        return replace(config, full_steps=len(config.mask))
    if "full_steps" in settings:
        return replace(config, full_steps=config.full_steps or default_full_steps(num_steps))
    return config


def planned_full_steps(config: CacheConfig, num_steps: int) -> list[int]:
    """The full steps of a configuration over `num_steps` steps; all steps if the cache is off.

    Raises:
        ValueError: if the schedule cannot make its budget in that many steps, or decides during the generation.
    """
    if config.is_off:
        return list(range(num_steps))
    if decides_on_the_way(config.schedule):
        raise ValueError(
            f"schedule {rule_name(config.schedule)} decides during the generation, so its full steps cannot be planned"
        )
    return _plan(config.schedule, num_steps, given_settings(settle(config, num_steps)))


def given_settings(config: CacheConfig) -> dict[str, Any]:
    """The schedule's settings in the configuration, without those that are None."""
    return config.values(schedule_settings(config.schedule))


def _plan(schedule: Schedule, num_steps: int, settings: dict[str, Any]) -> list[int]:
    plan: Sequence[int] = find_schedule(schedule).plan(num_steps, **settings)
    return sorted({0, *plan})


def _threshold(config: CacheConfig, num_steps: int) -> int:
    if config.full_steps is None:
        return config.fresh_threshold or DEFAULT_FRESH_THRESHOLD
    settings = given_settings(config)

    def count(interval: int) -> int:
        return len(_plan(config.schedule, num_steps, settings | {"fresh_threshold": interval}))

    return interval_for(config.full_steps, num_steps, count)
