"""Begins a step: decides whether it is full or forecast, and with which weights."""

from cache_functions.budget import given_settings
from cache_functions.calibration import Calibration
from cache_functions.schedules import find_schedule
from cache_functions.state import CacheState, Current, StepKind
from taylor_utils import basis_settings, basis_weights


def cal_type(cache_dic: CacheState | None, current: Current, step: int | None = None) -> StepKind:
    """Begin a step and decide whether it is full or forecast. Called once per step, before the network.

    Args:
        cache_dic: the generation's anchors, or None without a cache, when every step is full.
        current: its `step`, `kind` and `weights` are set.
        step: index of the step; None is the next one.

    Returns:
        `current.kind`.

    Raises:
        ValueError: if the generation has no further step.
    """
    step = current.step + 1 if step is None else step
    if step >= current.num_steps:
        raise ValueError(f"num_steps was {current.num_steps} in cache_init, and all of these steps are done")
    current.step = step
    if cache_dic is None:
        return current.kind
    cache_dic.close_step()
    is_full = _is_full(cache_dic, current)
    weighs = cache_dic.full_steps and (not is_full or cache_dic.watches_errors)
    current.weights = _weights(cache_dic, current.step) if weighs else ()
    current.kind = "full" if is_full else "forecast"
    if is_full:
        cache_dic.full_steps.append(current.step)
    return current.kind


def make_full(cache_dic: CacheState, current: Current) -> None:
    """Make the running forecast step a full one, before anything of it was forecast, and drop what was kept."""
    cache_dic.start_over(current.step)
    current.kind, current.weights = "full", ()


def _is_full(cache_dic: CacheState, current: Current) -> bool:
    """Ask the schedule; the first step is always full, since nothing is kept yet."""
    if not cache_dic.full_steps:
        return True
    if cache_dic.plan is not None:
        return current.step in cache_dic.plan
    schedule, settings = find_schedule(cache_dic.config.schedule), given_settings(cache_dic.config)
    return bool(schedule.is_full(current.step, cache_dic.full_steps, cache_dic.errors, current.num_steps, **settings))


def _weights(cache_dic: CacheState, step: int) -> tuple[float, ...]:
    config = cache_dic.config
    gram = config.calibration.gram if isinstance(config.calibration, Calibration) else None
    measured = {"sigmas": cache_dic.sigmas, "gram": gram}
    settings = config.values(basis_settings(config.basis), measured)
    return tuple(basis_weights(config.basis, cache_dic.anchor_steps, step, config.max_order, **settings))
