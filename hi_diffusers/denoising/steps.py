"""What a denoising step tells those who watch it, and what they may answer."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from cache_functions.state import StepKind


class Interrupted(Exception):
    """The drawing was stopped by its caller."""


@dataclass(frozen=True)
class StepRecord:
    """What one step did.

    Attributes:
        index: of the step.
        kind: "full" or "forecast".
        seconds: wall-clock time, the device waited for.
        evaluations: of the transformer, a picture; 2 on a full step with guidance, 1 without, 0 on a forecast step.
        cache_bytes: what the cache keeps after the step, of the whole batch.
    """

    index: int
    kind: StepKind
    seconds: float
    evaluations: int
    cache_bytes: int = 0


def count_steps(records: Sequence[StepRecord], kind: StepKind) -> int:
    """How many of the steps were of that kind."""
    return sum(record.kind == kind for record in records)


@dataclass(frozen=True)
class StepEnd:
    """What a step's observer sees.

    Attributes:
        record: what the step did.
        timestep: the scheduler's, 0..1000.
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
    """What an observer of a step wants changed; None is left as it is."""

    latents: Tensor | None = None
    embeds: Any = None
    guidance: float | None = None
