"""Searches the best way to forecast within a budget, by drawing with candidates."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from cache_functions import CacheConfig, Calibration, planned_full_steps
from cache_functions.calibration import Choice
from cache_functions.optimum import Rule, optimal_full_steps, step_factors
from hi_diffusers.calibrating.plan import NUM_ANCHORS
from hi_diffusers.calibrating.trials import Candidate, Trials
from taylor_utils.bases.learned import PRIORS

# Half a decade apart. Of the 43 choices in nano's calibrations none lies at the lower end, and two at the upper one.
RIDGES = (1e-4, 1e-3, 1e-2, 0.03, 0.1, 0.3, 1.0, 3.0)
FIRST_RIDGES = (1e-2, 0.1, 1.0)
FINALISTS = 2  # candidates drawn on all pictures; the number was chosen by hand, not measured
FORMULAS: tuple[dict[str, Any], ...] = (
    {"schedule": "interval"},
    {"schedule": "cosine"},
)  # schedules that are not computed


class Search:
    """The search for one budget.

    Args:
        calibration: the Gram matrix and its key.
        full_steps: the budget.
        trials: draws and scores.
    """

    def __init__(self, calibration: Calibration, full_steps: int, trials: Trials):
        self.calibration, self.full_steps, self.trials = calibration, full_steps, trials
        self.factors = step_factors(calibration.sigmas, calibration.key.target)

    def run(self, corrects: bool) -> Candidate:
        """The best candidate: for each prior a ridge and a corrector, then other schedules, then the ridge again.

        Args:
            corrects: whether the corrector may be used.
        """
        starts = [self.ranked([self.computed(prior, ridge) for ridge in FIRST_RIDGES])[0] for prior in PRIORS]
        corrected = (
            [one for start in starts for one in self.corrected(start)] if corrects and self.full_steps > 1 else []
        )
        best = self.best_of([*starts, *corrected])
        nearly_taylor = replace(best, prior="taylor", ridge=RIDGES[-1])
        rules = (best, nearly_taylor)
        best = self.best_of([best, *(replace(rule, full_steps=s) for rule in rules for s in self.formulas())])
        return self.best_of([best, *self.neighbours(best)])

    def ranked(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        """The candidates from best to worst, judged on half of the pictures."""
        half = -(-self.trials.num_pictures // 2)
        return sorted(dict.fromkeys(candidates), key=lambda one: -self.trials.score(one, self.calibration, half).merit)

    def best_of(self, candidates: Sequence[Candidate]) -> Candidate:
        """The best candidate; only the finalists on half of the pictures are drawn on the other half."""
        finalists = self.ranked(candidates)[:FINALISTS]
        return max(finalists, key=lambda one: self.trials.score(one, self.calibration).merit)

    def computed(self, prior: str, ridge: float, corrector: bool = False) -> Candidate:
        """The candidate with the schedule that is optimal for that rule by the Gram matrix."""
        rule = Rule(NUM_ANCHORS, prior, ridge, corrector)
        steps, _ = optimal_full_steps(self.calibration.matrix, self.factors, rule, self.full_steps)
        return Candidate(steps, prior, ridge, corrector)

    def formulas(self) -> Iterator[tuple[int, ...]]:
        """The schedules of FORMULAS that can make the budget."""
        for settings in FORMULAS:
            config = CacheConfig(target="x0", full_steps=self.full_steps, **settings)
            try:
                yield tuple(planned_full_steps(config, self.calibration.key.drawn_steps))
            except ValueError:
                continue

    def corrected(self, one: Candidate) -> Iterator[Candidate]:
        """The candidate with the corrector, from the first or the middle step on, also on its optimal schedule."""
        for schedule in (one.full_steps, self.computed(one.prior, one.ridge, corrector=True).full_steps):
            for start in (0, schedule[self.full_steps // 2]):
                yield replace(one, full_steps=schedule, corrector=True, corrector_from=start)

    def neighbours(self, one: Candidate) -> Iterator[Candidate]:
        """The candidate with the neighbouring ridges, on its schedule and on the optimal ones for them."""
        place = RIDGES.index(one.ridge)
        for ridge in RIDGES[max(place - 1, 0) : place + 2]:
            computed = self.computed(one.prior, ridge, one.corrector).full_steps
            yield replace(one, ridge=ridge)
            yield replace(one, ridge=ridge, full_steps=computed)


def choose(calibration: Calibration, full_steps: int, trials: Trials, corrects: bool) -> Choice:
    """Find the best way to forecast within a budget.

    Args:
        calibration: the Gram matrix and its key; without choices.
        full_steps: the budget.
        trials: draws and scores.
        corrects: whether the corrector may be used.
    """
    best = Search(calibration, full_steps, trials).run(corrects)
    score = trials.score(best, calibration)
    return Choice(
        full_steps=best.full_steps,
        max_order=NUM_ANCHORS - 1,
        prior=best.prior,
        ridge=best.ridge,
        corrector=best.corrector,
        corrector_from=best.corrector_from,
        median_db=round(score.median, 3),
        p10_db=round(score.p10, 3),
    )
