"""Stops long work between two of its parts."""

import signal
from typing import Any

from hi_diffusers.console import say


class Stopping:
    """Ctrl-C or SIGTERM stops after the running unit; a second one stops at once."""

    def __init__(self) -> None:
        self.asked = False
        self.before: dict[int, Any] = {}

    def __enter__(self) -> "Stopping":
        self.before = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _ask(self, *_: object) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        say("finishing the running batch; press Ctrl-C again to stop at once")
