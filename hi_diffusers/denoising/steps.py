"""The information that an observer of a denoising step gets, and the changes that it may return."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from cache_functions import StepRecord


class Interrupted(Exception):
    """The drawing was stopped by its caller."""


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
