"""The cache's configuration, and the state that a generation starts with."""

from dataclasses import dataclass, replace
from typing import Protocol

from cache_functions.schedules import schedule_names
from cache_functions.schedules.interval import DEFAULT_FRESH_THRESHOLD
from cache_functions.state import CacheState, Current
from taylor_utils import basis_names, basis_settings

TARGETS = ("module", "x0", "off")


class _Preset(Protocol):
    name: str


class _Options(Protocol):
    scheduler: str
    num_steps: int

    @property
    def renoises(self) -> bool: ...


@dataclass(frozen=True)
class CacheConfig:
    """How a generation is cached. Checks itself; `resolve` fills in what depends on the sampler.

    Attributes:
        target: what is forecast. "module": attention and feed-forward output of every block, image tokens (the
            paper). "x0": the guided denoised estimate. "off": nothing. None: "module", or "x0" where the sampler
            adds noise at every step.
        basis: the rule that gives the weights, see `taylor_utils.basis_names()`.
        schedule: which steps are full, see `cache_functions.schedule_names()`.
        fresh_threshold: every how many steps one is full, >= 1; None is 4.
        max_order: highest order of the expansion, 0 to 6; max_order + 1 full steps are kept.
        first_enhance: number of leading full steps, >= 1.
        last_enhance: number of final full steps, >= 0.
    """

    target: str | None = None
    basis: str = "taylor"
    schedule: str = "interval"
    fresh_threshold: int | None = None
    max_order: int = 1
    first_enhance: int = 1
    last_enhance: int = 0

    def __post_init__(self) -> None:
        if self.target is not None and self.target not in TARGETS:
            raise ValueError(f"target must be one of {', '.join(TARGETS)}, got {self.target!r}")
        if self.basis not in basis_names():
            raise ValueError(f"basis must be one of {', '.join(basis_names())}, got {self.basis!r}")
        if self.schedule not in schedule_names():
            raise ValueError(f"schedule must be one of {', '.join(schedule_names())}, got {self.schedule!r}")
        if self.fresh_threshold is not None:
            _check_range("fresh_threshold", self.fresh_threshold, 1, 1000)
        _check_range("max_order", self.max_order, 0, 6)
        _check_range("first_enhance", self.first_enhance, 1, 1000)
        _check_range("last_enhance", self.last_enhance, 0, 1000)

    @classmethod
    def off(cls) -> "CacheConfig":
        """No caching: every step is computed and nothing is kept."""
        return cls(target="off")

    @classmethod
    def taylorseer(cls, fresh_threshold: int | None = None, max_order: int = 1) -> "CacheConfig":
        """The paper's setting (arXiv 2503.06923)."""
        return cls(fresh_threshold=fresh_threshold, max_order=max_order)

    @property
    def is_off(self) -> bool:
        """Whether nothing is cached."""
        return self.target == "off"

    @property
    def basis_settings(self) -> dict[str, object]:
        """The fields that the basis takes beside anchors, step and order."""
        return {name: getattr(self, name) for name in basis_settings(self.basis) if hasattr(self, name)}

    def resolve(self, preset: _Preset, options: _Options) -> "CacheConfig":
        """Fill in what was left open, and refuse what cannot work with these options.

        Args:
            preset: the model that draws.
            options: resolved sampling options; `renoises` says whether the sampler adds noise at every step.

        Raises:
            ValueError: if the sampler does not admit the target.
        """
        return self.for_sampler(f"the {options.scheduler} scheduler of {preset.name}", options.renoises)

    def for_sampler(self, sampler: str, renoises: bool) -> "CacheConfig":
        """`resolve`, for those who have no preset.

        Args:
            sampler: what to call the sampler in a refusal.
            renoises: whether it adds noise at every step.

        Raises:
            ValueError: if the sampler does not admit the target.
        """
        if self.is_off:
            return self
        if renoises and self.target == "module":
            raise ValueError(
                f"target must be x0 with {sampler}, got 'module': the sampler"
                " adds fresh noise at every step, and block features contain noise that is drawn after the last full"
                " step"
            )
        target = self.target or ("x0" if renoises else "module")
        return replace(self, target=target, fresh_threshold=self.fresh_threshold or DEFAULT_FRESH_THRESHOLD)


def cache_init(config: CacheConfig, num_steps: int) -> tuple[CacheState | None, Current]:
    """Start a generation.

    Args:
        config: an open target is taken as "module" and an open fresh_threshold as 4.
        num_steps: steps of the generation, >= 1.

    Returns:
        (cache_dic, current): the empty cache, None if the configuration is off, and the position before step 0.

    Raises:
        ValueError: if num_steps is out of its domain.
    """
    _check_range("num_steps", num_steps, 1, 1000)
    current = Current(num_steps=num_steps)
    if config.is_off:
        return None, current
    config = replace(
        config,
        target=config.target or "module",
        fresh_threshold=config.fresh_threshold or DEFAULT_FRESH_THRESHOLD,
    )
    return CacheState(config=config), current


def _check_range(name: str, value: int, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ValueError(f"{name} must be a whole number from {low} to {high}, got {value!r}")
