"""Fits a drawing to a GPU: the choice where memory is short, and the error where it does not suffice."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from hi_diffusers.memory.plan import (
    CUDA_RESERVE,
    STRATEGIES,
    Demand,
    MemoryPlan,
    host_memory,
    memory_budget,
    plan_memory,
    ways_out,
)
from hi_diffusers.request.drawing import Drawing
from hi_diffusers.request.placement import Placement, resolve_dtype
from hi_diffusers.weights.source import GIB, ModelSource


def describe(drawing: Drawing, source: ModelSource, placement: Placement, device: torch.device, **more: Any) -> Demand:
    """The memory demand of a drawing on a device.

    Args:
        device: the device that draws; its default dtype is used if the placement names none.
        more: `batch_size` and what else of `Demand` differs from its defaults.
    """
    settings = {"encoders_elsewhere": placement.encoder_device is not None, "fp8": placement.fp8} | more
    return Demand(drawing, source, resolve_dtype(placement.dtype, device), **settings)


def kept_as(placement: Placement, memory: MemoryPlan) -> Placement:
    """The placement with the offloading and tiling that the plan chose."""
    strategy = STRATEGIES[memory.strategy or "resident"]
    return replace(placement, offload=strategy.offload, tiled=memory.tiled)


def fit(demand: Demand, device: torch.device, vram: float | None) -> tuple[MemoryPlan, list[str]]:
    """Choose how a drawing is kept on a device.

    Args:
        vram: GiB of the GPU's memory that may be used; None is what is free.

    Returns:
        The plan, and sentences about what was chosen or has no effect.

    Raises:
        ValueError: if it does not fit, naming settings with which it would.
    """
    budget, notices = memory_budget(device, vram), []
    memory = plan_memory(demand, budget, host_memory())
    if demand.drawing.cache.anchor_device == device.type:
        notices.append(f"--anchor_device {device.type} has no effect: it is where the pictures are drawn")
    if budget is None:
        if vram is not None:
            notices.append(f"--vram has no effect on {device.type}")
        return memory, notices
    if memory.choice is None:
        raise ValueError(f"{memory.sentence()}: give {', or '.join(ways_out(demand, budget, host_memory()))}")
    return memory, [*notices, memory.sentence()]


@contextmanager
def explained(demand: Demand, device: torch.device, vram: float | None) -> Iterator[None]:
    """A context in which running out of memory raises a RuntimeError that says what would help.

    Args:
        vram: as in `fit`.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        whole = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0
        limit = whole if vram is None else min(whole, int(vram * GIB))
        ways = ways_out(demand, limit - CUDA_RESERVE, host_memory())
        raise RuntimeError(f"out of memory: close other programs on the GPU, or give {', or '.join(ways)}") from error
