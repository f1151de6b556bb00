"""A drawing and a card: what is chosen where memory is short, and what is said where it does not suffice."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import torch

from cache_functions import CacheConfig
from hi_diffusers.console import say
from hi_diffusers.loading import resolve_dtype
from hi_diffusers.memory.plan import CUDA_RESERVE, GIB, Drawing, MemoryPlan, memory_budget, plan_memory, ways_out
from hi_diffusers.model_files import ModelSource, stated_llama, stated_quantization
from hi_diffusers.options import ResolvedOptions
from hi_diffusers.placement import Placement
from hi_diffusers.presets import ModelPreset

OFFLOADS = {"offload": "model", "group offload": "group"}  # by the plan's strategies


def describe(
    preset: ModelPreset,
    options: ResolvedOptions,
    cache: CacheConfig,
    source: ModelSource,
    placement: Placement,
    device: torch.device,
    **more: Any,
) -> Drawing:
    """A drawing, with what the files on this disk say about it.

    Args:
        cache: as resolved.
        device: what draws; its usual dtype is taken where the placement names none.
        more: `batch_size` and what else of `Drawing` differs from its defaults.
    """
    path = Path(source.transformer) if source.transformer else None
    packed = path is not None and path.suffix == ".gguf" and path.is_file()
    settings = {"encoders_elsewhere": placement.encoder_device is not None, "fp8": placement.fp8} | more
    return Drawing(
        preset,
        options,
        cache,
        dtype=resolve_dtype(placement.dtype, device),
        quantization=stated_quantization(preset, source),
        llama=stated_llama(preset, source),
        packed_bytes=path.stat().st_size if path and packed else None,
        **settings,
    )


def kept_as(placement: Placement, memory: MemoryPlan) -> Placement:
    """The placement, with the plan's choice."""
    return replace(placement, offload=OFFLOADS.get(memory.strategy or "", "none"), tiled=memory.tiled)


def fit(drawing: Drawing, device: torch.device, vram: float | None) -> MemoryPlan:
    """How a drawing is kept on a device; says what was chosen.

    Args:
        vram: GiB of the card that may be used; None is what is free.

    Raises:
        ValueError: if it does not fit, with what would.
    """
    budget = memory_budget(device, vram)
    memory = plan_memory(drawing, budget)
    if drawing.cache.anchor_device == device.type:
        say(f"--anchor_device {device.type} has no effect: it is where the pictures are drawn")
    if budget is None:
        if vram is not None:
            say(f"--vram has no effect on {device.type}")
        return memory
    if memory.choice is None:
        raise ValueError(f"{memory.sentence()}: give {', or '.join(ways_out(drawing, budget))}")
    needed, there = memory.host(memory.choice[0]), psutil.virtual_memory().total
    if "offload" in memory.choice[0] and needed > there:
        raise ValueError(
            f"{memory.choice[0]} needs {needed / GIB:.1f} GiB of the host's memory, which has {there / GIB:.1f}: give"
            " --quantization nf4, or a larger --vram"
        )
    say(memory.sentence())
    return memory


@contextmanager
def explained(drawing: Drawing, device: torch.device, vram: float | None) -> Iterator[None]:
    """Running out of memory inside raises a RuntimeError that says what would help.

    Args:
        vram: as in `fit`.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        whole = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0
        limit = whole if vram is None else min(whole, int(vram * GIB))
        ways = ways_out(drawing, limit - CUDA_RESERVE)
        raise RuntimeError(f"out of memory: close what else uses the card, or give {', or '.join(ways)}") from error
