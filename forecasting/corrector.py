"""The corrector: it redoes an interval once the next full step is known.

Forecasting extrapolates. When the next full step has been computed, the skipped steps lie between two evaluated x0, so
the solver is put back to where the interval began and takes its steps again with interpolated x0: arithmetic on
latents alone, and no evaluation of the model. It does over an interval what a predictor-corrector does over one step.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from forecasting.levels import Levels

Solve = Callable[[Tensor, int, Tensor], Tensor]
"""(model's output, step, latents) -> the latents after the solver's step."""


@dataclass(frozen=True)
class _Start:
    """A full step, before the solver's own step from there.

    Attributes:
        step: its index.
        latents, x0, output: tensors of one shape, fp32.
        solver: the scheduler's state.
    """

    step: int
    latents: Tensor
    x0: Tensor
    output: Tensor
    solver: dict[str, Any]


class Corrector:
    """Redoes the intervals of one generation.

    Args:
        scheduler: a deterministic sampler with its timesteps set; its state is restored to redo steps.
        levels: noise level of every step.
        first: intervals that begin before this step are not redone.
    """

    def __init__(self, scheduler: Any, levels: Levels, first: int = 0):
        self.scheduler, self.levels, self.first = scheduler, levels, first
        self.start: _Start | None = None

    def at_full_step(
        self, step: int, latents: Tensor, x0: Tensor, output: Tensor, solve: Solve
    ) -> tuple[Tensor, Tensor]:
        """Redo the interval that ends at this full step. Called before the solver's own step.

        Args:
            step: index of the full step.
            latents: the latents at which the model was evaluated, fp32.
            x0, output: the model's results, fp32.
            solve: takes a solver's step.

        Returns:
            (latents, output) to continue from. If the latents changed, the output is recomputed from them and the
            evaluated x0.
        """
        start = self.start
        if start is not None and step > start.step + 1 and start.step >= self.first:
            latents = self._redo(start, step, x0, solve)
            output = self.levels.output(step, latents, x0)
        self.start = _Start(step, latents, x0, output, _copied(vars(self.scheduler)))
        return latents, output

    def forget(self) -> None:
        """Do not redo the running interval, because the latents were changed from outside."""
        self.start = None

    def _redo(self, start: _Start, end: int, end_x0: Tensor, solve: Solve) -> Tensor:
        vars(self.scheduler).update(_copied(start.solver))
        latents, output = start.latents, start.output
        for step in range(start.step, end):
            if step > start.step:
                x0 = torch.lerp(start.x0, end_x0, (step - start.step) / (end - start.step))
                output = self.levels.output(step, latents, x0)
            latents = solve(output, step, latents)
        return latents


def _copied(state: dict[str, Any]) -> dict[str, Any]:
    """Copy a scheduler's state. Its lists are copied; its tensors are replaced at every step, never written to."""
    return {name: list(value) if isinstance(value, list) else value for name, value in state.items()}
