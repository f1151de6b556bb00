"""Schedules: one file each, found by its name.

A schedule is a module in this folder with one function

    is_full(step: int, full_steps: Sequence[int], num_steps: int, config: CacheConfig) -> bool

that says whether `step` is computed, given the full steps before it, at least one: while nothing is kept a step is
full, and the schedule is not asked.
"""

import importlib
import pkgutil
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cache_functions.cache_init import CacheConfig


def schedule_names() -> list[str]:
    """The names of all schedules, sorted."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def is_full_step(step: int, full_steps: Sequence[int], num_steps: int, config: "CacheConfig") -> bool:
    """Ask the configured schedule whether `step` is computed.

    Args:
        step: index of the step in question.
        full_steps: indices of the full steps before it.
        num_steps: steps of the generation.
        config: a resolved configuration.
    """
    if not full_steps:
        return True
    module = importlib.import_module(f"{__name__}.{config.schedule}")
    return bool(module.is_full(step, full_steps, num_steps, config))


def planned_full_steps(config: "CacheConfig", num_steps: int) -> list[int]:
    """The full steps that a configuration will execute over `num_steps` steps; all of them if it is off."""
    if config.is_off:
        return list(range(num_steps))
    full_steps: list[int] = []
    for step in range(num_steps):
        if is_full_step(step, full_steps, num_steps, config):
            full_steps.append(step)
    return full_steps
