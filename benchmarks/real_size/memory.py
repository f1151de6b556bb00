"""The most memory of a drawing's stages, planned, and of the tensors that are alive on a pretended device."""

import itertools
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.pretended import Alive
from benchmarks.real_size.model import CACHES, TRACKED, build_pretended, drawings, in_tiles, stage_peaks
from cache_functions import CacheConfig
from hi_diffusers.families.table import PRESETS
from hi_diffusers.memory.plan import CUDA_RESERVE, Demand, MemoryPlan, plan_memory
from hi_diffusers.weights.source import GIB, ModelSource

PRECISIONS = ("bf16", "nf4", "fp8")
CARDS = (8, 12, 16, 24, 32, 48, 80)  # GB


def track_memory(device: torch.device) -> list[dict[str, Any]]:
    """The most memory of each stage and strategy, planned and tracked; a row for each drawing."""
    rows = []
    for name, precision in tqdm(list(itertools.product(("full", "dev", "fast"), PRECISIONS)), unit="model"):
        preset, source = PRESETS[name], ModelSource(quantization="nf4" if precision == "nf4" else "none")
        pipe = build_pretended(preset, device, source.quantization, fp8=precision == "fp8")
        caches = ("off", "module", "residual", "x0") if name == "full" else ("off", "x0")
        for cache, count in itertools.product(caches, (1, 4)):
            many = drawings(preset, CACHES[cache], count)
            peaks = stage_peaks(pipe, many, Alive.beside(pipe, device))
            plan = plan_memory(Demand(many[0], source, torch.bfloat16, count, fp8=pipe.fp8))
            both = {strategy: (plan.peak(strategy), tracked_peak(plan, strategy, peaks)) for strategy in TRACKED}
            rows.append(
                {"model": name, "precision": precision, "cache": cache, "batch_size": count}
                | {"tensors_gib": {stage: round(size / GIB, 3) for stage, size in peaks.items()}}
                | {
                    strategy: {"planned_gib": _gib(planned), "tracked_gib": _gib(tracked)}
                    for strategy, (planned, tracked) in both.items()
                }
                | {"largest_error": round(max(abs(planned / tracked - 1) for planned, tracked in both.values()), 4)}
            )
    return rows


def tracked_peak(plan: MemoryPlan, strategy: str, peaks: dict[str, int], tiled: bool = False) -> int:
    """Bytes on the GPU at the worst moment: a strategy's weights, and tensors that were tracked."""
    return max(
        plan.at(strategy, stage, tiled) - sum((stage.tiled if tiled else stage.tensors).values()) + peaks[stage.name]
        for stage in plan.stages
    )


def track_cards(device: torch.device) -> list[dict[str, Any]]:
    """What is chosen on cards of several sizes for a whole picture of Full, and the memory that it takes there."""
    rows, full = [], PRESETS["full"]
    for quantization in ("none", "nf4"):
        pipe, source = build_pretended(full, device, quantization), ModelSource(quantization=quantization)
        for name, cache in (("best", CacheConfig.best()), ("taylorseer", CacheConfig.taylorseer())):
            (drawing,) = drawings(full, cache, num_steps=full.num_steps)
            peaks = {False: stage_peaks(pipe, [drawing], Alive.beside(pipe, device))}
            with in_tiles(pipe):
                (short,) = drawings(full, CacheConfig.off(), num_steps=2)
                peaks[True] = peaks[False] | {
                    "decode": stage_peaks(pipe, [short], Alive.beside(pipe, device))["decode"]
                }
            for card in CARDS:
                plan = plan_memory(Demand(drawing, source), card * GIB - CUDA_RESERVE)
                row = {"quantization": quantization, "cache": name, "card_gib": card, "way": plan.strategy}
                if plan.choice is not None:
                    way, tiled = plan.choice
                    tracked = tracked_peak(plan, way, peaks[tiled], tiled) if way in TRACKED else None
                    row |= {"tiled": tiled, "planned_gib": _gib(plan.peak(way, tiled))}
                    row |= {"tracked_gib": tracked and _gib(tracked)}
                rows.append(row)
    return rows


def _gib(size: int) -> float:
    return round(size / GIB, 2)
