"""The initial state of a generation."""

from collections.abc import Sequence
from dataclasses import replace

from cache_functions.budget import planned_full_steps, settle
from cache_functions.calibration import Calibration
from cache_functions.config import BEST, MAX_STEPS, CacheConfig
from cache_functions.schedules import decides_on_the_way
from cache_functions.solver import SOLVER
from cache_functions.state import CacheState, Current


def cache_init(config: CacheConfig, num_steps: int, sigmas: Sequence[float] = ()) -> tuple[CacheState | None, Current]:
    """Start a generation.

    Args:
        config: target None is taken as "module"; an open budget is filled in by `settle`.
        num_steps: steps of the generation, >= 1.
        sigmas: noise level of every step; read by basis newton for some abscissae.

    Returns:
        (cache_dic, current): the empty cache, None if the configuration is off, and the position before step 0.

    Raises:
        ValueError: if num_steps is out of range, or the configuration needs `resolve` first.
    """
    if isinstance(num_steps, bool) or not isinstance(num_steps, int) or not 1 <= num_steps <= MAX_STEPS:
        raise ValueError(f"num_steps must be a whole number from 1 to {MAX_STEPS}, got {num_steps!r}")
    current = Current(num_steps=num_steps)
    if config.is_off:
        return None, current
    if config.schedule == BEST or (config.basis == "learned" and not isinstance(config.calibration, Calibration)):
        raise ValueError("schedule best and basis learned need their calibration: call resolve first")
    if config.target == SOLVER:
        config.solver.check(num_steps)
    config = settle(replace(config, target=config.target or "module"), num_steps)
    plan = None if decides_on_the_way(config.schedule) else frozenset(planned_full_steps(config, num_steps))
    return CacheState(config=config, plan=plan, sigmas=tuple(sigmas)), current
