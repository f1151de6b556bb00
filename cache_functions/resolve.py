"""Resolves a requested configuration: target, rule and calibration for one sampler."""

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from cache_functions.budget import default_full_steps, planned_full_steps, settle
from cache_functions.calibration import Calibration, CalibrationKey, CalibrationShelf
from cache_functions.config import BEST, ON_LATENTS, QUALITIES, CacheConfig
from cache_functions.optimum import MAX_ANCHORS, Rule, optimal_full_steps, step_factors
from cache_functions.schedules import decides_on_the_way
from cache_functions.solver import SOLVER
from taylor_utils.plugins import rule_name

BEST_RULE: dict[str, Any] = {"target": "velocity", "basis": "taylor", "max_order": 1, "schedule": "interval"}
"""The settings of `CacheConfig.best()` if no calibration fits."""
BEST_RENOISING: dict[str, Any] = {"target": "x0", "basis": "reuse", "max_order": 0, "schedule": "interval"}
"""BEST_RULE for samplers that add noise at every step."""
FLOORS = ((1.0, 4, 2), (2.0, 12, 6), (float("inf"), 36, 12))
"""For guidance up to the first number: the fewest steps that a default caches, and its fewest full steps. Below them
forecasting may lose more than drawing that many steps does (nano, 128 prompts; benchmarks.few_steps, docs/results.md):
without guidance 2 of 4 steps gain 3.1 dB; at guidance 2 6 of 12 gain 2.0 dB and 4 of 16 lose 1.4 dB; at guidance 4 12
of 36 gain 1.3 dB and 12 of 24 lose 2.5 dB at the 10th percentile."""
EVEN: dict[str, Any] = {"schedule": "power", "exponent": 1.0}
"""The schedule of BEST_RULE for a budget that an interval cannot make."""
WHY_NOT = {
    "module": "block features contain noise that is drawn after the last full step",
    "residual": "the residual contains noise that is drawn after the last full step",
    "velocity": "the velocity contains noise that is drawn after the last full step",
    SOLVER: "the latent at the next full step contains noise that is drawn on the way there",
}
NO_SHELF = CalibrationShelf(model="")


@dataclass(frozen=True)
class Sampler:
    """The properties of a sampler that the cache depends on.

    Attributes:
        name: name in error messages.
        scheduler, num_steps, shift, guidance: as in a calibration's key; guidance is 0 without guidance.
        renoises: whether it adds noise at every step.
        sigmas: noise level of every step, which a calibration must have; empty if the shift tells them.
        has_branches: whether the denoising loop has the outputs of both branches of guidance, as target solver needs.
        first_step: the first step that is drawn, of a drawing that begins with a picture.
    """

    name: str
    scheduler: str
    num_steps: int
    shift: float
    guidance: float
    renoises: bool
    sigmas: tuple[float, ...] = ()
    has_branches: bool = False
    first_step: int = 0

    @property
    def drawn_steps(self) -> int:
        """Number of steps that are drawn."""
        return self.num_steps - self.first_step

    def key(self, model: str, target: str) -> CalibrationKey:
        """The key that a calibration for this sampler must have."""
        guidance = self.guidance if self.guidance > 1 else 0.0
        return CalibrationKey(model, self.scheduler, self.num_steps, self.shift, guidance, target, self.first_step)


@dataclass(frozen=True)
class Resolution:
    """A configuration with all settings filled in, and sentences about choices made for the user."""

    config: CacheConfig
    notices: tuple[str, ...] = ()


