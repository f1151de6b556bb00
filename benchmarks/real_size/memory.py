"""The most memory of a drawing's stages, planned, and of the tensors that are alive on a pretended device.

Everything is resident there. What the other ways keep on the card is the weights' bytes, counted one by one.
"""

import itertools
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.pretended import Alive
from benchmarks.real_size.model import CACHES, build_pretended, drawings, in_tiles, stage_peaks
from cache_functions import CacheConfig
from hi_diffusers.families.hidream.pipeline import HiDreamImagePipeline
from hi_diffusers.families.table import PRESETS
from hi_diffusers.memory.plan import CUDA_RESERVE, STRATEGIES, Demand, MemoryPlan, plan_memory
from hi_diffusers.request.drawing import Drawing
from hi_diffusers.weights.source import GIB, ModelSource

PRECISIONS = ("bf16", "nf4", "fp8")
CARDS = (8, 12, 16, 24, 32, 48, 80)  # GiB, as --vram counts
TRACKED = tuple(name for name, one in STRATEGIES.items() if one.tracked)


@dataclass(frozen=True)
class Row:
    """One drawing; pairs are GiB, planned and tracked.

    Attributes:
        tensors: of each stage, without weights.
        peaks: of each way to keep the model, at its worst stage.
        largest_error: of all peaks, relative.
    """

    model: str
    precision: str
    cache: str
    batch_size: int
    tensors: dict[str, tuple[float, float]]
    peaks: dict[str, tuple[float, float]]
    largest_error: float


@dataclass(frozen=True)
class Tracked:
    """The tensors that were alive.

    Attributes:
        weights: component -> bytes.
        tensors: stage -> the most bytes beside them.
    """

    weights: Mapping[str, int]
    tensors: Mapping[str, int]

    @classmethod
    def of(cls, pipe: HiDreamImagePipeline, batch: list[Drawing], device: torch.device) -> "Tracked":
        """Draw a batch."""
        alive = Alive.beside(pipe, device)
        return cls(dict(alive.models), stage_peaks(pipe, batch, alive))

    def peak(self, plan: MemoryPlan, strategy: str, tiled: bool = False) -> int:
        """Bytes on the card at the worst moment, with the weights that a strategy keeps there."""
        there = MemoryPlan(dict(self.weights), plan.encoders, plan.stages, elsewhere=plan.elsewhere)
        return max(
            there.at(strategy, stage, tiled)
            - sum((stage.tiled if tiled else stage.tensors).values())
            + self.tensors[stage.name]
            for stage in plan.stages
        )


def track_memory(device: torch.device) -> list[dict[str, Any]]:
    """The most memory of each stage and strategy; a row for each drawing."""
    rows = []
    for name, precision in tqdm(list(itertools.product(("full", "dev", "fast"), PRECISIONS)), unit="model"):
        preset, source = PRESETS[name], ModelSource(quantization="nf4" if precision == "nf4" else "none")
        pipe = build_pretended(preset, device, source.quantization, fp8=precision == "fp8")
        caches = ("off", "module", "residual", "velocity", "x0") if name == "full" else ("off", "x0")
        for cache, count in itertools.product(caches, (1, 4)):
            batch = drawings(preset, CACHES[cache], count)
            tracked = Tracked.of(pipe, batch, device)
            plan = plan_memory(Demand(batch[0], source, torch.bfloat16, count, fp8=pipe.fp8))
            peaks = {strategy: (plan.peak(strategy), tracked.peak(plan, strategy)) for strategy in TRACKED}
            tensors = {one.name: (sum(one.tensors.values()), tracked.tensors[one.name]) for one in plan.stages}
            error = max(abs(planned / there - 1) for planned, there in peaks.values())
            row = Row(name, precision, cache, count, _in_gib(tensors), _in_gib(peaks), round(error, 5))
            rows.append(asdict(row))
    return rows


def track_cards(device: torch.device) -> list[dict[str, Any]]:
    """What is chosen on cards of several sizes for a whole picture of Full, and the memory that it takes there."""
    rows, full = [], PRESETS["full"]
    for quantization in ("none", "nf4"):
        pipe, source = build_pretended(full, device, quantization), ModelSource(quantization=quantization)
        for name, cache in (("best", CacheConfig.best()), ("taylorseer", CacheConfig.taylorseer())):
            (drawing,) = drawings(full, cache, num_steps=full.num_steps)
            whole = Tracked.of(pipe, [drawing], device)
            with in_tiles(pipe):
                short = Tracked.of(pipe, drawings(full, CacheConfig.off(), num_steps=2), device)
            in_parts = Tracked(whole.weights, {**whole.tensors, "decode": short.tensors["decode"]})
            for card in CARDS:
                plan = plan_memory(Demand(drawing, source), card * GIB - CUDA_RESERVE)
                rows.append(
                    {"quantization": quantization, "cache": name, "card_gib": card} | _choice(plan, whole, in_parts)
                )
    return rows


def _choice(plan: MemoryPlan, whole: Tracked, in_tiles: Tracked) -> dict[str, Any]:
    if plan.choice is None:
        return {"way": None}
    way, tiled = plan.choice
    tracked = (in_tiles if tiled else whole).peak(plan, way, tiled) if way in TRACKED else None
    return {
        "way": way,
        "tiled": tiled,
        "planned_gib": round(plan.peak(way, tiled) / GIB, 2),
        "tracked_gib": tracked and round(tracked / GIB, 2),
    }


def _in_gib(pairs: Mapping[str, tuple[int, int]]) -> dict[str, tuple[float, float]]:
    return {name: (round(planned / GIB, 3), round(there / GIB, 3)) for name, (planned, there) in pairs.items()}
