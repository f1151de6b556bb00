"""One prompt, one picture: `python inference.py "a small red star on a blue background"`."""

import argparse
import contextlib
import io
import os
import shutil
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from cache_functions import CacheConfig, resolve
from cache_functions.config import BEST
from hi_diffusers.console import Parser, Refusal, name_flag, quiet_libraries, refuse_errors, run_script, say
from hi_diffusers.identity import find_calibrations
from hi_diffusers.metadata import FORMATS, read_metadata, write_atomically, write_picture
from hi_diffusers.model_files import ModelSource, locate, stated_quantization
from hi_diffusers.options import (
    ResolvedOptions,
    SamplingOptions,
    add_arguments,
    cache_from,
    options_from,
    placement_from,
    source_from,
)
from hi_diffusers.placement import Placement
from hi_diffusers.presets import PRESETS, ModelPreset, find_preset

if TYPE_CHECKING:
    from hi_diffusers import Generation, StepRecord
    from hi_diffusers.pipelines.prompts import PromptEmbeds

WARM_UP_STEPS = 6
DESCRIPTION = "Draw one picture with HiDream-I1 (or the bundled small model), most steps forecast."


@dataclass(frozen=True)
class Job:
    """All that was asked for, checked as far as that goes without reading weights.

    Attributes:
        options, cache: with nothing left open.
        like: the metadata of --like's picture; empty without.
        notices: sentences about what was understood differently from what one may expect.
    """

    preset: ModelPreset
    options: ResolvedOptions
    cache: CacheConfig
    output: Path
    like: dict[str, Any]
    notices: tuple[str, ...]


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Exit codes: 0 done, 2 refused before weights are read, 1 failed, 130 interrupted."""
    return run_script(draw, build_parser(), argv)


def build_parser() -> Parser:
    """All flags."""
    parser = Parser(prog="inference.py", description=DESCRIPTION)
    parser.add_argument("text", nargs="?", metavar="PROMPT", help="what to draw; --prompt says the same")
    parser.add_argument("--prompt", help="what to draw (default: the model's example)")
    parser.add_argument(
        "-o", "--output", type=Path, help="the picture, .png, .jpg or .webp (default: hidream-SEED.png)"
    )
    parser.add_argument("--like", type=Path, metavar="PICTURE", help="take all settings from a picture drawn before")
    parser.add_argument(
        "--compare", action="store_true", help="draw uncached, too; write both and a labelled side-by-side"
    )
    parser.add_argument(
        "--plan", action="store_true", help="print what the drawing needs of a GPU's memory, and stop; reads no file"
    )
    parser.add_argument(
        "--download_only", action="store_true", help="fetch and check the model's files, print their folders, and stop"
    )
    parser.add_argument(
        "--save_quantized",
        type=Path,
        metavar="FOLDER",
        help="with --quantization nf4: write the quantized model without its Llama, and stop",
    )
    add_arguments(parser)
    return parser


def draw(args: argparse.Namespace) -> None:
    """Do what the flags say.

    Raises:
        Refusal: before weights are read.
    """
    job = plan(args)
    quiet_libraries()
    import torch

    from hi_diffusers.loading import check_placement, resolve_device
    from hi_diffusers.memory.fitting import describe, explained, fit
    from hi_diffusers.memory.plan import memory_budget, plan_memory, ways_out
    from hi_diffusers.session import Session

    source, placement = refuse_errors(_source, args, job.like), placement_from(args)
    drawn_in_fp8 = job.like.get("model", {}).get("fp8") is True
    placement = replace(placement, dtype=args.dtype or _dtype_of(job.like), fp8=args.fp8 or drawn_in_fp8)
    if args.download_only:
        files = refuse_errors(locate, job.preset, source)
        for path in filter(None, (files.folder, files.llama, files.transformer, *(path for path, _ in files.loras))):
            print(path)
        return
    if args.plan:  # for a GPU, whatever this machine has
        gpu = torch.device("cuda")
        drawing = refuse_errors(describe, job.preset, job.options, job.cache, source, placement, gpu)
        here = resolve_device("auto") if args.vram is None else gpu
        budget = memory_budget(here, args.vram)
        memory = plan_memory(drawing, budget)
        print(memory.to_text())
        if budget is not None and memory.choice is None:
            print(f"what would fit: {', or '.join(ways_out(drawing, budget))}")
        return
    refuse_errors(check_placement, placement)
    device = resolve_device(args.device)
    if args.save_quantized is not None:
        refuse_errors(locate, job.preset, source)
        save(job, source, placement, args.save_quantized)
        return
    drawing = refuse_errors(describe, job.preset, job.options, job.cache, source, placement, device)
    memory = refuse_errors(fit, drawing, device, args.vram)
    refuse_errors(locate, job.preset, source)
    for notice in job.notices:
        say(notice)
    session = Session(job.preset, source, placement, memory, args.calibration_dir)
    with explained(drawing, device, args.vram):
        notices, embeds = session.encode(job.options)
        pipe = session.pipe
        for notice in [*_other_weights(args, job, pipe), *notices]:
            say(notice)
        if args.compare:
            compare(pipe, job, embeds)
        else:
            picture = draw_with_progress(pipe, job.options, job.cache, embeds)
            write_picture(picture.image, job.output, picture.metadata)
            print(summary(picture))
            print(job.output)


def save(job: Job, source: ModelSource, placement: Placement, folder: Path) -> None:
    """Quantize a model and write it; a folder that is there is whole."""
    from hi_diffusers.loading import load_placed, save_quantized

    if stated_quantization(job.preset, replace(source, quantization="none")) != "none":
        raise Refusal("--save_quantized needs files that are not quantized yet, and these are")
    partial = folder.with_name(f"{folder.name}.partial")
    refuse_errors(partial.mkdir)
    try:
        placement = replace(placement, encoder_device=None)
        save_quantized(load_placed(job.preset.name, source, placement), partial)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    print(folder)


def _other_weights(args: argparse.Namespace, job: Job, pipe: Any) -> Iterator[str]:
    """A sentence if --like's picture was drawn by another model than the one that is loaded."""
    drawn_by, own = job.like.get("model", {}), pipe.identity
    if drawn_by.get("fingerprint", own.fingerprint) != own.fingerprint:
        yield f"{args.like} was drawn by other weights ({drawn_by['fingerprint']}) than these ({own.fingerprint})"
    if job.like and list(drawn_by.get("loras", ())) != list(own.loras):
        yield f"{args.like} was drawn with other LoRAs than are given: {', '.join(drawn_by.get('loras', ())) or 'none'}"