def resolve(config: CacheConfig, sampler: Sampler, shelf: CalibrationShelf | None = None) -> Resolution:
    """Fill in open settings, and check that the configuration works with this sampler.

    Args:
        shelf: where the model's calibrations are; None: nowhere.

    Raises:
        ValueError: if the sampler does not allow the target, a calibration is missing or does not fit, or the budget
            cannot be kept.
    """
    if config.is_off:
        return Resolution(config)
    shelf = shelf or NO_SHELF
    notices: tuple[str, ...] = ()
    if sampler.renoises:
        _refuse_renoised(config, sampler)
    if config.schedule == BEST:
        config, notices = _choose(config, sampler, shelf)
        if config.is_off:
            return Resolution(config, notices)
    if config.target == SOLVER:
        return Resolution(_solved(config, sampler, shelf), (*shelf.faults(), *notices))
    on_latents = sampler.renoises or config.corrector or config.basis == "learned"
    config = replace(config, target=config.target or ("x0" if on_latents else "module"))
    wants_mask = config.schedule == "mask" and config.mask is None
    if config.basis == "learned" or wants_mask:
        config = _calibrated(config, sampler, shelf)
    elif config.calibration is not None:
        raise ValueError(
            f"calibration has no effect with basis {rule_name(config.basis)} and schedule {rule_name(config.schedule)}:"
            " drop it"
        )
    looked_up = config.calibration is not None or bool(notices)
    faults = tuple(shelf.faults()) if looked_up else ()
    return Resolution(settle(config, sampler.drawn_steps), (*faults, *notices))


def _refuse_renoised(config: CacheConfig, sampler: Sampler) -> None:
    if config.target in WHY_NOT:
        raise ValueError(
            f"target must be x0 with {sampler.name}, got {config.target!r}: the sampler adds fresh noise at every step,"
            f" and {WHY_NOT[config.target]}"
        )
    if config.corrector:
        raise ValueError(
            f"corrector cannot work with {sampler.name}, which adds fresh noise at every step: a step that is"
            " taken again would have other noise"
        )


def _choose(config: CacheConfig, sampler: Sampler, shelf: CalibrationShelf) -> tuple[CacheConfig, tuple[str, ...]]:
    """The configuration that measured best: a calibration's choice, or the rule that needs no calibration."""
    targets = _targets(config, sampler)
    fitting = list(_fitting(config, sampler, shelf, targets))
    if config.quality is not None:
        config = _graded(config, sampler, fitting)
    full_steps, notices = config.full_steps, list[str]()
    if full_steps is None:
        quarter = default_full_steps(sampler.drawn_steps)
        fewest, floor = next(row[1:] for row in FLOORS if sampler.guidance <= row[0])
        if sampler.drawn_steps < fewest:
            what = f"below {fewest} steps at guidance {sampler.guidance:g}"
            return CacheConfig.off(), (f"{what} nothing is cached unless full_steps is given",)
        full_steps = max(quarter, floor)
        if full_steps != quarter:
            notices.append(
                f"{full_steps} of {sampler.drawn_steps} steps are full: at a quarter, simply fewer steps lose less"
            )
    solver = next((one for one in fitting if one.key.target == SOLVER and full_steps in one.choices), None)
    matrices = [one for one in fitting if one.gram is not None]
    if solver is None and not matrices:
        chosen, notice = _without_calibration(config, sampler, shelf, full_steps, targets)
        return chosen, (*notices, notice)
    if shelf.altered:
        notices.append(
            f"the cache's calibration is looked up by the base model's weights, which {shelf.altered} changes"
        )
    if solver is not None:
        return _with_solver(config, solver, full_steps), tuple(notices)
    best = max(matrices, key=lambda one: one.nearest_choice(full_steps).merit)
    return _with_choice(replace(config, schedule="mask"), best, full_steps, shelf), tuple(notices)


def _targets(config: CacheConfig, sampler: Sampler) -> list[str]:
    """The targets among which the best may be, the likeliest first."""
    if config.target is not None:
        return [config.target]
    if sampler.renoises:
        return ["x0"]
    return [*([SOLVER] if sampler.has_branches else []), *ON_LATENTS]


def _without_calibration(
    config: CacheConfig, sampler: Sampler, shelf: CalibrationShelf, full_steps: int, targets: Iterable[str]
) -> tuple[CacheConfig, str]:
    """The rule that needs no calibration, and a sentence that says why it is taken."""
    rule = (BEST_RENOISING if sampler.renoises else BEST_RULE) | ({"target": config.target} if config.target else {})
    try:
        chosen = replace(config, **rule, full_steps=full_steps, calibration=None)
        settle(chosen, sampler.drawn_steps)
    except ValueError:
        rule |= EVEN
        chosen = replace(config, **rule, full_steps=full_steps, calibration=None)
    drawn = f"{sampler.scheduler}, {sampler.num_steps} steps, guidance {sampler.guidance:g}"
    return chosen, (
        f"no calibration for {drawn} ({_why_none(sampler, shelf, targets, full_steps)});"
        f" using {rule_name(chosen.basis)} order {chosen.max_order} on the {chosen.target}."
        " Run calibrate.py for a measured choice"
    )


