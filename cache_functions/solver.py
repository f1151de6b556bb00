"""A solver with K evaluations: the latent at the next full step as a weighted sum of the latent and all outputs so far.

A cached run with K full steps computes nothing else than this, whatever rule forecasts the steps between: forecasts,
the scheduler's steps and the corrector are linear in the latent and in the network's outputs. With a_0 = 0 < a_1 < ...
the full steps and a_K the end,

    x(a_k+1) = w_kx x(a_k) + sum over j <= k of (w_kju u_j + w_kjd d_j)

where u_j is the denoised estimate of the unconditional branch at a_j, and d_j the guidance's direction, so that
u_j + guidance d_j is the guided estimate; without guidance u_j is the only output. Here the coefficients are fitted
(`cache_functions.stages`). Solvers whose coefficients differ from step to step: "Bespoke Non-Stationary Solvers",
arXiv 2403.01329.
"""

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

SOLVER = "solver"
"""The target of `CacheConfig` by which a solver draws."""


@dataclass(frozen=True)
class Solver:
    """The full steps and the coefficients.

    Attributes:
        full_steps: the K full steps, from 0 on.
        rows: one row of coefficients per full step: of the latent, then of the first output at all full steps so far,
            oldest first, then the same of the second output, if there is one.
    """

    full_steps: tuple[int, ...]
    rows: tuple[tuple[float, ...], ...]

    @property
    def num_outputs(self) -> int:
        """Number of outputs of an evaluation: 2 with guidance, 1 without."""
        return len(self.rows[0]) - 1

    def weights(self, stage: int) -> tuple[float, list[Sequence[float]]]:
        """The coefficients that lead from a full step to the next.

        Args:
            stage: number of the full step, from 0.

        Returns:
            (coefficient of the latent, for each output one coefficient per full step so far).
        """
        share, *others = self.rows[stage]
        count = stage + 1
        return share, [others[place * count : (place + 1) * count] for place in range(self.num_outputs)]

    def check(self, num_steps: int) -> None:
        """Raise ValueError unless it is a solver for that many steps."""
        steps = self.full_steps
        whole = all(isinstance(step, int) and not isinstance(step, bool) for step in steps)
        rising = whole and all(earlier < later for earlier, later in itertools.pairwise(steps))
        if not (rising and steps and steps[0] == 0 and steps[-1] < num_steps):
            raise ValueError(f"its full steps must increase from 0 on and be below {num_steps}, got {list(steps)}")
        if len(self.rows) != len(steps) or len(self.rows[0]) not in (2, 3):
            raise ValueError(f"its {len(steps)} full steps must each have a row of coefficients, got {len(self.rows)}")
        for stage, row in enumerate(self.rows):
            count = 1 + self.num_outputs * (stage + 1)
            if len(row) != count or not all(map(_is_number, row)):
                raise ValueError(f"row {stage} of its coefficients must hold {count} numbers")

    @classmethod
    def of(cls, full_steps: Iterable[int], rows: Iterable[Iterable[float]]) -> "Solver":
        """A solver of lists, as JSON has them."""
        return cls(tuple(full_steps), tuple(tuple(row) for row in rows))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
