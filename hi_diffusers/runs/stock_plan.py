"""A run of a pipeline of diffusers: its decisions, its plan and its job."""

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from cache_functions import CacheConfig
from hi_diffusers import __version__
from hi_diffusers.flags import cache_from, stock_options_from, stock_source_from
from hi_diffusers.pictures.safety import SafetySettings
from hi_diffusers.request.placement import resolve_device
from hi_diffusers.runs.inputs import InputHash, with_files
from hi_diffusers.runs.plan import Plan, check_flags, check_lines, finish_plan, threads_of_run
from hi_diffusers.runs.prompt_files import OF_PIPELINES, PromptFile, PromptLine
from hi_diffusers.stock.formats import check_suffix, default_suffix
from hi_diffusers.stock.request import StockOptions, StockRequest, check_cache, decide
from hi_diffusers.stock.source import StockSource

MAX_KEPT = 256


class StockDecisions:
    """The drawings of a run.

    Args:
        source: the pipeline.
        options: options of every picture; a line may override them.
        cache: how to cache.
        calibration_dir: folder that is searched for calibrations first.
        folder: folder of the prompt file, in which the lines' pictures lie.
    """

    def __init__(
        self,
        source: StockSource,
        options: StockOptions,
        cache: CacheConfig,
        calibration_dir: Path | None,
        folder: Path,
    ):
        self.source, self.options, self.cache, self.calibration_dir = source, options, cache, calibration_dir
        self.folder = folder.resolve()
        self.inputs = InputHash()
        self._known: dict[tuple[tuple[str, Any], ...], StockRequest] = {}

    def check(self, line: PromptLine) -> tuple[str, ...]:
        """No sentences, since lines are drawn as they ask; raises ValueError if one cannot be drawn."""
        if line.overrides.get("seed") is not None:
            replace(self.options, seed=line.overrides["seed"])
        decided = self._of_overrides(line.overrides).again(line.prompt, 0)
        if {"image", "mask"} & set(line.overrides):
            self.inputs.add((*decided.image_hashes, *([decided.mask_hash] if decided.mask_hash else [])))
        return ()

    def drawing(self, line: PromptLine, seed: int) -> StockRequest:
        """One picture of a line."""
        return self._of_overrides(line.overrides).again(line.prompt, seed)

    def _of_overrides(self, overrides: Mapping[str, Any]) -> StockRequest:
        own = {name: value for name, value in overrides.items() if name != "seed"}
        key = tuple(sorted(own.items()))
        if key not in self._known:
            if len(self._known) == MAX_KEPT:
                self._known.clear()
            own = with_files(own, self.folder)
            if "image" in own:
                own["images"] = (own.pop("image"),)
            self._known[key] = decide(self.source, replace(self.options, **own), self.cache, self.calibration_dir)
        return self._known[key]


@dataclass(frozen=True)
class StockJob:
    """The settings that a worker needs; can be pickled. Attributes as in `StockDecisions` and `Job`."""

    source: StockSource
    options: StockOptions
    cache: CacheConfig
    calibration_dir: Path | None
    folder: Path
    suffix: str
    add_metadata: bool
    threads: int
    safety: SafetySettings | None

    @property
    def device(self) -> str:
        """The device that draws."""
        return self.source.device


def make_stock_plan(args: argparse.Namespace) -> Plan[StockDecisions]:
    """Check everything that the user gave; raises ValueError or OSError with one sentence."""
    check_flags(args)
    source = stock_source_from(args)
    pipeline = source.pipeline_class
    args.format = args.format or default_suffix(pipeline.is_video).removeprefix(".")
    check_suffix(Path(f"x.{args.format}"), pipeline.is_video)
    prompts = PromptFile(args.prompt_file, args.raw_lines, OF_PIPELINES)
    stamp = prompts.stamp()
    first = next(iter(prompts), None)
    options = stock_options_from(args, first.prompt if first is not None else "")
    steps = options.num_steps or source.default("num_steps")
    cache = cache_from(args, CacheConfig.best(), steps)
    cache.check_batch(args.batch_size)
    decisions = StockDecisions(source, options, cache, args.calibration_dir, args.prompt_file.parent)
    num_prompts, notices = check_lines(prompts, decisions)
    assert first is not None, "check_lines refuses an empty file"
    notices += decisions.drawing(first, 0).notices
    return finish_plan(args, prompts, stamp, decisions, num_prompts, notices)


def make_stock_job(plan: Plan[StockDecisions]) -> StockJob:
    """The job for the workers."""
    args, decisions = plan.args, plan.decisions
    device = args.device if args.engine == "ray" and args.device != "auto" else str(resolve_device(args.device))
    return StockJob(
        source=replace(decisions.source, device=device),
        options=decisions.options,
        cache=decisions.cache,
        calibration_dir=decisions.calibration_dir,
        folder=decisions.folder,
        suffix=plan.numbering.suffix,
        add_metadata=args.add_sampling_metadata,
        threads=args.threads or threads_of_run(args.output_dir) or torch.get_num_threads(),
        safety=plan.safety,
    )


def stock_configuration(plan: Plan[StockDecisions], job: StockJob) -> dict[str, Any]:
    """The settings that determine the pictures, for run.json; without those that only select or place work."""
    args, source = plan.args, job.source
    first = plan.decisions.drawing(next(iter(plan.prompts)), 0)
    assert first.shelf is not None
    settled = check_cache(first, job.cache, first.shelf).config
    fixed = {
        "pipeline": source.pipeline_class.class_name,
        "model": source.fingerprint,
        "files": source.files_fingerprint,
        "loras": source.lora_hashes,
        "device": source.device.partition(":")[0],
        "dtype": source.dtype,
        "compiled": source.compiled,
        "attention_backend": source.attention_backend,
        "threads": job.threads,
        "prompts": {"sha256": plan.prompts.sha256(), "count": plan.numbering.num_prompts, "raw_lines": args.raw_lines},
        "options": dict(first.options),
        **({"mask_image": first.mask_hash} if args.mask_image else {}),
        "images": list(first.image_hashes) if args.image else plan.decisions.inputs.values(),
        "cache": {"target": "off"} if settled.is_off else settled.settings(),
        "num_images_per_prompt": args.num_images_per_prompt,
        "batch_size": args.batch_size,
        "format": args.format,
        "add_sampling_metadata": args.add_sampling_metadata,
        "nsfw_filter": {"model": plan.safety.model, "threshold": plan.safety.threshold} if plan.safety else None,
    }
    return {"fixed": fixed, "first": {"software": f"hi-diffusers {__version__}", "prompt_file": plan.prompts.path.name}}
