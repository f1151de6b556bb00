"""Schedules: one file each, found by its name.

A schedule that knows its full steps beforehand is a module in this folder with one function

    plan(num_steps: int, *, ...) -> Sequence[int]

A schedule that decides during the generation has instead

    is_full(step: int, computed: Sequence[int], errors: Sequence[float], num_steps: int, *, ...) -> bool

where `computed` holds the full steps so far, and `errors`, for every one of them after the first, the relative error
that a forecast of it would have had. The keyword-only parameters are the schedule's settings: the fields of
`CacheConfig` that it reads, and its own, which `CacheConfig.extras` holds. A schedule that reads `full_steps` must not
exceed that number. A package can provide a schedule instead, as an entry point of the group
"cache_functions.schedules": a module like these, or its function `plan`. A function `plan` can
also be given wherever a name is accepted.
"""

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

from taylor_utils.plugins import Plugins, keyword_settings

Schedule = str | Callable[..., Sequence[int]]
SCHEDULES = Plugins("cache_functions.schedules", "schedule")


def schedule_names() -> list[str]:
    """The names of all schedules, sorted."""
    return SCHEDULES.names()


def find_schedule(schedule: Schedule) -> Any:
    """The object that has a schedule's function `plan` or `is_full`.

    Args:
        schedule: one of `schedule_names()`, or a function like their `plan`.

    Raises:
        ValueError: for an unknown name.
    """
    found = SCHEDULES.find(schedule) if isinstance(schedule, str) else schedule
    return SimpleNamespace(plan=found) if callable(found) else found


def decides_on_the_way(schedule: Schedule) -> bool:
    """Whether the schedule decides during the generation, from the errors of its forecasts."""
    return hasattr(find_schedule(schedule), "is_full")


def schedule_settings(schedule: Schedule) -> list[str]:
    """The names of the settings that a schedule reads.

    Raises:
        ValueError: for an unknown name.
    """
    found = find_schedule(schedule)
    return keyword_settings(found.is_full if decides_on_the_way(schedule) else found.plan)