def plan(args: argparse.Namespace) -> Job:
    """Check everything that the user gave.

    Raises:
        Refusal: one sentence naming what is wrong.
    """
    if args.text is not None and args.prompt is not None:
        raise Refusal(f"the prompt must be given once, got {args.text!r} and --prompt {args.prompt!r}")
    like = read_like(args.like) if args.like else {}
    preset = find_preset(args.model_type or _model_of(like, args))
    given = args.text if args.text is not None else args.prompt
    prompt = given if given is not None else like.get("options", {}).get("prompt", preset.example)
    try:
        options = options_from(args, prompt, _known(like, "options", SamplingOptions))
        resolved = options.resolve(preset)
        base = CacheConfig(**_known(like, "cache", CacheConfig)) if like else preset.cache
        if resolved.renoises and args.target is None and base.target not in (None, "x0", "off"):
            base = replace(base, target=None)  # the picture's sampler admitted it, the one asked for now does not
        calibrations = find_calibrations(preset, _source(args, like), args.calibration_dir)
        wanted = cache_from(args, base, resolved.num_steps)
        resolution = resolve(wanted, resolved.sampler(preset), calibrations)
    except (ValueError, TypeError, OSError) as error:
        raise Refusal(name_flag(str(error), args)) from error
    cache = resolution.config
    if args.compare and cache.is_off:
        raise Refusal("--compare draws cached against uncached, so it needs the cache: drop --cache off")
    notices = [*resolved.notices, *resolution.notices]
    if preset.is_bundled and args.model_type is None and not like:
        notices.append(
            f"{preset.name} is the small bundled model; --model_type full|dev|fast draws with HiDream-I1, see README.md"
        )
    if given is None and not like:
        notices.append(f"no prompt given: drawing {preset.name}'s example, {prompt!r}")
    if resolved.renoises and wanted.target is None and wanted.schedule != BEST:
        notices.append(
            f"the cache forecasts x0: {resolved.scheduler} adds noise at every step, which no other target can foresee"
        )
    instead = [f"--{name}" for name in ("plan", "download_only", "save_quantized", "compare") if getattr(args, name)]
    if len(instead) > 1:
        raise Refusal(f"{instead[0]} and {instead[1]} do different things: give one of them")
    if args.save_quantized is not None:
        if args.quantization != "nf4" or args.lora or args.save_quantized.exists():
            raise Refusal("--save_quantized needs --quantization nf4, no --lora, and a folder that does not exist yet")
        if not args.save_quantized.parent.is_dir():
            raise Refusal(f"--save_quantized must lie in an existing folder, got {args.save_quantized}")
    output = args.output or Path(f"hidream-{resolved.seed}.png")
    for path in (output, *comparison_paths(output)) if args.compare else (output,):
        check_output(path)
    return Job(preset, resolved, cache, output, like, tuple(notices))


