"""The cache's configuration. `resolve` fills in the settings that depend on the sampler and the model."""

import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import Any

from cache_functions.anchors import ANCHOR_DEVICES, ANCHOR_DTYPES
from cache_functions.calibration import Calibration
from cache_functions.schedules import SCHEDULES, Schedule, decides_on_the_way, schedule_settings
from cache_functions.solver import SOLVER, Solver
from taylor_utils import basis_settings
from taylor_utils.bases import BASES, Basis
from taylor_utils.bases.learned import PRIORS
from taylor_utils.bases.newton import ABSCISSAE
from taylor_utils.plugins import Plugins, rule_name

TARGETS = ("module", "residual", "velocity", "x0", SOLVER, "off")
ON_LATENTS = ("velocity", "x0")
"""The targets that are forecast in the denoising loop, one latent each."""
BEST = "best"
OPEN_TO_BEST = ("target", "full_steps", "quality", "calibration", "anchor_dtype", "anchor_device")
"""The settings that the user may still choose with schedule best, which chooses the rest."""

OPEN_TO_SOLVER = ("target", "schedule", "mask", "full_steps", "calibration", "anchor_dtype", "anchor_device")
"""The settings that target solver reads; the others are of rules that forecast single steps."""

QUALITIES = {"high": 45.0, "medium": 38.0, "draft": 32.0}
"""Grade -> PSNR to the uncached picture, in dB, that nine in ten of the calibration's own pictures reach."""

MAX_STEPS = 1000
"""The largest number of denoising steps of a generation."""


