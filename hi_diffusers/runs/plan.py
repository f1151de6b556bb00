"""From the flags of a run to a plan: everything is checked before weights are read."""

import argparse
import functools
import math
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cache_functions import CacheConfig, CalibrationShelf, resolve
from hi_diffusers import __version__
from hi_diffusers.identity import ModelIdentity, cache_folder, encoders_fingerprint, find_calibrations
from hi_diffusers.model_files import locate
from hi_diffusers.options import SamplingOptions, cache_from, options_from, placement_from, source_from
from hi_diffusers.presets import ModelPreset, find_preset
from hi_diffusers.runs.job import Job
from hi_diffusers.runs.manifest import RUN_FILE, read_run
from hi_diffusers.runs.prompt_files import PromptFile
from hi_diffusers.runs.units import Numbering, Shard, Task, find_shard
from hi_diffusers.safety import SafetySettings, safety_from

if TYPE_CHECKING:
    from hi_diffusers.memory.plan import Drawing

DEFAULT_EMBEDS_GB = 20.0
MOST = {"num_images_per_prompt": 10_000, "batch_size": 1_024, "threads": 1_024, "ray_workers": 10_000}
MAX_PICTURES = 10**8


@dataclass(frozen=True)
class Plan:
    """All that was asked for, checked as far as that goes without reading weights.

    Attributes:
        base: options of every picture but prompt and seed.
        cache: as asked for; resolved for each picture's own options.
        asked: which pictures this command is for, [num_pictures], bool.
        notices: sentences about what was understood differently from what one may expect.
    """

    args: argparse.Namespace
    preset: ModelPreset
    prompts: PromptFile
    stamp: tuple[int, int]
    base: SamplingOptions
    cache: CacheConfig
    calibrations: CalibrationShelf | None
    numbering: Numbering
    shard: Shard
    asked: np.ndarray
    safety: SafetySettings | None
    notices: tuple[str, ...]

    def units(self, due: np.ndarray) -> Iterator[list[Task]]:
        """The units that hold a picture that is due, in order.

        Raises:
            ValueError: if the prompt file has changed since the plan was made.
        """
        for unit in self.numbering.units(self.prompts, due):
            self._check_unchanged()
            yield unit
        self._check_unchanged()  # a file that became shorter ends here

    def _check_unchanged(self) -> None:
        if self.prompts.stamp() != self.stamp:
            raise ValueError(f"prompt_file {self.prompts.path} was changed while it was drawn")


def make_plan(args: argparse.Namespace) -> Plan:
    """Check everything that the user gave.

    Raises:
        ValueError, OSError: one sentence naming what is wrong.
    """
    check_flags(args)
    preset = find_preset(args.model_type or "nano")
    prompts = PromptFile(args.prompt_file, args.raw_lines)
    stamp = prompts.stamp()
    base = options_from(args, "", {})
    resolved = base.resolve(preset)
    cache = cache_from(args, preset.cache, resolved.num_steps)
    calibrations = find_calibrations(preset, source_from(args), args.calibration_dir)
    resolution = resolve(cache, resolved.sampler(preset), calibrations)
    resolution.config.check_batch(args.batch_size)

    @functools.lru_cache(maxsize=1024)
    def notices_of(options: SamplingOptions) -> tuple[str, ...]:
        own = options.resolve(preset)
        resolve(cache, own.sampler(preset), calibrations)
        return own.notices

    num_prompts, of_lines = check_lines(prompts, base, notices_of)
    notices = [*resolved.notices, *resolution.notices, *of_lines]
    if num_prompts * args.num_images_per_prompt > MAX_PICTURES:
        raise ValueError(f"num_images_per_prompt {args.num_images_per_prompt} makes more than {MAX_PICTURES} pictures")
    numbering = Numbering(num_prompts, args.num_images_per_prompt, args.seed, f".{args.format}", args.batch_size)
    shard, told_by = find_shard(args.shard) if args.engine == "local" else (Shard(), None)
    if told_by is not None:
        notices.append(f"shard {shard.index}/{shard.count}, by {told_by}")
    return Plan(
        args=args,
        preset=preset,
        prompts=prompts,
        stamp=stamp,
        base=base,
        cache=cache,
        calibrations=calibrations,
        numbering=numbering,
        shard=shard,
        asked=numbering.of_prompts(args.indices, args.limit) & numbering.of_shard(shard),
        safety=safety_from(args),
        notices=tuple(notices),
    )