def read_like(path: Path) -> dict[str, Any]:
    """The metadata of --like's picture."""
    try:
        return read_metadata(path)
    except OSError as error:
        raise Refusal(f"--like must be a picture drawn before, got {path}: {error.strerror}") from error
    except ValueError as error:
        raise Refusal(f"--like must be a picture drawn before: {error}") from error


def comparison_paths(output: Path) -> tuple[Path, Path]:
    """Where --compare puts the uncached picture and the side-by-side."""
    return output.with_name(f"{output.stem}_uncached{output.suffix}"), output.with_name(f"{output.stem}_compare.png")


def check_output(output: Path) -> None:
    """Refuse a picture file that cannot be written."""
    parent = output.parent
    if output.suffix.lower() not in FORMATS:
        raise Refusal(f"--output must end in {', '.join(FORMATS)}, got {output}")
    if not parent.is_dir():
        raise Refusal(f"--output must lie in an existing folder, got {output}: there is no folder {parent}")
    try:
        is_folder = stat.S_ISDIR(output.stat().st_mode)
    except FileNotFoundError:
        is_folder = False
    except OSError as error:
        raise Refusal(f"--output must be a file that can be written, got {output}: {error.strerror}") from error
    if is_folder:
        raise Refusal(f"--output must be a file, got {output}, which is a folder")
    if not os.access(parent, os.W_OK):
        raise Refusal(f"--output must lie in a writable folder, got {output}: {parent} is not writable")


def draw_with_progress(
    pipe: Any, options: ResolvedOptions, cache: CacheConfig, embeds: "PromptEmbeds | None" = None
) -> "Generation":
    """Draw with a bar that counts full and forecast steps."""
    from hi_diffusers.generation import draw_batch

    with step_bar(options.num_steps) as on_step:
        return draw_batch(pipe, [options], cache, embeds=embeds, on_step=on_step)[0]


@contextlib.contextmanager
def step_bar(num_steps: int | None) -> Iterator[Callable[..., bool]]:
    """A progress bar to be handed to `generate` as `on_step`."""
    counts = {"full": 0, "forecast": 0}
    with tqdm(total=num_steps, unit="step", dynamic_ncols=True) as bar:

        def on_step(record: "StepRecord", preview: object) -> bool:
            counts[record.kind] += 1
            bar.set_postfix(counts, refresh=False)
            bar.update()
            return True

        yield on_step


