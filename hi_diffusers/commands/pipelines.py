"""inference.py --pipeline: one drawing with a pipeline of diffusers that is not ours."""

import argparse
import contextlib
import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from cache_functions import CacheConfig, StepRecord
from hi_diffusers.commands.like import Like
from hi_diffusers.commands.outputs import MAX_IMAGES, check_output, comparison_paths, free_name
from hi_diffusers.commands.progress import show, step_bar, step_counts
from hi_diffusers.console import Refusal, name_flag, quiet_libraries, refuse_errors, require, say, say_loading
from hi_diffusers.denoising.steps import Interrupted
from hi_diffusers.flags import cache_from, stock_options_from, stock_source_from
from hi_diffusers.pictures.metadata import FORMATS, write_atomically
from hi_diffusers.request.options import LARGEST_SEED
from hi_diffusers.request.placement import resolve_device
from hi_diffusers.stock.formats import VIDEOS, check_suffix, default_suffix
from hi_diffusers.stock.request import StockRequest, decide
from hi_diffusers.stock.source import StockSource, split_lora

if TYPE_CHECKING:
    from hi_diffusers.stock.drawing import StockModel, StockResult

WARM_UP_STEPS = 6
EXAMPLE = "a red circle on a blue background"


@dataclass(frozen=True)
class Job:
    """The checked request; no weights were read for it.

    Attributes:
        requests: the drawings.
        outputs: their files.
        replaces: whether existing files are overwritten, which only a given --output does.
        notices: sentences about choices that the user may not expect.
    """

    requests: tuple[StockRequest, ...]
    outputs: tuple[Path, ...]
    replaces: bool
    notices: tuple[str, ...]


def draw_pipeline(args: argparse.Namespace) -> None:
    """Do what the flags say; raises Refusal before weights are read."""
    quiet_libraries()  # a pipeline's class tells what it takes, and importing it is not silent
    like = Like.read(args.like)
    source = replace(stock_source_from(args), dtype=like.dtype(args.dtype))
    refuse_errors(resolve_device, source.device)
    for one in source.loras:
        refuse_errors(split_lora, one)
    if source.loras:
        refuse_errors(require, "peft", "lora", "--lora")
    if args.download_only:
        if args.compare or args.num_images != 1 or args.show is not None:
            raise Refusal("--download_only draws nothing: drop --compare, --num_images and --show")
        print(refuse_errors(lambda: source.folder))
        return
    try:
        job = plan(args, source, like)
    except (ValueError, OSError) as error:
        raise Refusal(name_flag(str(error), args)) from error
    for notice in job.notices:
        say(notice)
    model = open_model(source)
    from hi_diffusers.stock.files import write_result

    if args.compare:
        compare(model, job.requests[0], job.outputs[0])
        return
    for request, output in zip(job.requests, job.outputs, strict=True):
        result = draw_with_progress(model, request)
        while not write_result(result, output, replace=job.replaces):
            output = free_name(output)
        for notice in result.notices:
            if notice not in job.notices:
                say(notice)
        print(summary(result))
        print(output)
        show(result.frames[0], args.show)


def open_model(source: StockSource) -> "StockModel":
    """Load a pipeline, saying so."""
    say_loading(source.where)
    from hi_diffusers.stock.drawing import StockModel

    model = StockModel.open(source)
    for notice in model.notices:
        say(notice)
    return model


def plan(args: argparse.Namespace, source: StockSource, like: Like) -> Job:
    """Check everything that the user gave; raises ValueError or Refusal with one sentence."""
    if args.text is not None and args.prompt is not None:
        raise Refusal(f"the prompt must be given once, got {args.text!r} and --prompt {args.prompt!r}")
    given = args.text if args.text is not None else args.prompt
    pipeline, notices = source.pipeline_class, list[str]()
    base, cache = like.of_pipeline(pipeline.class_name) if like else ({}, CacheConfig.best())
    prompt = given if given is not None else base.get("prompt", "1" if pipeline.draws_classes else EXAMPLE)
    if given is None and not like:
        notices.append(f"no prompt given: drawing {prompt!r}")
    options = stock_options_from(args, prompt, base)
    steps = options.num_steps or source.default("num_steps")
    request = decide(source, options, cache_from(args, cache, steps), args.calibration_dir)
    if like and like.images() != [one for one in (*request.image_hashes, request.mask_hash) if one is not None]:
        notices.append(f"{like.path} was drawn from other pictures than those given")
    if like:
        notices += list(like.differences_of_pipeline(source.files_fingerprint, source.lora_hashes))
    check_modes(args, request)
    requests = several(request, args.num_images)
    suffix = default_suffix(pipeline.is_video)
    outputs = []
    for one in requests:
        output = args.output or free_name(Path(f"{source.name.rpartition('/')[2]}-{one.seed}{suffix}"))
        if len(requests) > 1 and args.output is not None:
            output = output.with_name(f"{output.stem}-{one.seed}{output.suffix}")
        refuse_errors(check_suffix, output, pipeline.is_video)
        for path in (output, *(comparison_paths(output) if args.compare else ())):
            check_output(path, (*FORMATS, *VIDEOS))
        outputs.append(output)
    return Job(requests, tuple(outputs), args.output is not None, (*notices, *request.notices))