@dataclass(frozen=True)
class CacheConfig:
    """The cache of a generation. Values are checked on creation; `resolve` fills in those that are open.

    Attributes:
        target: what is forecast. "module": attention and feed-forward output of every block, image tokens (the
            paper). "residual": what the whole block stack adds to the image tokens. "velocity": the guided model
            output. "x0": the guided denoised estimate. "solver": the latent at the next full step, from a calibration's
            coefficients (`cache_functions.solver`). "off": nothing. None: "module", or "x0" where the sampler
            adds noise at every step.
        basis: the rule that gives the weights, see `taylor_utils.basis_names()`, or a function like theirs.
        schedule: which steps are full, see `cache_functions.schedule_names()`, or a function like their `plan`; "best"
            lets `resolve` choose everything but target and budget.
        fresh_threshold: schedule interval: distance from one full step to the next, >= 1; None is 4, unless
            full_steps is given.
        max_order: highest order of the expansion, 0 to 6; max_order + 1 full steps are kept.
        first_enhance: number of leading full steps, >= 1.
        last_enhance: schedule interval: number of final full steps, >= 0.
        full_steps: the budget: number of full steps; None is a quarter of the steps, rounded up, except for schedule
            interval and an explicit mask.
        mask: schedule mask: the full steps, beginning with 0; None is the calibration's optimum.
        exponent: schedule power: exponent of the curve, 0.01 to 10.
        sigma: bases taylor and hermite: scaling, 0.01 to 2; None is 1 for taylor and 0.5 for hermite.
        abscissa: basis newton: "step", "sigma" or "log_snr".
        corrector: redo each interval once its end is known, with interpolated x0; targets velocity and x0 only.
        corrector_from: first step at which an interval that is redone may begin, >= 0.
        calibration: a file's path or "sha256:...", or the calibration itself; None searches one if it is needed.
        prior, ridge: basis learned: settings of the weights, ridge 0 to 1e6; None is the calibration's choice.
        anchor_dtype: "fp8" (one scale per tensor), "bf16" or "fp32"; None keeps features as they were computed.
        anchor_device: "cpu" keeps features in host memory; None keeps them where they were computed.
        quality: schedule best: one of QUALITIES, instead of a budget: the fewest full steps that reach it.
        extras: further settings of a basis or schedule from another package; JSON values by name.
    """

    target: str | None = None
    basis: Basis = "taylor"
    schedule: Schedule = "interval"
    fresh_threshold: int | None = None
    max_order: int = 1
    first_enhance: int = 1
    last_enhance: int = 0
    full_steps: int | None = None
    mask: tuple[int, ...] | None = None
    exponent: float = 2.0
    sigma: float | None = None
    abscissa: str = "step"
    corrector: bool = False
    corrector_from: int = 0
    calibration: str | Calibration | None = None
    prior: str | None = None
    ridge: float | None = None
    anchor_dtype: str | None = None
    anchor_device: str | None = None
    quality: str | None = None
    extras: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        _check_choice("target", self.target, TARGETS, optional=True)
        _check_rule(self.basis, BASES)
        _check_rule(self.schedule, SCHEDULES, (BEST,))
        _check_choice("abscissa", self.abscissa, ABSCISSAE)
        _check_choice("anchor_dtype", self.anchor_dtype, [*ANCHOR_DTYPES], optional=True)
        _check_choice("anchor_device", self.anchor_device, ANCHOR_DEVICES, optional=True)
        _check_choice("prior", self.prior, PRIORS, optional=True)
        _check_choice("quality", self.quality, [*QUALITIES], optional=True)
        _check_range("fresh_threshold", self.fresh_threshold, 1, MAX_STEPS, optional=True)
        _check_range("max_order", self.max_order, 0, 6)
        _check_range("first_enhance", self.first_enhance, 1, MAX_STEPS)
        _check_range("last_enhance", self.last_enhance, 0, MAX_STEPS)
        _check_range("full_steps", self.full_steps, 1, MAX_STEPS, optional=True)
        _check_range("corrector_from", self.corrector_from, 0, MAX_STEPS)
        _check_number("exponent", self.exponent, 0.01, 10.0)
        _check_number("sigma", self.sigma, 0.01, 2.0, optional=True)
        _check_number("ridge", self.ridge, 0.0, 1e6, optional=True)
        if not isinstance(self.corrector, bool):
            raise ValueError(f"corrector must be true or false, got {self.corrector!r}")
        if self.mask is not None:
            _check_mask(self.mask)
            object.__setattr__(self, "mask", tuple(self.mask))  # JSON knows lists only
        object.__setattr__(self, "extras", _checked_extras(self.extras))
        self._check_effects()

    def _check_effects(self) -> None:
        """Raise ValueError for settings that contradict each other or have no effect."""
        given = {name for name, default in cache_defaults().items() if getattr(self, name) != default}
        if self.schedule == BEST:
            for name in sorted(given - {"schedule", *OPEN_TO_BEST}):
                raise ValueError(f"{name} is chosen by schedule best: drop it, or name another schedule")
            if self.quality is not None and self.full_steps is not None:
                raise ValueError("quality and full_steps both set the budget: give one of them")
            return
        if self.quality is not None:
            raise ValueError(f"quality {self.quality} has no effect with other caches than best: drop it")
        if self.target == SOLVER:
            self._check_solver(given)
            return
        if self.fresh_threshold is not None and self.full_steps is not None:
            raise ValueError("fresh_threshold and full_steps both set the budget: give one of them")
        by_schedule, by_basis = schedule_settings(self.schedule), basis_settings(self.basis)
        of_schedule = {"fresh_threshold", "last_enhance", "full_steps", "mask", "exponent"}
        budget = {"full_steps"} if "fresh_threshold" in by_schedule else set()  # it is converted to a threshold
        schedule, basis = f"schedule {rule_name(self.schedule)}", f"basis {rule_name(self.basis)}"
        _refuse_idle(given & (of_schedule - {*by_schedule} - budget), schedule)
        _refuse_idle(given & ({"sigma", "abscissa", "prior", "ridge"} - {*by_basis}), basis)
        if "first_enhance" in given and "first_enhance" not in {*by_schedule, *by_basis}:
            _refuse_idle({"first_enhance"}, f"{schedule} and {basis}")
        _refuse_idle({*self.extras} - {*by_schedule, *by_basis}, f"{schedule} and {basis}")
        if self.corrector_from and not self.corrector:
            raise ValueError(f"corrector_from {self.corrector_from} has no effect without the corrector")
        if self.mask is not None and self.full_steps not in (None, len(self.mask)):
            raise ValueError(f"full_steps {self.full_steps} contradicts the mask, which has {len(self.mask)}")
        if self.basis == "learned" and self.target not in (None, *ON_LATENTS):
            raise ValueError(f"basis learned forecasts {' and '.join(ON_LATENTS)}, not target {self.target!r}")
        if self.corrector and self.target not in (None, *ON_LATENTS):
            raise ValueError(
                f"corrector needs target {' or '.join(ON_LATENTS)}, got {self.target!r}: it needs x0 of whole steps"
            )

    def _check_solver(self, given: set[str]) -> None:
        """Raise ValueError for settings that a solver does not read."""
        _refuse_idle(given - {*OPEN_TO_SOLVER}, "target solver")
        if self.schedule not in ("interval", "mask"):  # interval is the default
            raise ValueError(f"schedule {rule_name(self.schedule)} has no effect with target solver: drop it")
        if self.mask is not None and self.full_steps not in (None, len(self.mask)):
            raise ValueError(f"full_steps {self.full_steps} contradicts the mask, which has {len(self.mask)}")

    @property
    def solver(self) -> Solver:
        """The calibration's solver for the full steps; target solver, resolved."""
        if self.target != SOLVER or not isinstance(self.calibration, Calibration) or self.mask is None:
            raise ValueError("target solver needs its calibration: call resolve first")
        return self.calibration.solver(len(self.mask))

    @classmethod
    def off(cls) -> "CacheConfig":
        """No caching: every step is computed and nothing is kept."""
        return cls(target="off")

    @classmethod
    def taylorseer(cls, fresh_threshold: int | None = None, max_order: int = 1) -> "CacheConfig":
        """The paper's setting (arXiv 2503.06923)."""
        return cls(fresh_threshold=fresh_threshold, max_order=max_order)

    @classmethod
    def hicache(cls, fresh_threshold: int | None = None, max_order: int = 2, sigma: float = 0.5) -> "CacheConfig":
        """HiCache's setting (arXiv 2508.16984)."""
        return cls(basis="hermite", fresh_threshold=fresh_threshold, max_order=max_order, sigma=sigma)

    @classmethod
    def best(cls, full_steps: int | None = None, quality: str | None = None) -> "CacheConfig":
        """The setting that measured best: a calibration's choice for the model and sampler, else `BEST_RULE`."""
        return cls(schedule=BEST, full_steps=full_steps, quality=quality)

    @property
    def is_off(self) -> bool:
        """Whether nothing is cached."""
        return self.target == "off"

    def values(self, names: Iterable[str], measured: Mapping[str, Any] = MappingProxyType({})) -> dict[str, Any]:
        """The settings of a basis or a schedule, without those that are None.

        Args:
            names: names of the settings that it reads.
            measured: values known of the generation, by name; they override fields and extras.
        """
        known = vars(self) | dict(self.extras) | dict(measured)
        return {name: known[name] for name in names if known.get(name) is not None}

    def settings(self) -> dict[str, Any]:
        """Every field, JSON-able; a calibration is named by its hash, a function by its module and name."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        values["basis"], values["schedule"] = rule_name(self.basis), rule_name(self.schedule)
        for name in ("extras", "quality"):
            if not values[name]:
                del values[name]
        if isinstance(self.calibration, Calibration):
            values["calibration"] = self.calibration.reference
        if self.mask is not None:
            values["mask"] = list(self.mask)
        if self.target == SOLVER:
            return {name: value for name, value in values.items() if name in OPEN_TO_SOLVER}
        return values

    def check_batch(self, batch_size: int) -> None:
        """Raise ValueError for a batch size that the schedule cannot draw."""
        if batch_size > 1 and self.schedule != BEST and decides_on_the_way(self.schedule):
            raise ValueError(
                f"schedule {rule_name(self.schedule)} can draw only one picture at a time, got a batch of {batch_size}:"
                " one decision for the batch would make each picture depend on the others"
            )


def cache_defaults() -> dict[str, Any]:
    """Field of `CacheConfig` -> its default."""
    return {one.name: {} if one.name == "extras" else one.default for one in fields(CacheConfig)}


def _check_rule(rule: object, plugins: Plugins, also: tuple[str, ...] = ()) -> None:
    """Raise ValueError unless a rule is a known name or a function."""
    if isinstance(rule, str):
        if rule not in also:
            plugins.find(rule, also)
    elif not callable(rule):
        raise ValueError(f"{plugins.kind} must be a name or a function, got {rule!r}")


def _checked_extras(extras: object) -> dict[str, Any]:
    if not isinstance(extras, Mapping) or not all(isinstance(name, str) for name in extras):
        raise ValueError(f"extras must map names to values, got {extras!r}")
    for name, value in extras.items():
        if name in CacheConfig.__dataclass_fields__:
            raise ValueError(f"extras must not hold {name}, which is a field of CacheConfig")
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError):
            raise ValueError(f"extras must hold JSON values, got {name} = {value!r}") from None
    return dict(extras)


def _refuse_idle(idle: set[str], reader: str) -> None:
    if idle:
        raise ValueError(f"{min(idle)} has no effect with {reader}: drop it")


def _check_choice(name: str, value: object, allowed: Sequence[str], optional: bool = False) -> None:
    if not (value in allowed or (optional and value is None)):
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")


def _check_range(name: str, value: object, low: int, high: int, optional: bool = False) -> None:
    if optional and value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ValueError(f"{name} must be a whole number from {low} to {high}, got {value!r}")


def _check_number(name: str, value: object, low: float, high: float, optional: bool = False) -> None:
    if optional and value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise ValueError(f"{name} must be a number from {low:g} to {high:g}, got {value!r}")


def _check_mask(mask: Sequence[int]) -> None:
    if not isinstance(mask, list | tuple):
        raise ValueError(f"mask must be a list of step indices, got {mask!r}")
    whole = all(isinstance(step, int) and not isinstance(step, bool) for step in mask)
    rising = whole and all(earlier < later for earlier, later in itertools.pairwise(mask))
    if not rising or not mask or mask[0] != 0:
        raise ValueError(f"mask must be increasing step indices that begin with 0, got {list(mask)}")
