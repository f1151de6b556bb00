"""Schedules: one file each, found by its name.

A schedule that knows its full steps beforehand is a module in this folder with one function

    plan(num_steps: int, *, ...) -> Sequence[int]

and one that decides on the way has instead

    is_full(step: int, computed: Sequence[int], errors: Sequence[float], num_steps: int, *, ...) -> bool

where `computed` holds the full steps so far, and `errors`, for every one of them after the first, the relative error
that a forecast of it would have had. The keyword-only parameters are the schedule's settings: the fields of
`CacheConfig` that it reads. A schedule that reads `full_steps` promises no more than that many.
"""

import importlib
import inspect
import pkgutil
import sys
from types import ModuleType


def schedule_names() -> list[str]:
    """The names of all schedules, sorted."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def find_schedule(name: str) -> ModuleType:
    """The module of that name.

    Raises:
        ValueError: if there is none.
    """
    module = sys.modules.get(f"{__name__}.{name}")  # the folder is not searched again for every configuration
    if module is None:
        if name not in schedule_names():
            raise ValueError(f"schedule must be one of {', '.join(schedule_names())}, got {name!r}")
        module = importlib.import_module(f"{__name__}.{name}")
    return module


def decides_on_the_way(name: str) -> bool:
    """Whether the schedule looks at the errors of its forecasts."""
    return hasattr(find_schedule(name), "is_full")


def schedule_settings(name: str) -> list[str]:
    """The names of the fields of `CacheConfig` that the schedule reads.

    Raises:
        ValueError: for an unknown name.
    """
    schedule = find_schedule(name)
    function = schedule.is_full if decides_on_the_way(name) else schedule.plan
    parameters = inspect.signature(function).parameters.values()
    return [parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY]