def check_modes(args: argparse.Namespace, request: StockRequest) -> None:
    """Refuse flags that ask for different things."""
    if not 1 <= args.num_images <= MAX_IMAGES:
        raise Refusal(f"--num_images must be from 1 to {MAX_IMAGES}, got {args.num_images}")
    if not args.compare:
        return
    if request.cache.is_off:
        raise Refusal("--compare draws cached against uncached, so it needs the cache: drop --cache off")
    if args.num_images > 1:
        raise Refusal("--num_images has no effect with --compare: drop --num_images")
    if args.compare and args.show is not None:
        raise Refusal("--show has no effect with --compare: drop --show")
    refuse_errors(require, "skimage", "metrics", "--compare")


def several(request: StockRequest, num_images: int) -> tuple[StockRequest, ...]:
    """The request once per picture, with consecutive seeds that begin with its own."""
    seeds = ((request.seed + number) % (LARGEST_SEED + 1) for number in range(num_images))
    return tuple(request.again(request.prompt, seed) for seed in seeds)


def draw_with_progress(model: "StockModel", request: StockRequest) -> "StockResult":
    """Draw with a bar that counts full and forecast steps."""
    with step_bar(request.num_steps) as on_step:
        return model.draw([request], lambda record, drawn: on_step(record, None, drawn))[0]


def summary(result: "StockResult") -> str:
    """One line with size, seed, steps and seconds."""
    height, width = result.pixels.shape[-3:-1]
    frames = f"{len(result.frames)} frames, " if result.is_video else ""
    return (
        f"{width}x{height}, {frames}seed {result.metadata['options']['seed']}, {counts(result.trace)},"
        f" {result.seconds:.2f} s (steps {result.denoise_seconds:.2f})"
    )


def counts(trace: Sequence[StepRecord]) -> str:
    """One phrase with the numbers of steps and of calls of the denoiser."""
    return f"{step_counts(trace)}, {sum(record.evaluations for record in trace)} calls of the denoiser"


def compare(model: "StockModel", request: StockRequest, output: Path) -> None:
    """Draw uncached and cached from one seed; write both and a labelled side-by-side, print the figures."""
    from hi_diffusers.pictures.metrics import psnr, ssim
    from hi_diffusers.pictures.sheet import side_by_side
    from hi_diffusers.stock.files import write_result

    both = (request.uncached(), request)
    for one in both:
        with contextlib.suppress(Interrupted):
            model.draw([one], lambda record, drawn: record.index + 1 < WARM_UP_STEPS)
    uncached, cached = (draw_with_progress(model, one) for one in both)
    uncached_path, sheet_path = comparison_paths(output)
    write_result(uncached, uncached_path)
    write_result(cached, output)
    speedup = uncached.denoise_seconds / cached.denoise_seconds
    pairs = list(zip(uncached.frames, cached.frames, strict=True))
    whole = psnr(*(np.concatenate([np.asarray(one) for one in frames]) for frames in zip(*pairs, strict=True)))
    similarity = float(np.mean([ssim(one, other) for one, other in pairs]))
    fidelity = f"PSNR {whole:.2f} dB, SSIM {similarity:.4f}"
    labels = (
        f"uncached: {counts(uncached.trace)}",
        f"cached: {counts(cached.trace)}\n{speedup:.2f}x the speed, {fidelity}",
    )
    sheet = io.BytesIO()
    middle = pairs[len(pairs) // 2]
    side_by_side(list(zip(middle, labels, strict=True))).save(sheet, "PNG")
    write_atomically(sheet_path, sheet.getvalue())
    print(f"uncached: {summary(uncached)}")
    print(f"cached:   {summary(cached)}")
    print(f"speedup:  {speedup:.2f}x over the steps, {uncached.seconds / cached.seconds:.2f}x over the whole drawing")
    print(f"fidelity: {fidelity} (measured on 8-bit pictures{', over all frames' if cached.is_video else ''})")
    for path in (uncached_path, output, sheet_path):
        print(path)
