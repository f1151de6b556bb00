"""The record of a generation's steps."""

from collections.abc import Sequence
from dataclasses import dataclass

from cache_functions.state import StepKind


@dataclass(frozen=True)
class StepRecord:
    """Record of one step.

    Attributes:
        index: index of the step.
        kind: "full" or "forecast".
        seconds: wall-clock time, including the wait for the device.
        evaluations: evaluations of the denoiser per picture. Our HiDream loop counts both branches of guidance, so that
            a full step has 2, or 1 without guidance; `forecasting` counts calls, and cannot tell what one call holds.
        cache_bytes: bytes that the cache keeps after the step, for the whole batch.
    """

    index: int
    kind: StepKind
    seconds: float
    evaluations: int
    cache_bytes: int = 0


def count_steps(records: Sequence[StepRecord], kind: StepKind) -> int:
    """The number of steps of that kind."""
    return sum(record.kind == kind for record in records)
