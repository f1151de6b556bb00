"""Turns a run's flags into a plan; everything is checked before weights are read."""

import argparse
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import torch

from hi_diffusers import __version__
from hi_diffusers.engine.cluster import check_reachable
from hi_diffusers.engine.embeds import embeds_folder
from hi_diffusers.engine.session import Session
from hi_diffusers.families.table import DEFAULT_MODEL, find_family, find_preset
from hi_diffusers.flags import cache_from, options_from, placement_from, safety_from, source_from, split_from
from hi_diffusers.memory.plan import Demand, plan_memory
from hi_diffusers.pictures.safety import SafetySettings
from hi_diffusers.request.placement import TORCH_DTYPES, Placement, resolve_device, resolve_dtype
from hi_diffusers.runs.decisions import Decisions, LineDecisions
from hi_diffusers.runs.job import Job
from hi_diffusers.runs.manifest import RUN_FILE, read_run
from hi_diffusers.runs.prompt_files import PromptFile
from hi_diffusers.runs.units import Numbering, Shard, Task, find_shard
from hi_diffusers.weights.identity import ModelIdentity, cache_folder, find_calibrations
from hi_diffusers.weights.source import Parts

DEFAULT_EMBEDS_GB = 20.0
GB = 1e9
MOST = {"num_images_per_prompt": 10_000, "batch_size": 1_024, "threads": 1_024, "ray_workers": 10_000}
MAX_PICTURES = 10**8
Deciding = TypeVar("Deciding", bound=LineDecisions)


@dataclass(frozen=True)
class Plan(Generic[Deciding]):
    """The request, checked as far as possible without reading weights.

    Attributes:
        decisions: the drawings of the lines: `Decisions`, or `StockDecisions` of a pipeline of diffusers.
        asked: which pictures this command draws, [num_pictures], bool.
        notices: sentences about choices that the user may not expect.
    """

    args: argparse.Namespace
    prompts: PromptFile
    stamp: tuple[int, int]
    decisions: Deciding
    numbering: Numbering
    shard: Shard
    asked: np.ndarray
    safety: SafetySettings | None
    notices: tuple[str, ...]

    def units(self, due: np.ndarray) -> Iterator[list[Task]]:
        """The units that hold a due picture, in order.

        Raises:
            ValueError: if the prompt file has changed since the plan was made.
        """
        for unit in self.numbering.units(self.prompts, due):
            self._check_unchanged()
            yield unit
        self._check_unchanged()  # a file that became shorter is noticed only here

    def _check_unchanged(self) -> None:
        if self.prompts.stamp() != self.stamp:
            raise ValueError(f"prompt_file {self.prompts.path} was changed while it was drawn")


def make_plan(args: argparse.Namespace) -> Plan[Decisions]:
    """Check everything that the user gave.

    Raises:
        ValueError, OSError: with one sentence that names what is wrong.
    """
    check_flags(args)
    preset = find_preset(args.model_type or DEFAULT_MODEL)
    prompts = PromptFile(args.prompt_file, args.raw_lines)
    stamp = prompts.stamp()
    of_pictures = _of_pictures(args)
    base = options_from(args, "", {})
    cache = cache_from(args, preset.cache, base.drawn_steps(preset))
    calibrations = find_calibrations(preset, source_from(args), args.calibration_dir)
    decisions = Decisions(preset, base, cache, calibrations, args.prompt_file.parent, of_pictures)
    decisions.base.cache.check_batch(args.batch_size)
    num_prompts, of_lines = check_lines(prompts, decisions)
    for name in of_pictures:
        if not decisions.inputs.values():
            raise ValueError(f"{name} has no effect: no line of {args.prompt_file} starts from a picture")
    notices = [*decisions.base.notices, *of_lines]
    return finish_plan(args, prompts, stamp, decisions, num_prompts, notices)


def _of_pictures(args: argparse.Namespace) -> dict[str, Any]:
    """Take the flags from `args` that only lines with a picture of their own can mean, where none is given for all."""
    found = {}
    for name in () if args.image else ("strength", "fit"):
        if getattr(args, name) is not None:
            found[name] = getattr(args, name)
            setattr(args, name, None)
    return found


def finish_plan(
    args: argparse.Namespace,
    prompts: PromptFile,
    stamp: tuple[int, int],
    decisions: Deciding,
    num_prompts: int,
    notices: list[str],
) -> Plan[Deciding]:
    """The plan of a run whose lines were checked.

    Args:
        stamp: the prompt file's stamp before it was read.
        notices: sentences so far.
    """
    if unread := prompts.unread_columns():
        notices.append(f"columns of {prompts.path} that are ignored: {', '.join(unread)[:200]}")
    if num_prompts * args.num_images_per_prompt > MAX_PICTURES:
        raise ValueError(f"num_images_per_prompt {args.num_images_per_prompt} makes more than {MAX_PICTURES} pictures")
    numbering = Numbering(num_prompts, args.num_images_per_prompt, args.seed, f".{args.format}", args.batch_size)
    shard, told_by = find_shard(args.shard, split_from(args).size) if args.engine == "local" else (Shard(), None)
    if told_by is not None:
        notices.append(f"shard {shard.index}/{shard.count}, set by {told_by}")
    return Plan(
        args=args,
        prompts=prompts,
        stamp=stamp,
        decisions=decisions,
        numbering=numbering,
        shard=shard,
        asked=numbering.of_prompts(args.indices, args.limit) & numbering.of_shard(shard),
        safety=safety_from(args),
        notices=tuple(notices),
    )