def _graded(config: CacheConfig, sampler: Sampler, fitting: Sequence[Calibration]) -> CacheConfig:
    """The configuration with the fewest full steps that reach its quality; raises ValueError if none do."""
    least, name = QUALITIES[str(config.quality)], f"quality {config.quality}"
    solvers = [one for one in fitting if one.key.target == SOLVER] or fitting
    levels = [(one.p10_db, budget) for calibration in solvers for budget, one in calibration.choices.items()]
    if not levels:
        raise ValueError(f"{name} needs a calibration for {sampler.name}: run calibrate.py, or give full_steps")
    reached = [budget for level, budget in levels if level >= least]
    if not reached:
        level, budget = max(levels)
        raise ValueError(
            f"{name} needs {least:g} dB for nine in ten pictures, and the calibration reaches {level:.1f} with {budget}"
            " full steps: take another quality, or give full_steps"
        )
    return replace(config, full_steps=min(reached), quality=None)


def _fitting(
    config: CacheConfig, sampler: Sampler, shelf: CalibrationShelf, targets: Iterable[str]
) -> Iterable[Calibration]:
    """The calibrations to choose from: the named one, or all that fit."""
    if config.calibration is not None:
        named = _named(config, shelf)
        target = named.key.target if named.key.target in targets else next(iter(targets))
        _check_fit(named, sampler, shelf, target)
        return [named]
    found = (shelf.find(sampler.key(shelf.model, target), sampler.sigmas) for target in targets)
    return [one for one in found if one is not None]


def _why_none(sampler: Sampler, shelf: CalibrationShelf, targets: Iterable[str], full_steps: int | None = None) -> str:
    """The reason that no calibration fits: the field in which the nearest one differs, or the budget."""
    wanted = [sampler.key(shelf.model, target) for target in targets]
    solver = shelf.find(sampler.key(shelf.model, SOLVER), sampler.sigmas)
    if full_steps is not None and solver is not None:
        return f"its solver is fitted for {', '.join(map(str, sorted(solver.choices)))} full steps, not {full_steps}"
    differences = [(_num_equal(one.key, key), one.key.difference(key) or "") for one in shelf.all() for key in wanted]
    if not differences:
        return "none was found for this model"
    return f"the closest: {max(differences)[1] or 'its noise levels are others'}"


def _num_equal(one: CalibrationKey, other: CalibrationKey) -> int:
    return sum(getattr(one, field.name) == getattr(other, field.name) for field in fields(one))


def _named(config: CacheConfig, shelf: CalibrationShelf) -> Calibration:
    reference = config.calibration
    return reference if isinstance(reference, Calibration) else shelf.open(str(reference))


def _check_fit(calibration: Calibration, sampler: Sampler, shelf: CalibrationShelf, target: str) -> None:
    model = shelf.model or calibration.key.model  # without a shelf the model is not known
    difference = calibration.key.difference(sampler.key(model, target))
    if difference:
        raise ValueError(f"calibration does not fit: {difference}")
    if not calibration.has_levels(sampler.sigmas):
        raise ValueError("calibration does not fit: its noise levels are others, as of another size of picture")


def _required(config: CacheConfig, sampler: Sampler, shelf: CalibrationShelf, target: str, needing: str) -> Calibration:
    """The named calibration, or the one that is found for a target; raises ValueError if it does not fit, or is none.

    Args:
        needing: what needs it, for the error.
    """
    if config.calibration is not None:
        named = _named(config, shelf)
        _check_fit(named, sampler, shelf, target)
        return named
    found = shelf.find(sampler.key(shelf.model, target), sampler.sigmas)
    if found is None:
        why = _why_none(sampler, shelf, [target])
        raise ValueError(f"{needing} needs a calibration for {sampler.name} ({why}): run calibrate.py")
    return found


