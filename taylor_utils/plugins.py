"""Finds rules by name: among the files of a folder, and among packages' entry points of the folder's name.

A rule may be given as a function instead of a name; then nothing is searched.
"""

import functools
import importlib
import inspect
import pkgutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any


@dataclass(frozen=True)
class Plugins:
    """The rules of one kind.

    Attributes:
        package: dotted name of the folder's package, and the group of the entry points.
        kind: name of such a rule in error messages.
    """

    package: str
    kind: str

    def names(self) -> list[str]:
        """The names of all rules, sorted."""
        return sorted({*self._files(), *entry_points(group=self.package).names})

    def find(self, name: str, also: tuple[str, ...] = ()) -> Any:
        """The module of that name, or the object that an entry point of that name loads.

        Args:
            also: further names to list in the error message.

        Raises:
            ValueError: if there is no rule of that name.
        """
        module = sys.modules.get(f"{self.package}.{name}")  # the folder is not searched again at every step
        return module if module is not None else _load(self, name, also)

    def _files(self) -> list[str]:
        return [module.name for module in pkgutil.iter_modules(sys.modules[self.package].__path__)]


def rule_name(rule: object) -> str:
    """A rule's name; for a function "module:name". Nothing is ever imported by such a name."""
    return rule if isinstance(rule, str) else f"{_named(rule, '__module__')}:{_named(rule, '__qualname__')}"


def keyword_settings(function: Callable[..., Any]) -> list[str]:
    """The names of a rule's settings: its keyword-only parameters."""
    parameters = inspect.signature(function).parameters.values()
    return [parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY]


@functools.lru_cache(maxsize=64)
def _load(plugins: Plugins, name: str, also: tuple[str, ...]) -> Any:
    if name in plugins._files():
        return importlib.import_module(f"{plugins.package}.{name}")
    announced = entry_points(group=plugins.package, name=name)
    if announced:
        return next(iter(announced)).load()
    if ":" in name:
        raise ValueError(
            f"{plugins.kind} {name!r} names a function of a program, which cannot be found by name: pass the"
            " function from Python, or provide it as an entry point"
        )
    raise ValueError(f"{plugins.kind} must be one of {', '.join([*plugins.names(), *also])}, got {name!r}")


def _named(rule: object, attribute: str) -> str:
    return str(getattr(rule, attribute, None) or getattr(type(rule), attribute))
