"""The calibration of target solver: fit a solver on every schedule that may be good, and choose by what they draw."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from cache_functions import CacheConfig, planned_full_steps
from cache_functions.calibration import SolverChoice
from cache_functions.config import MAX_STEPS
from cache_functions.resolve import BEST_RULE
from cache_functions.solver import Solver
from hi_diffusers.calibrating.lockstep import Lockstep
from hi_diffusers.calibrating.trials import psnr_of, read_lines
from hi_diffusers.calibrating.uncached import UncachedRuns
from hi_diffusers.denoising.rows import solver_of, solver_on
from hi_diffusers.pictures.metrics import Score, psnr
from hi_diffusers.request.options import ResolvedOptions

RIDGE = 1e-3


class SolverSearch:
    """Finds the solver of each budget.

    Args:
        uncached: the uncached runs; the first prompts of their plan fit, the others choose.
        path: file that keeps what was found, so that nothing is fitted twice.

    Attributes:
        tell: called with the number of evaluations after every batch; set before anything is fitted.
    """

    def __init__(self, uncached: UncachedRuns, path: Path):
        self.model, self.uncached, self.path = uncached.model, uncached, path
        self.plan = plan = uncached.plan
        self.tell: Callable[[int], object] = lambda count: None
        self.fitting, self.choosing = range(plan.num_fitted), range(plan.num_fitted, plan.num_pictures)
        self.known = read_lines(path, solver_of_line)
        self._lockstep: dict[range, Lockstep] = {}

    def choose(self, full_steps: int) -> SolverChoice:
        """The best solver of a budget: a fitted one, or a fixed rule's where that is better on the choosing prompts.

        The mean of the decibels decides. With 64 prompts the 10th percentile depends on six of them.
        """
        fitted = [self.fitted(steps) for steps in schedules(self.plan.sampler.drawn_steps, full_steps)]
        best, _ = max(fitted, key=lambda one: one[1].mean)
        rivals = [best, *self.rules(best.full_steps)]
        solver, score = max(((one, self.drawn(one)) for one in rivals), key=lambda one: one[1].mean)
        return SolverChoice(median_db=round(score.median, 3), p10_db=round(score.p10, 3), solver=solver)

    def fitted(self, full_steps: Sequence[int]) -> tuple[Solver, Score]:
        """The solver on a schedule, and the score of the fitting prompts."""
        candidate = ["fitted", *full_steps]
        found = self.known.get(json.dumps(candidate))
        if found is None:
            lockstep = self._runs(self.fitting)
            prior = rule_on(self.plan.sampler, full_steps)
            solver, latents = lockstep.fit(prior, lambda step: self.uncached.latents(self.fitting, step), RIDGE)
            found = self._remember(candidate, solver, self._psnr(self.fitting, latents))
        return found

    def drawn(self, solver: Solver) -> Score:
        """The score of the choosing prompts."""
        candidate = ["drawn", solver.rows]
        found = self.known.get(json.dumps(candidate))
        if found is None:
            found = self._remember(candidate, solver, self._psnr(self.choosing, self._runs(self.choosing).run(solver)))
        return found[1]

    def rules(self, full_steps: Sequence[int]) -> list[Solver]:
        """The rules that need no calibration, as solvers: fewer steps, and `BEST_RULE` on even steps."""
        one = self.plan.sampler
        scheduler = one.timed_scheduler()
        found = [solver_on(scheduler, full_steps, one.guidance)]
        try:
            even = planned_full_steps(CacheConfig(full_steps=len(full_steps), **BEST_RULE), one.drawn_steps)
        except ValueError:
            return found
        return [*found, rule_on(one, even)]

    def evaluations(self) -> int:
        """Evaluations of the network, at most, for all budgets; a guided one has two branches."""
        tried = {budget: len(schedules(self.plan.sampler.drawn_steps, budget)) for budget in self.plan.budgets}
        return sum(budget * (count * len(self.fitting) + 3 * len(self.choosing)) for budget, count in tried.items())

    def _runs(self, indices: range) -> Lockstep:
        if indices not in self._lockstep:
            drawings = [self.plan.drawings[index] for index in indices]
            self._lockstep[indices] = Lockstep(self.model, drawings, self.plan.batch_size, self.tell)
        return self._lockstep[indices]

    def _psnr(self, indices: range, latents: Tensor) -> list[float]:
        """PSNR of the pictures that runs end at, to the uncached ones."""
        found: list[float] = []
        size = self.plan.batch_size
        for start in range(0, len(indices), size):
            pictures = self.model.decode(latents[start : start + size].to(self.model.drawing_device))
            places = indices[start : start + size]
            found += [psnr(one, self.uncached.pixels(index)) for index, one in zip(places, pictures, strict=True)]
        return found

    def _remember(self, candidate: list[Any], solver: Solver, values: Sequence[float]) -> tuple[Solver, Score]:
        content = {"candidate": candidate, "full_steps": solver.full_steps, "rows": solver.rows, "psnr": list(values)}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(content) + "\n")
        found = self.known[json.dumps(candidate)] = solver, Score.of(values)
        return found


def solver_of_line(content: dict[str, Any]) -> tuple[Solver, Score]:
    """A solver that was fitted or drawn, and its score; raises ValueError, LookupError or TypeError if damaged."""
    solver = Solver.of(content["full_steps"], content["rows"])
    solver.check(MAX_STEPS)
    return solver, Score.of(psnr_of(content))


def rule_on(options: ResolvedOptions, full_steps: Sequence[int]) -> Solver:
    """`BEST_RULE` on these full steps of a drawing, as a solver."""
    rule = CacheConfig(**(BEST_RULE | {"schedule": "mask", "mask": tuple(full_steps)}))
    scheduler = options.timed_scheduler()
    return solver_of(rule, scheduler, full_steps, options.guidance)


def schedules(num_steps: int, full_steps: int) -> list[tuple[int, ...]]:
    """The even schedules that are tried: at most three, which differ in their last full step."""
    if full_steps == 1:
        return [(0,)]
    lasts = (num_steps * (full_steps - 1) / full_steps, num_steps - 2, num_steps - 1)
    evenly = [tuple(round(last * place / (full_steps - 1)) for place in range(full_steps)) for last in lasts]
    return [steps for steps in dict.fromkeys(evenly) if len(set(steps)) == full_steps]
