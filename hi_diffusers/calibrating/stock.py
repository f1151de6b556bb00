"""The calibration of a pipeline of diffusers: the checked request, and its uncached pictures."""

import argparse
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cache_functions import CacheConfig, CalibrationKey
from cache_functions.config import ON_LATENTS
from cache_functions.optimum import MAX_CALIBRATED_STEPS
from forecasting import StepSeen
from forecasting.levels import Levels, prediction_of, renoises, sampler_of
from hi_diffusers.calibrating.uncached import Uncached
from hi_diffusers.flags import stock_options_from
from hi_diffusers.stock.drawing import StockModel
from hi_diffusers.stock.request import StockRequest, decide, drawn_steps, find_scheduler, guidance_text
from hi_diffusers.stock.source import StockSource
from hi_diffusers.weights.identity import default_calibration_dir


@dataclass(frozen=True)
class StockPlan:
    """The request, checked as far as possible without reading weights.

    Attributes:
        requests: one per prompt, uncached; the first `num_fitted` fit the matrix, the others choose.
        budgets: numbers of full steps, the largest first.
        targets: what is calibrated, one file per target.
        folder: folder that the files are written to.
        batch_size: pictures per batch.
    """

    requests: tuple[StockRequest, ...]
    num_fitted: int
    budgets: tuple[int, ...]
    targets: tuple[str, ...]
    folder: Path
    batch_size: int

    @property
    def num_pictures(self) -> int:
        """Number of all pictures."""
        return len(self.requests)

    @property
    def first(self) -> StockRequest:
        """The first request; all share its options."""
        return self.requests[0]

    @property
    def stem(self) -> str:
        """The beginning of its files' names."""
        first = self.first
        size = "".join(f"-{first.options[name]}" for name in ("width", "height", "num_frames") if name in first.options)
        model = (
            f"{first.source.pipeline_class.class_name.removesuffix('Pipeline').lower()}-{first.source.fingerprint[:8]}"
        )
        told = hashlib.sha256(repr(self.key("")).encode()).hexdigest()[:8]
        return f"{model}{size}-{first.num_steps}-guidance{first.guidance:g}-{told}"

    def path(self, target: str) -> Path:
        """The file of a target; its name tells all that its key does, and the size."""
        return self.folder / f"{self.stem}-{target}.json"

    def key(self, target: str) -> CalibrationKey:
        """The key of a target's calibration file."""
        first, scheduler = self.first, find_scheduler(self.first.source)
        others = guidance_text(first.source.pipeline_class, first.options)
        sampler = sampler_of(scheduler, drawn_steps(first, scheduler), first.guidance)
        return sampler.key(first.source.model_key(others), target)


class StockUncached(Uncached):
    """The uncached pictures or videos of a pipeline of diffusers.

    Args:
        model: the pipeline.
    """

    plan: StockPlan

    def __init__(self, model: StockModel, plan: StockPlan, folder: Path):
        super().__init__(plan, folder)
        self.model = model
        self._sigmas: tuple[float, ...] = ()

    @property
    def scheduler(self) -> Any:
        """The pipeline's scheduler."""
        return self.model.pipe.scheduler

    @property
    def sigmas(self) -> tuple[float, ...]:
        """See `Uncached`; they may depend on what is drawn."""
        if not self._sigmas:  # all pictures were drawn by an earlier run
            next(self.draw([0]))
        return self._sigmas

    @property
    def corrects(self) -> bool:
        """See `Uncached`."""
        return not renoises(self.scheduler)

    def draw(self, indices: list[int]) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        """See `Uncached`."""
        x0: list[Tensor] = []
        outputs: list[Tensor] = []

        def observe(seen: StepSeen) -> None:
            if seen.x0 is None:
                name = type(self.scheduler).__name__
                raise ValueError(f"pipeline cannot be calibrated: the noise levels of {name} are not known")
            x0.append(seen.x0.cpu())
            outputs.append(seen.output.float().cpu())

        results = self.model.draw([self.plan.requests[i] for i in indices], observe=observe)
        self._sigmas = (*Levels.of(self.scheduler).relative, 0.0)
        features = {"x0": torch.stack(x0, dim=1)}
        if "velocity" in self.plan.targets:
            features["velocity"] = torch.stack(outputs, dim=1)
        for row, result in enumerate(results):
            yield {name: values[row] for name, values in features.items()}, torch.from_numpy(result.pixels)

    def draw_cached(self, indices: Sequence[int], cache: CacheConfig) -> Iterator[Any]:
        """See `Uncached`."""
        for result in self.model.draw([replace(self.plan.requests[i], cache=cache) for i in indices]):
            yield result.pixels


def make_stock_plan(args: argparse.Namespace, source: StockSource, prompts: Sequence[str], budgets: Any) -> StockPlan:
    """Check everything that the user gave.

    Args:
        source: the pipeline.
        prompts: what is drawn, or the numbers of classes.
        budgets: (text of --full_steps, number of steps) -> the budgets.

    Raises:
        ValueError: one sentence naming what is wrong.
    """
    if args.lora:
        raise ValueError("lora cannot be calibrated: a drawing with LoRA uses the base model's calibration")
    if len(prompts) <= args.num_held_out:
        raise ValueError(f"num_held_out must be below the {len(prompts)} prompts, got {args.num_held_out}")
    first = decide(source, stock_options_from(args, prompts[0]), CacheConfig.off())
    requests = tuple(first.again(prompt, args.seed + index) for index, prompt in enumerate(prompts))
    if first.num_steps > MAX_CALIBRATED_STEPS:
        raise ValueError(f"num_steps must be at most {MAX_CALIBRATED_STEPS} to be calibrated, got {first.num_steps}")
    if "strength" in first.options and first.options["strength"] < 1:
        raise ValueError("strength must be 1 to be calibrated: a calibration is of whole schedules")
    return StockPlan(
        requests=requests,
        num_fitted=len(prompts) - args.num_held_out,
        budgets=budgets(args.full_steps, first.num_steps),
        targets=_targets(args.target, first),
        folder=args.calibration_dir or default_calibration_dir(),
        batch_size=args.batch_size if not first.images else 1,
    )


def _targets(asked: str | None, request: StockRequest) -> tuple[str, ...]:
    """The targets that can be calibrated with the pipeline's scheduler."""
    scheduler = find_scheduler(request.source)
    # what an error in predicted noise costs grows with 1 / alpha, which the schedule's search does not know
    admitted = ("x0",) if renoises(scheduler) or prediction_of(scheduler) == "epsilon" else ON_LATENTS
    if asked is not None and asked not in admitted:
        raise ValueError(f"target must be {' or '.join(admitted)} with {type(scheduler).__name__}, got {asked!r}")
    return (asked,) if asked else tuple(admitted)