def compare(pipe: Any, job: Job, embeds: "PromptEmbeds | None" = None) -> None:
    """Draw uncached and cached from one seed, write both and a labelled side-by-side, print the figures."""
    from hi_diffusers.generation import draw_batch
    from hi_diffusers.metrics import psnr, ssim
    from hi_diffusers.pipelines.steps import Interrupted, count_steps
    from hi_diffusers.sheet import side_by_side

    def warm_up(record: "StepRecord", preview: object) -> bool:
        return record.index + 1 < WARM_UP_STEPS

    for cache in (CacheConfig.off(), job.cache):
        with contextlib.suppress(Interrupted):
            draw_batch(pipe, [job.options], cache, embeds=embeds, on_step=warm_up)
    uncached = draw_with_progress(pipe, job.options, CacheConfig.off(), embeds)
    cached = draw_with_progress(pipe, job.options, job.cache, embeds)
    uncached_path, sheet_path = comparison_paths(job.output)
    write_picture(uncached.image, uncached_path, uncached.metadata)
    write_picture(cached.image, job.output, cached.metadata)
    speedup = uncached.seconds.denoise / cached.seconds.denoise
    ceiling = len(cached.trace) / count_steps(cached.trace, "full")
    fidelity = f"PSNR {psnr(uncached.image, cached.image):.2f} dB, SSIM {ssim(uncached.image, cached.image):.4f}"
    labels = (f"uncached: {_steps(uncached)}", f"cached: {_steps(cached)}\n{speedup:.2f}x the speed, {fidelity}")
    sheet = io.BytesIO()
    side_by_side(list(zip((uncached.image, cached.image), labels, strict=True))).save(sheet, "PNG")
    write_atomically(sheet_path, sheet.getvalue())
    print(f"uncached: {summary(uncached)}")
    print(f"cached:   {summary(cached)}")
    print(
        f"speedup:  {speedup:.2f}x over the denoising loop ({speedup / ceiling:.0%} of steps / full steps ="
        f" {ceiling:.2f}x), {uncached.seconds.whole / cached.seconds.whole:.2f}x over the whole picture"
    )
    print(f"fidelity: {fidelity} (of the saved 8-bit pictures)")
    for path in (uncached_path, job.output, sheet_path):
        print(path)


def summary(picture: "Generation") -> str:
    """One line about what was measured."""
    seconds, options = picture.seconds, picture.metadata["options"]
    return (
        f"{options['width']}x{options['height']}, seed {options['seed']}, {_steps(picture)}, {seconds.whole:.2f} s"
        f" (encode {seconds.encode:.2f}, denoise {seconds.denoise:.2f}, decode {seconds.decode:.2f})"
    )


def _steps(picture: "Generation") -> str:
    from hi_diffusers.pipelines.steps import count_steps

    full, forecast = (count_steps(picture.trace, kind) for kind in ("full", "forecast"))
    return f"{len(picture.trace)} steps: {full} full, {forecast} forecast"


def _model_of(like: dict[str, Any], args: argparse.Namespace) -> str:
    """The model that --like's picture names; only a preset's name is believed."""
    name = like.get("model", {}).get("model_type", "nano")
    if not isinstance(name, str) or name not in PRESETS:
        raise Refusal(f"--like {args.like} names a model that is not known here: give --model_type")
    return name


def _source(args: argparse.Namespace, like: dict[str, Any]) -> ModelSource:
    """Which files to load: the flags', quantized as --like's picture was unless told otherwise."""
    source = source_from(args)
    stated = like.get("model", {}).get("quantization", "none")
    return source if args.quantization or args.transformer else replace(source, quantization=stated)


def _dtype_of(like: dict[str, Any]) -> str:
    names = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
    return names.get(str(like.get("model", {}).get("dtype")), "auto")


def _known(like: dict[str, Any], section: str, kind: type) -> dict[str, Any]:
    """The settings of a section of --like's metadata."""
    settings = like.get(section, {})
    unknown = set(settings) - set(kind.__dataclass_fields__)
    if unknown:
        raise Refusal(f"--like names settings that this version does not know: {', '.join(sorted(unknown))}")
    return settings


if __name__ == "__main__":
    raise SystemExit(main())
