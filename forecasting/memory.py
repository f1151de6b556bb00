"""The memory that target module takes, counted before it is taken."""

from dataclasses import replace

import psutil
import torch
from torch import Tensor

from cache_functions import CacheConfig, CacheState, FeatureName, planned_full_steps
from cache_functions.schedules import decides_on_the_way


def branch_bytes(config: CacheConfig, num_steps: int, num_parts: int, feature: Tensor) -> int:
    """Bytes that target module keeps of one branch.

    Args:
        config: resolved configuration.
        num_steps: steps of the generation.
        num_parts: number of parts that are forecast.
        feature: the result of one of them.
    """
    one = CacheState(replace(config, max_order=0), frozenset())
    one.keep(FeatureName("module"), feature)
    full_steps = num_steps
    if not decides_on_the_way(config.schedule):
        full_steps = len(planned_full_steps(config, num_steps))
    return one.num_bytes() * num_parts * min(config.max_order + 1, full_steps)


def free_bytes(device: torch.device) -> int:
    """Bytes of a device's memory that can be allocated."""
    if device.type != "cuda":
        return int(psutil.virtual_memory().available)
    free, _ = torch.cuda.mem_get_info(device)
    return int(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