def check_lines(
    prompts: PromptFile, base: SamplingOptions, notices_of: Callable[[SamplingOptions], tuple[str, ...]]
) -> tuple[int, list[str]]:
    """Read the whole file once.

    Args:
        prompts: the file.
        base: options of every picture, which a line's own replace.
        notices_of: what is to be said of options; raises ValueError if they cannot be drawn.

    Returns:
        The number of prompts, and sentences about lines that are drawn differently from what they ask.

    Raises:
        ValueError: naming the first line that cannot be read or drawn, or because there is none.
    """
    notices: list[str] = []
    num_prompts = num_noted = 0
    for line in prompts:
        num_prompts += 1
        if line.overrides:
            try:
                own = replace(base, prompt=line.prompt, **line.overrides)
                noted = notices_of(replace(own, prompt="", seed=0, negative_prompt="x" if own.negative_prompt else ""))
            except ValueError as error:
                raise prompts.complaint(line.line, str(error)) from error
            if noted and not num_noted:
                notices.append(f"line {line.line} of {prompts.path}: {noted[0]}")
            num_noted += bool(noted)
    if num_noted > 1:
        notices.append(f"the same or its like is true of {num_noted - 1} more lines")
    if not num_prompts:
        raise ValueError(f"prompt_file must hold a prompt, got {prompts.path}, which has none")
    return num_prompts, notices


def check_flags(args: argparse.Namespace) -> None:
    """Refuse numbers out of their domain, and flags that contradict each other or would have no effect."""
    for name, most in MOST.items():
        if (value := getattr(args, name)) is not None and not 1 <= value <= most:
            raise ValueError(f"{name} must be 1 to {most}, got {value}")
    if args.embeds_cache_gb is not None and not 0 <= args.embeds_cache_gb < math.inf:
        raise ValueError(f"embeds_cache_gb must not be negative, got {args.embeds_cache_gb:g}")
    if args.embeds_cache_gb is not None and args.embeds is not None:
        raise ValueError("embeds_cache_gb has no effect on --embeds, of which nothing is removed")
    if args.raw_lines and args.prompt_file.suffix.lower() != ".txt":
        raise ValueError(f"raw_lines has no effect on {args.prompt_file}: it is about .txt files")
    if args.encode_only and args.embeds is None:
        raise ValueError("encode_only needs --embeds FOLDER, where the embeddings are to go")
    for name in ("output_dir", "verify", "use_nsfw_filter", "add_sampling_metadata"):
        if args.encode_only and getattr(args, name):
            raise ValueError(f"{name} has no effect with --encode_only")
    if args.encode_only and args.engine == "ray":
        raise ValueError("engine ray draws, it does not encode: drop --encode_only, or use shards")
    if args.output_dir is None and not args.encode_only:
        raise ValueError("output_dir must be given: the folder of the run")
    for name in ("ray_address", "ray_workers"):
        if getattr(args, name) is not None and args.engine != "ray":
            raise ValueError(f"{name} has no effect without --engine ray")
    if args.engine == "ray":
        from hi_diffusers.runs.ray_engine import check_reachable

        if args.shard is not None:
            raise ValueError(f"shard {args.shard} has no effect with --engine ray, which hands out all units")
        check_reachable(args.ray_address)
    name = "embeds" if args.encode_only else "output_dir"
    folder = getattr(args, name)
    if folder == Path() or not folder.parent.is_dir() or (folder.exists() and not folder.is_dir()):
        raise ValueError(f"{name} must be a folder, or a new one in an existing folder, got {str(folder)!r}")


def make_job(plan: Plan) -> Job:
    """What the workers need to know, with the model's files looked at.

    Raises:
        ValueError: if the device, the model's files or embeddings are not to be had.
    """
    import torch

    from hi_diffusers.embeds import embeds_folder
    from hi_diffusers.loading import DTYPES, resolve_device, resolve_dtype

    args = plan.args
    placement = placement_from(args)
    if args.engine == "ray" and args.device != "auto":
        device = torch.device(args.device)  # the workers', whatever this host has
    else:
        device = resolve_device(args.device)
    if device.type == "cuda" and args.engine == "local":
        rank = int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")))
        device = torch.device("cuda", rank % torch.cuda.device_count())
    dtype = resolve_dtype(args.dtype or "auto", device)
    dtype_name = next(name for name, known in DTYPES.items() if known == dtype)
    encodes = args.embeds is None or args.encode_only
    parts = "encoders" if args.encode_only else "all" if encodes else "drawing"
    source = source_from(args)
    files = locate(plan.preset, source, parts)
    threads = args.threads or _threads_of_run(args.output_dir) or torch.get_num_threads()
    root = args.embeds or cache_folder() / "embeds"
    if encodes:
        encodes_on = device.type
        if placement.encoder_device is not None:
            encodes_on = resolve_device(placement.encoder_device).type
        place = encodes_on if encodes_on != "cpu" else f"cpu{threads}"
        embeds = embeds_folder(root, encoders_fingerprint(files, source.quantization), dtype_name, place)
        embeds.mkdir(parents=True, exist_ok=True)
    else:
        embeds = _only_folder(root)
    limit_gb = DEFAULT_EMBEDS_GB if args.embeds_cache_gb is None else args.embeds_cache_gb
    return Job(
        model_type=plan.preset.name,
        source=source,
        placement=replace(placement, device=str(device), dtype=dtype_name),
        calibration_dir=args.calibration_dir,
        base=plan.base,
        cache=plan.cache,
        suffix=plan.numbering.suffix,
        add_metadata=args.add_sampling_metadata,
        threads=threads,
        embeds=embeds,
        embeds_cache_gb=limit_gb if args.embeds is None else None,
        encodes=encodes,
        safety=plan.safety,
    )


