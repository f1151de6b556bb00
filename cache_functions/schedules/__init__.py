"""Schedules: one file each, found by its name.

A schedule that knows its full steps beforehand is a module in this folder with one function

    plan(num_steps: int, config: CacheConfig) -> Sequence[int]

and one that decides on the way has instead

    is_full(step: int, full_steps: Sequence[int], errors: Sequence[float], num_steps: int, config: CacheConfig) -> bool

where `errors` holds, for every full step after the first, the relative error that a forecast of it would have had.
`SETTINGS` names the fields of `CacheConfig` that the schedule reads; given others are refused. Without it all are
taken. A schedule that reads `full_steps` promises no more than that many.
"""

import importlib
import pkgutil
from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cache_functions.cache_init import CacheConfig


def schedule_names() -> list[str]:
    """The names of all schedules, sorted."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def find_schedule(name: str) -> ModuleType:
    """The module of that name.

    Raises:
        ValueError: if there is none.
    """
    if name not in schedule_names():
        raise ValueError(f"schedule must be one of {', '.join(schedule_names())}, got {name!r}")
    return importlib.import_module(f"{__name__}.{name}")


def decides_on_the_way(name: str) -> bool:
    """Whether the schedule looks at the errors of its forecasts."""
    return hasattr(find_schedule(name), "is_full")


def schedule_settings(name: str) -> tuple[str, ...] | None:
    """The fields of `CacheConfig` that the schedule says it reads; None if it does not say."""
    return getattr(find_schedule(name), "SETTINGS", None)


def planned_full_steps(config: "CacheConfig", num_steps: int) -> list[int]:
    """The full steps that a configuration will execute over `num_steps` steps; all of them if it is off.

    Raises:
        ValueError: if the schedule cannot make its budget in that many steps, or decides on the way.
    """
    if config.is_off:
        return list(range(num_steps))
    config = config.settle(num_steps)
    if decides_on_the_way(config.schedule):
        raise ValueError(f"schedule {config.schedule} decides on the way, so its full steps cannot be planned")
    plan: Sequence[int] = find_schedule(config.schedule).plan(num_steps, config)
    return sorted({0, *plan})
