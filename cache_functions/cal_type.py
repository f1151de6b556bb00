"""The beginning of a step: full or forecast, and with which weights."""

from cache_functions.schedules import is_full_step
from cache_functions.state import CacheState, Current, StepKind
from taylor_utils import basis_weights


def cal_type(cache_dic: CacheState | None, current: Current) -> StepKind:
    """Begin the next step and decide how it is done. Called once per step, before the network.

    Args:
        cache_dic: the generation's anchors, or None without a cache, when every step is full.
        current: advanced by one step; `kind` and `weights` are set.

    Returns:
        `current.kind`.

    Raises:
        ValueError: if the generation has no further step.
    """
    if current.step + 1 >= current.num_steps:
        raise ValueError(f"cache_init was told of {current.num_steps} steps, and all of them are done")
    current.step += 1
    if cache_dic is None:
        return current.kind
    config = cache_dic.config
    if is_full_step(current.step, cache_dic.full_steps, current.num_steps, config):
        cache_dic.full_steps.append(current.step)
        current.kind, current.weights = "full", ()
    else:
        anchors = cache_dic.anchor_steps
        weights = basis_weights(config.basis, anchors, current.step, config.max_order, **config.basis_settings)
        current.kind, current.weights = "forecast", tuple(weights)
    return current.kind