def fit_job(plan: Plan, job: Job) -> Job:
    """The job, kept on its device as its memory admits.

    Raises:
        ValueError: if it does not fit.
    """
    import torch

    from hi_diffusers.loading import check_placement
    from hi_diffusers.memory.fitting import fit, kept_as

    if plan.args.engine == "ray":
        return job  # the workers' cards are not this host's
    check_placement(job.placement)
    memory = fit(_drawing(plan, job), torch.device(job.placement.device), plan.args.vram)
    if memory.strategy == "free encoders":  # what is encoded before the drawing must be there when it is drawn
        job = replace(job, embeds_cache_gb=None, frees_encoders=True)
    return replace(job, placement=kept_as(job.placement, memory))


def explain_memory(plan: Plan, job: Job) -> AbstractContextManager[None]:
    """See `hi_diffusers.memory.fitting.explained`."""
    import torch

    from hi_diffusers.memory.fitting import explained

    return explained(_drawing(plan, job), torch.device(job.placement.device), plan.args.vram)


def _drawing(plan: Plan, job: Job) -> "Drawing":
    """What the memory plan is made for."""
    import torch

    from hi_diffusers.memory.fitting import describe

    resolved = plan.base.resolve(plan.preset)
    return describe(
        plan.preset,
        resolved,
        resolve(plan.cache, resolved.sampler(plan.preset), plan.calibrations).config,
        job.source,
        job.placement,
        torch.device(job.placement.device),
        batch_size=plan.args.batch_size,
        encoders_elsewhere=job.placement.encoder_device is not None or not job.encodes,
    )


def check_embeds(plan: Plan, job: Job) -> None:
    """Raise ValueError if a prompt that is asked for was not encoded, where nothing can encode it."""
    if job.encodes:
        return
    from hi_diffusers.embeds import EmbedsCache

    known = EmbedsCache(job.embeds, job.max_sequence_length)
    for unit in plan.units(plan.asked):
        for task in unit:
            negative = task.line.overrides.get("negative_prompt", job.base.negative_prompt)
            if task.line.prompt not in known or negative not in known:
                raise ValueError(
                    f"embeds {job.embeds.parent} lacks the prompt in line {task.line.line} of {plan.prompts.path}, or"
                    " its negative prompt: run the same command with --encode_only where the text encoders are"
                )


def _threads_of_run(output_dir: Path | None) -> int | None:
    """What the run's first command fixed."""
    if output_dir is None or not (output_dir / RUN_FILE).exists():
        return None
    threads = read_run(output_dir)["fixed"].get("threads")
    if not isinstance(threads, int) or not 1 <= threads <= MOST["threads"]:
        raise ValueError(f"{output_dir / RUN_FILE} has threads {threads!r}; was it edited?")
    return threads


def _only_folder(root: Path) -> Path:
    found = sorted(path for path in root.iterdir() if path.is_dir() and path.name[0] != ".") if root.is_dir() else []
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "nothing"
        raise ValueError(f"embeds must be a folder that --encode_only filled once, got {root}, which holds {names}")
    return found[0]


def configuration(plan: Plan, job: Job) -> dict[str, Any]:
    """What makes the pictures, as run.json holds it; what only selects or places work is no part of it."""
    args, resolved = plan.args, plan.base.resolve(plan.preset)
    files = locate(plan.preset, job.source, "drawing")
    identity = ModelIdentity.of(plan.preset, files, job.source.quantization)
    cache = resolve(plan.cache, resolved.sampler(plan.preset), plan.calibrations).config
    fixed = {
        "model_type": plan.preset.name,
        "model": identity.fingerprint,
        "loras": list(identity.loras),
        "device": job.placement.device.partition(":")[0],
        "dtype": job.placement.dtype,
        "quantization": identity.quantization,
        "compiled": job.placement.compiled,
        "fp8": job.placement.fp8,
        "attention_backend": job.placement.attention_backend,
        "threads": job.threads,
        "prompts": {"sha256": plan.prompts.sha256(), "count": plan.numbering.num_prompts, "raw_lines": args.raw_lines},
        "options": {name: value for name, value in resolved.settings().items() if name != "prompt"},
        "cache": {"target": "off"} if cache.is_off else cache.settings(),
        "embeds": job.embeds.name,
        "num_images_per_prompt": args.num_images_per_prompt,
        "batch_size": args.batch_size,
        "format": args.format,
        "add_sampling_metadata": args.add_sampling_metadata,
        "nsfw_filter": {"model": plan.safety.model, "threshold": plan.safety.threshold} if plan.safety else None,
    }
    first = {"software": f"hi-diffusers {__version__}", "prompt_file": plan.prompts.path.name}
    return {"fixed": fixed, "first": first}