def _solved(config: CacheConfig, sampler: Sampler, shelf: CalibrationShelf) -> CacheConfig:
    """Fill in the solver's full steps and its calibration."""
    if not sampler.has_branches:
        raise ValueError(
            "target must not be solver here: it needs both branches of guidance, as HiDream's own loop has them"
        )
    calibration = _required(config, sampler, shelf, SOLVER, "target solver")
    budget = config.full_steps or (len(config.mask) if config.mask else default_full_steps(sampler.drawn_steps))
    solved = _with_solver(config, calibration, budget)
    if config.mask is not None and config.mask != solved.mask:
        raise ValueError(
            f"mask must be {list(solved.mask or ())} with this calibration's solver, got {list(config.mask)}"
        )
    return solved


def _with_solver(config: CacheConfig, calibration: Calibration, full_steps: int) -> CacheConfig:
    """The configuration for a budget's solver; raises ValueError if there is none."""
    steps = calibration.solver(full_steps).full_steps
    return replace(config, target=SOLVER, schedule="mask", mask=steps, full_steps=len(steps), calibration=calibration)


def _calibrated(config: CacheConfig, sampler: Sampler, shelf: CalibrationShelf) -> CacheConfig:
    """Fill in the learned weights' settings and the optimal mask from the target's calibration."""
    target = str(config.target)
    reason = f"basis {config.basis}" if config.basis == "learned" else "schedule mask without a mask"
    calibration = _required(config, sampler, shelf, target, reason)
    if config.mask is None and (config.schedule == "mask" or decides_on_the_way(config.schedule)):
        num_full = config.full_steps or default_full_steps(sampler.drawn_steps)
    else:
        num_full = len(planned_full_steps(config, sampler.drawn_steps))
    prior, ridge = config.prior, config.ridge
    if prior is None or ridge is None:
        choice = calibration.nearest_choice(num_full)
        prior, ridge = prior or choice.prior, choice.ridge if ridge is None else ridge
    if config.schedule == "mask" and config.mask is None:
        rule = Rule(min(config.max_order + 1, MAX_ANCHORS), prior, ridge, config.corrector)
        config = replace(config, mask=_schedule(calibration, rule, num_full, shelf), full_steps=None)
    if config.basis == "learned":
        return replace(config, calibration=calibration, prior=prior, ridge=ridge)
    return replace(config, calibration=None)


def _with_choice(
    config: CacheConfig, calibration: Calibration, full_steps: int, shelf: CalibrationShelf
) -> CacheConfig:
    """The configuration for the nearest budget's choice."""
    choice = calibration.nearest_choice(full_steps)
    mask = choice.full_steps
    if len(mask) != full_steps:
        rule = Rule(choice.max_order + 1, choice.prior, choice.ridge, choice.corrector)
        mask = _schedule(calibration, rule, full_steps, shelf)
    return replace(
        config,
        target=calibration.key.target,
        basis="learned",
        max_order=choice.max_order,
        mask=mask,
        full_steps=None,
        corrector=choice.corrector,
        corrector_from=choice.corrector_from if choice.corrector else 0,
        calibration=calibration,
        prior=choice.prior,
        ridge=choice.ridge,
    )


def _schedule(calibration: Calibration, rule: Rule, full_steps: int, shelf: CalibrationShelf) -> tuple[int, ...]:
    """The best schedule for a budget that was not calibrated.

    Raises:
        ValueError: if that takes longer than the shelf allows.
    """
    num_steps = len(calibration.sigmas) - 1
    if shelf.computes_up_to is not None and num_steps > shelf.computes_up_to:
        known = ", ".join(map(str, sorted(calibration.choices)))
        raise ValueError(
            f"full_steps must be one of {known}, which are calibrated, got {full_steps}: the schedule of another budget"
            f" of {num_steps} steps takes too long to compute here"
        )
    return _optimum(calibration, rule, full_steps)


@functools.lru_cache(maxsize=256)
def _optimum(calibration: Calibration, rule: Rule, full_steps: int) -> tuple[int, ...]:
    factors = step_factors(calibration.sigmas, calibration.key.target)
    return optimal_full_steps(calibration.matrix, factors, rule, full_steps)[0]
