"""The information that an observer of a denoising step gets, and the changes that it may return."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from cache_functions.state import StepKind


class Interrupted(Exception):
    """The drawing was stopped by its caller."""


@dataclass(frozen=True)
class StepRecord:
    """Record of one step.

    Attributes:
        index: index of the step.
        kind: "full" or "forecast".
        seconds: wall-clock time, including the wait for the device.
        evaluations: transformer evaluations per picture: full step 2 with guidance, 1 without; forecast step 0.
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


@dataclass(frozen=True)
class StepEnd:
    """The information for a step's observer.

    Attributes:
        record: record of the step.
        timestep: the scheduler's timestep, 0..1000.
        latents: [B,C,H,W] after the step, fp32.
        x0: the denoised estimate of this step [B,C,H,W], fp32.
        embeds: the prompt embeddings in use, both branches.
    """

    record: StepRecord
    timestep: Tensor
    latents: Tensor
    x0: Tensor
    embeds: Any


@dataclass(frozen=True)
class Change:
    """The changes that an observer of a step asks for; None changes nothing."""

    latents: Tensor | None = None
    embeds: Any = None
    guidance: float | None = None