def check_lines(prompts: PromptFile, decisions: LineDecisions) -> tuple[int, list[str]]:
    """Read the whole file once, and decide the drawings of its lines.

    Returns:
        The number of prompts, and sentences about lines that are drawn differently from what they ask.

    Raises:
        ValueError: naming the first line that cannot be read or drawn, or if the file has no prompt.
    """
    notices: list[str] = []
    num_prompts = num_noted = 0
    for line in prompts:
        num_prompts += 1
        try:
            noted = decisions.check(line)
        except ValueError as error:
            raise prompts.complaint(line.line, str(error)) from error
        if noted and not num_noted:
            notices.append(f"line {line.line} of {prompts.path}: {noted[0]}")
        num_noted += bool(noted)
    if num_noted > 1:
        notices.append(f"{num_noted - 1} more lines have the same or a similar notice")
    if not num_prompts:
        raise ValueError(f"prompt_file must hold at least one prompt, got {prompts.path}, which has none")
    return num_prompts, notices


def check_flags(args: argparse.Namespace) -> None:
    """Raise ValueError for numbers out of range, and for flags that contradict each other or have no effect."""
    for name, most in MOST.items():
        if (value := getattr(args, name)) is not None and not 1 <= value <= most:
            raise ValueError(f"{name} must be 1 to {most}, got {value}")
    if args.embeds_cache_gb is not None and not 0 <= args.embeds_cache_gb < math.inf:
        raise ValueError(f"embeds_cache_gb must not be negative, got {args.embeds_cache_gb:g}")
    if args.embeds_cache_gb is not None and args.embeds is not None:
        raise ValueError("embeds_cache_gb has no effect with --embeds, whose folder is never trimmed")
    if args.raw_lines and args.prompt_file.suffix.lower() != ".txt":
        raise ValueError(f"raw_lines has no effect on {args.prompt_file}: it applies to .txt files only")
    if args.encode_only and args.embeds is None:
        raise ValueError("encode_only needs --embeds FOLDER, the folder to write the embeddings to")
    for name in ("output_dir", "verify", "use_nsfw_filter", "add_sampling_metadata"):
        if args.encode_only and getattr(args, name):
            raise ValueError(f"{name} has no effect with --encode_only")
    split = split_from(args)
    if split.size > 1 and (args.encode_only or args.engine == "ray"):
        other = "encode_only" if args.encode_only else "engine ray"
        raise ValueError(
            f"{other} cannot be used with --ulysses or --guidance_parallel, whose processes share pictures"
        )
    if split.size > 1 and args.shard is not None and int(os.environ.get("WORLD_SIZE", "1")) > split.size:
        raise ValueError(f"shard {args.shard} is that of one group of {split.size} processes, but more were started")
    if args.encode_only and args.engine == "ray":
        raise ValueError("engine ray cannot be used with --encode_only: drop one of them, or encode in shards")
    if args.output_dir is None and not args.encode_only:
        raise ValueError("output_dir must be given: it is the folder of the run")
    for name in ("ray_address", "ray_workers"):
        if getattr(args, name) is not None and args.engine != "ray":
            raise ValueError(f"{name} has no effect without --engine ray")
    if args.engine == "ray":
        if args.shard is not None:
            raise ValueError(
                f"shard {args.shard} has no effect with --engine ray, which distributes all pictures itself"
            )
        check_reachable(args.ray_address)
    name = "embeds" if args.encode_only else "output_dir"
    folder = getattr(args, name)
    if folder == Path() or not folder.parent.is_dir() or (folder.exists() and not folder.is_dir()):
        raise ValueError(f"{name} must be a folder, or a new one in an existing folder, got {str(folder)!r}")


def open_session(plan: Plan[Decisions]) -> Session:
    """The run's model, on this process's device.

    Raises:
        ValueError: if the device is not available.
    """
    args, decisions = plan.args, plan.decisions
    placement = placement_from(args)
    if args.engine == "ray" and args.device != "auto":
        device = torch.device(args.device)  # the workers', whatever this host has
    else:
        device = resolve_device(args.device)
    if device.type == "cuda" and args.engine == "local":
        rank = int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")))
        device = torch.device("cuda", rank % torch.cuda.device_count())
    dtype = resolve_dtype(placement.dtype, device)
    dtype_name = next(name for name, known in TORCH_DTYPES.items() if known == dtype)
    parts: Parts = "encoders" if args.encode_only else "all" if _encodes(args) else "drawing"
    placement = replace(placement, device=str(device), dtype=dtype_name)
    split = split_from(args)
    return Session(
        decisions.preset, source_from(args), placement, decisions.calibrations, args.vram, parts, split=split
    )


