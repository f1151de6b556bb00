"""Stands in the way of an object's methods by giving the object a subclass of its own class.

Wrapping the method on the object, or diffusers' hooks, would be lost in silence: offloading takes its own hooks off and
on, and with them whatever was put around them; and a copy of the object would carry the wrapper along. A subclass stays
outermost, torch.compile sees one class for all sessions, and signatures and isinstance hold.
"""

import copyreg
import functools
from collections.abc import Callable
from typing import Any

LINK, BASE = "_forecast_link", "_forecast_base"


class Link:
    """Leads from a watched object to its session; a copy of the object is not watched."""

    def __init__(self, session: Any = None):
        self.session = session

    def __deepcopy__(self, memo: Any) -> "Link":
        return Link()

    def __reduce__(self) -> Any:
        return Link, ()


def watch(watched: Any, session: Any, methods: dict[str, Callable[..., Any]]) -> None:
    """Let a session stand in the way of an object's methods.

    Args:
        methods: name of a method -> function (session, original method, object, *args, **kwargs).

    Raises:
        ValueError: if the object is watched already.
    """
    if is_watched(watched):
        raise ValueError(f"this {type(watched).__name__} is forecast already: leave the other context first")
    base = _base(watched)  # a copy that was made while the original was watched still has its class
    present = tuple((name, function) for name, function in methods.items() if hasattr(base, name))
    watched.__dict__[LINK] = Link(session)
    watched.__class__ = _subclass(base, present)


def unwatch(watched: Any, session: Any) -> None:
    """Undo `watch`, if it was this session's."""
    if is_watched(watched) and watched.__dict__[LINK].session is session:
        watched.__class__ = _base(watched)
        del watched.__dict__[LINK]


def is_watched(watched: Any) -> bool:
    """Whether a session stands in the way of an object's methods."""
    return LINK in watched.__dict__ and watched.__dict__[LINK].session is not None


def _base(watched: Any) -> type:
    base: type = type(watched).__dict__.get(BASE, type(watched))
    return base


@functools.lru_cache(maxsize=256)
def _subclass(base: type, methods: tuple[tuple[str, Callable[..., Any]], ...]) -> type:
    """The subclass of a class; one for all sessions."""

    def around(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        original = getattr(base, name)

        @functools.wraps(original)
        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            session = self.__dict__[LINK].session if LINK in self.__dict__ else None
            if session is None:
                return original(self, *args, **kwargs)
            return function(session, original, self, *args, **kwargs)

        return method

    reduced: Any = base.__reduce_ex__

    def reduce(self: Any, protocol: Any) -> Any:
        """A copy or a pickle is of the base class, and not watched."""
        function, arguments, state, *rest = reduced(self, protocol)
        state = {name: value for name, value in state.items() if name != LINK} if isinstance(state, dict) else state
        if function is copyreg.__newobj__:  # type: ignore[attr-defined]
            function, arguments = _new, (base, *arguments[1:])
        return (function, arguments, state, *rest)

    members: dict[str, Any] = {name: around(name, function) for name, function in methods}
    members["__reduce_ex__"] = reduce
    if hasattr(base, "from_config"):
        members["from_config"] = classmethod(lambda cls, *args, **kwargs: base.from_config(*args, **kwargs))
    found = type(base.__name__, (base,), members | {BASE: base})
    found.__module__, found.__qualname__ = base.__module__, base.__qualname__
    return found


def _new(base: type, *args: Any) -> Any:
    return base.__new__(base, *args)
