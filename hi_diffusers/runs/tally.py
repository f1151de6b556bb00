"""Counts of a run's pictures."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hi_diffusers.runs.worker import Drawn


@dataclass
class Tally:
    """Counts of a run's pictures so far.

    Attributes:
        num_drawn, num_withheld, num_cut: pictures drawn, withheld, and drawn from a prompt that was cut.
        first_cut: manifest line of the first picture whose prompt was cut.
    """

    num_drawn: int = 0
    num_withheld: int = 0
    num_cut: int = 0
    first_cut: dict[str, Any] | None = None

    def add(self, unit: Sequence["Drawn"]) -> None:
        """Count a unit's pictures."""
        for one in unit:
            self.num_drawn += 1
            self.num_withheld += not one.data
            if "cut" in one.line:
                self.num_cut += 1
                self.first_cut = self.first_cut or one.line

    def cut_notice(self, limit: int) -> str:
        """A sentence about the prompts that were cut at `limit` tokens."""
        assert self.first_cut is not None
        name, end = next(iter(self.first_cut["cut"].items()))
        which = f"the first is prompt {self.first_cut['index']}, whose {name} loses {end[:100]!r}"
        return f"the prompts of {self.num_cut} pictures were cut at {limit} tokens; {which}"
