"""The corrector: it redoes an interval once the next full step is known.

Forecasting extrapolates. When the next full step has been computed, the skipped steps lie between two evaluated x0, so
the solver is put back to where the interval began and takes its steps again with interpolated x0: arithmetic on
latents alone, and no evaluation of the model. It does over an interval what a predictor-corrector does over one step.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hi_diffusers.denoising.loop import Estimate, Step


@dataclass(frozen=True)
class _Start:
    """A full step, before the solver's own step from there.

    Attributes:
        step: its index.
        latents, x0, velocity: [B,C,H,W], fp32.
        solver: the scheduler's state.
    """

    step: int
    latents: Tensor
    x0: Tensor
    velocity: Tensor
    solver: dict[str, Any]


class Corrector:
    """Redoes the intervals of one generation.

    Args:
        scheduler: a deterministic sampler with its timesteps set; its state is restored to redo steps.
        sigmas: noise level of every step.
        first: intervals that begin before this step are not redone.
    """

    def __init__(self, scheduler: Any, sigmas: Sequence[float], first: int = 0):
        self.scheduler, self.sigmas, self.first = scheduler, sigmas, first
        self.start: _Start | None = None

    def around(self, step: Step) -> Step:
        """Wrap a solver's step so that a full step first redoes the interval that ends there."""

        def corrected(estimate: Estimate, index: int, latents: Tensor) -> Tensor:
            if estimate.kind == "full":
                latents, velocity = self.at_full_step(index, latents, estimate.x0, estimate.velocity)
                estimate = replace(estimate, velocity=velocity)
            return step(estimate, index, latents)

        return corrected

    def at_full_step(self, step: int, latents: Tensor, x0: Tensor, velocity: Tensor) -> tuple[Tensor, Tensor]:
        """Redo the interval that ends at this full step. Called before the solver's own step.

        Args:
            step: index of the full step.
            latents: the latents at which the model was evaluated.
            x0, velocity: the model's results.

        Returns:
            (latents, velocity) to continue from. If the latents changed, velocity is recomputed from them and the
            evaluated x0.
        """
        start = self.start
        if start is not None and step > start.step + 1 and start.step >= self.first:
            latents = self._redo(start, step, x0)
            velocity = (latents - x0) / self.sigmas[step]
        self.start = _Start(step, latents, x0, velocity, _copied(vars(self.scheduler)))
        return latents, velocity

    def forget(self) -> None:
        """Do not redo the running interval, because the latents were changed from outside."""
        self.start = None

    def _redo(self, start: _Start, end: int, end_x0: Tensor) -> Tensor:
        vars(self.scheduler).update(_copied(start.solver))
        latents, velocity = start.latents, start.velocity
        for step in range(start.step, end):
            if step > start.step:
                x0 = torch.lerp(start.x0, end_x0, (step - start.step) / (end - start.step))
                velocity = (latents - x0) / self.sigmas[step]
            latents = self.scheduler.step(velocity, self.scheduler.timesteps[step], latents, return_dict=False)[0]
        return latents


def _copied(state: dict[str, Any]) -> dict[str, Any]:
    """Copy a scheduler's state. Its lists are copied; its tensors are replaced at every step, never written to."""
    return {name: list(value) if isinstance(value, list) else value for name, value in state.items()}