def make_job(plan: Plan[Decisions], session: Session) -> Job:
    """The job for the workers, with the placement that fits; finds and checks the model's files.

    Raises:
        ValueError: if the model's files or embeddings are not available.
    """
    args, decisions, placement = plan.args, plan.decisions, session.placement
    files = session.files
    threads = args.threads or threads_of_run(args.output_dir) or torch.get_num_threads()
    root = args.embeds or cache_folder() / "embeds"
    if _encodes(args):
        encoders = find_family(session.preset).encoders_fingerprint(files, session.source.quantization)
        embeds = embeds_folder(root, encoders, placement.dtype, _encoding_place(placement, threads))
        embeds.mkdir(parents=True, exist_ok=True)
    else:
        embeds = _only_folder(root)
    limit = (DEFAULT_EMBEDS_GB if args.embeds_cache_gb is None else args.embeds_cache_gb) * GB
    # no embedding may be removed before its picture is drawn
    keeps_all = args.embeds is not None or session.frees_encoders
    return Job(
        preset=session.preset,
        source=session.source,
        placement=placement,
        calibration_dir=args.calibration_dir,
        base=decisions.options,
        cache=decisions.cache,
        folder=decisions.folder,
        of_pictures=dict(decisions.of_pictures),
        max_sequence_length=decisions.base.options.max_sequence_length,
        suffix=plan.numbering.suffix,
        add_metadata=args.add_sampling_metadata,
        threads=threads,
        embeds=embeds,
        embeds_limit=None if keeps_all else limit,
        encodes=_encodes(args),
        frees_encoders=session.frees_encoders,
        safety=plan.safety,
    )


def _encodes(args: argparse.Namespace) -> bool:
    """Whether missing embeddings are made."""
    return args.embeds is None or args.encode_only


def _encoding_place(placement: Placement, threads: int) -> str:
    """Where prompts are encoded, which the embeddings' bits depend on: the device, and on a CPU its threads."""
    here = (
        torch.device(placement.device) if placement.encoder_device is None else resolve_device(placement.encoder_device)
    )
    return f"cpu{threads}" if here.type == "cpu" else here.type


def fit_session(plan: Plan[Decisions], session: Session) -> list[str]:
    """Choose how the run's model is kept in the device's memory; returns sentences about the choice.

    Raises:
        ValueError: if it does not fit.
    """
    if plan.args.engine == "ray" or plan.args.encode_only:
        return []  # the workers' cards are not this host's; encoders alone are loaded as they are
    return session.check() + session.fit(demand(plan, session))


def demand(plan: Plan[Decisions], session: Session) -> Demand:
    """The memory demand of the run: that of the drawing that needs most."""
    elsewhere = session.placement.encoder_device is not None or not _encodes(plan.args)
    more = {"batch_size": plan.args.batch_size, "encoders_elsewhere": elsewhere}
    demands = [session.demand(one, **more) for one in plan.decisions.kinds()]
    return max(demands, key=lambda one: plan_memory(one).peak("resident"))


def check_embeds(plan: Plan[Decisions], job: Job) -> None:
    """Raise ValueError if this run cannot encode and a prompt's embeddings are missing."""
    if job.encodes:
        return
    known = job.embeds_cache()
    for unit in plan.units(plan.asked):
        for task in unit:
            negative = task.line.overrides.get("negative_prompt", job.base.negative_prompt)
            if task.line.prompt not in known or negative not in known:
                raise ValueError(
                    f"embeds {job.embeds.parent} lacks the prompt in line {task.line.line} of {plan.prompts.path}, or"
                    " its negative prompt: run the same command with --encode_only on a machine with the text encoders"
                )


def threads_of_run(output_dir: Path | None) -> int | None:
    """The number of threads that the run's first command fixed; None for a new run."""
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


def configuration(plan: Plan[Decisions], job: Job, session: Session) -> dict[str, Any]:
    """The settings that determine the pictures, for run.json; without those that only select or place work."""
    args, drawing, shelf = plan.args, plan.decisions.base, session.calibrations
    known = None if shelf is None else shelf.model
    identity = ModelIdentity.of(session.preset, session.files, job.source.quantization, known)
    fixed = {
        "model_type": session.preset.name,
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
        "options": {name: value for name, value in drawing.options.settings().items() if name != "prompt"},
        "cache": {"target": "off"} if drawing.cache.is_off else drawing.cache.settings(),
        "embeds": job.embeds.name,
        "num_images_per_prompt": args.num_images_per_prompt,
        "batch_size": args.batch_size,
        "format": args.format,
        "add_sampling_metadata": args.add_sampling_metadata,
        "nsfw_filter": {"model": plan.safety.model, "threshold": plan.safety.threshold} if plan.safety else None,
    }
    if inputs := plan.decisions.inputs.values():
        fixed |= {"images": inputs, "of_pictures": dict(plan.decisions.of_pictures)}
    first = {"software": f"hi-diffusers {__version__}", "prompt_file": plan.prompts.path.name}
    return {"fixed": fixed, "first": first}
