"""The named caches, and settings that change them."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from cache_functions.config import BEST, OPEN_TO_BEST, CacheConfig, cache_defaults
from cache_functions.schedules import schedule_settings
from cache_functions.solver import SOLVER
from taylor_utils import basis_settings

CACHES: dict[str, Callable[[], CacheConfig]] = {
    "best": CacheConfig.best,
    "taylorseer": CacheConfig.taylorseer,
    "hicache": CacheConfig.hicache,
    "off": CacheConfig.off,
}


def cache_with(name: str | None, base: CacheConfig, given: Mapping[str, Any]) -> CacheConfig:
    """Change settings of one of CACHES, or of `base`.

    If `base` is `best` and a given setting is one that `best` chooses, the settings change `taylorseer` instead.
    Settings of a schedule or basis that is replaced return to their defaults.

    Args:
        name: name in CACHES; None is `base`.
        given: fields of `CacheConfig`.

    Raises:
        ValueError: if a setting is out of range, or has no effect.
    """
    if name is not None:
        base = CACHES[name]()
        chosen = sorted(set(given) - set(OPEN_TO_BEST)) if base.schedule == BEST else []
        if chosen:
            raise ValueError(f"{chosen[0]} is chosen by cache best: drop it, or drop best")
    elif base.schedule == BEST and set(given) - set(OPEN_TO_BEST):
        base = CacheConfig.taylorseer()
    if base.is_off and given:
        raise ValueError(f"{next(iter(given))} has no effect with the cache off: drop it, or take cache best")
    kept = dict(base.extras) if {"schedule", "basis"}.isdisjoint(given) else {}
    extras = {"extras": kept | dict(given.get("extras", {}))}
    return replace(base, **(_dropped(base, given) | dict(given) | extras))


def _dropped(base: CacheConfig, given: Mapping[str, Any]) -> dict[str, Any]:
    """The defaults of the settings of `base` that belong to a replaced schedule, basis or budget."""
    budget = {"full_steps", "fresh_threshold", "mask"}
    names: set[str] = set()
    if base.schedule != BEST:
        by_schedule, by_basis = {*schedule_settings(base.schedule)}, {*basis_settings(base.basis), "max_order"}
        if given.get("schedule", base.schedule) != base.schedule:
            names |= (by_schedule | {"full_steps"}) - by_basis
        if given.get("basis", base.basis) != base.basis:
            names |= (by_basis | {"calibration"}) - (by_schedule - {"max_order"})
    if budget & set(given):
        names |= budget
    if base.target == SOLVER and given.get("target", SOLVER) != SOLVER:
        names |= {"schedule", "calibration", *budget}
    return {name: default for name, default in cache_defaults().items() if name in names}
