"""Slows down whoever guesses passwords."""

import time
from collections import OrderedDict
from collections.abc import Callable

from hi_diffusers.console import say

FREE_GUESSES = 3
LONGEST_SECONDS = 60.0
NUM_VISITORS = 10_000


class Guesses:
    """Counts failed logins by visitor: after a few, each next one must wait twice as long.

    Args:
        clock: seconds that only grow.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._failed: OrderedDict[str, tuple[int, float]] = OrderedDict()  # visitor -> failures, end of the wait

    def seconds_to_wait(self, visitor: str) -> float:
        """Seconds until a visitor may try again; 0 is now."""
        return max(0.0, self._failed.get(visitor, (0, 0.0))[1] - self._clock())

    def note(self, visitor: str, succeeded: bool) -> None:
        """Note how a login ended."""
        failures, _ = self._failed.pop(visitor, (0, 0.0))
        if succeeded:
            return
        failures += 1
        wait = min(LONGEST_SECONDS, 2.0 ** min(failures - FREE_GUESSES, 10)) if failures >= FREE_GUESSES else 0.0
        self._failed[visitor] = failures, self._clock() + wait
        if len(self._failed) > NUM_VISITORS:
            self._failed.popitem(last=False)
        say(f"login failed: {visitor}, {failures} in a row, next in {wait:.0f} s")
