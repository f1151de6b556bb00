"""The cache for any pipeline of diffusers, from outside.

with forecast(pipe, CacheConfig(full_steps=13)) as session:
    picture = pipe("a prompt").images[0]
print(session.trace)

The names below are imported when they are first used: what only reads a scheduler need not wait for diffusers.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # names that a type checker can follow
    from forecasting.context import forecast as forecast
    from forecasting.corrector import Corrector as Corrector
    from forecasting.generation import StepSeen as StepSeen
    from forecasting.levels import Levels as Levels
    from forecasting.session import Session as Session

_HOMES = {
    "Corrector": "forecasting.corrector",
    "Levels": "forecasting.levels",
    "Session": "forecasting.session",
    "StepSeen": "forecasting.generation",
    "forecast": "forecasting.context",
}
__all__ = [*_HOMES]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
