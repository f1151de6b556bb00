"""One prompt, one picture: `python inference.py "a small red star on a blue background"`."""

import argparse
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from cache_functions.config import BEST
from hi_diffusers import __version__
from hi_diffusers.commands.like import Like
from hi_diffusers.commands.outputs import MAX_IMAGES, check_output, comparison_paths, free_name
from hi_diffusers.commands.pipelines import draw_pipeline
from hi_diffusers.commands.progress import draw_with_progress, saving, show, summary
from hi_diffusers.commands.side_by_side import compare
from hi_diffusers.commands.together import mute_followers, share, work_together
from hi_diffusers.console import Parser, Refusal, name_flag, refuse_errors, require, run_script, say, say_loading
from hi_diffusers.denoising.ranks import Ranks
from hi_diffusers.denoising.schedulers import RENOISING
from hi_diffusers.engine.session import Session
from hi_diffusers.families.table import find_family, find_preset
from hi_diffusers.flags import (
    add_arguments,
    add_pipeline_arguments,
    add_rank_arguments,
    cache_from,
    check_pipeline_flags,
    options_from,
    placement_from,
    source_from,
    split_from,
)
from hi_diffusers.memory.plan import host_memory, memory_budget, plan_memory, ways_out
from hi_diffusers.pictures.metadata import write_picture
from hi_diffusers.pictures.terminal import PROTOCOLS
from hi_diffusers.request.drawing import Drawing
from hi_diffusers.request.options import LARGEST_SEED
from hi_diffusers.request.placement import resolve_device
from hi_diffusers.weights.identity import find_calibrations
from hi_diffusers.weights.source import GIB

DESCRIPTION = "Draw one picture with HiDream-I1 (or the bundled small model), most steps forecast."
INSTEAD = ("plan", "download_only", "save_quantized", "compare")


@dataclass(frozen=True)
class Job:
    """The checked request; no weights were read for it.

    Attributes:
        session: the model.
        drawings: the pictures.
        outputs: their files.
        replaces: whether existing files are overwritten, which only a given --output does.
        like: the picture whose settings were taken.
        notices: sentences about choices that the user may not expect.
    """

    session: Session
    drawings: tuple[Drawing, ...]
    outputs: tuple[Path, ...]
    replaces: bool
    like: Like
    notices: tuple[str, ...]


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Exit codes: 0 done, 2 refused before weights are read, 1 failed, 130 interrupted."""
    return run_script(draw, build_parser(), argv)


def build_parser() -> Parser:
    """The command line's parser."""
    parser = Parser(prog="inference.py", description=DESCRIPTION, version=__version__)
    parser.add_argument("text", nargs="?", metavar="PROMPT", help="the prompt; same as --prompt")
    parser.add_argument("--prompt", help="the prompt (default: the model's example)")
    parser.add_argument(
        "-o", "--output", type=Path, help="picture file, .png, .jpg or .webp (default: hidream-SEED.png)"
    )
    parser.add_argument(
        "--num_images",
        type=int,
        default=1,
        help="number of pictures; seeds count up, and each seed is added to the file's name (default: 1)",
    )
    parser.add_argument("--like", type=Path, metavar="PICTURE", help="take all settings from a picture drawn before")
    parser.add_argument(
        "--compare", action="store_true", help="also draw uncached; write both pictures and a labelled side-by-side"
    )
    parser.add_argument(
        "--show",
        nargs="?",
        const="auto",
        choices=("auto", *PROTOCOLS),
        help="also show the picture in the terminal, by its own protocol (default: told from its environment)",
    )
    parser.add_argument(
        "--plan", action="store_true", help="print the GPU memory that the drawing needs, and stop; reads no file"
    )
    parser.add_argument(
        "--download_only", action="store_true", help="fetch and check the model's files, print their folders, and stop"
    )
    parser.add_argument(
        "--save_quantized",
        type=Path,
        metavar="FOLDER",
        help="with --quantization nf4: write the quantized model without its language model, and stop",
    )
    add_arguments(parser)
    add_rank_arguments(parser)
    add_pipeline_arguments(parser)
    return parser


def draw(args: argparse.Namespace) -> None:
    """Do what the flags say.

    Raises:
        Refusal: if the request cannot be carried out, before weights are read.
    """
    try:
        mute_followers(args)
        check_pipeline_flags(args)
    except ValueError as error:
        raise Refusal(name_flag(str(error), args)) from error
    if args.pipeline is not None:
        draw_pipeline(args)
        return
    job = plan(args)
    session, drawing = job.session, job.drawings[0]
    if args.download_only:
        for path in refuse_errors(lambda: session.files).paths():
            print(path)
        return
    if args.plan:
        for notice in job.notices:
            say(notice)
        print_plan(session, drawing)
        return
    work_together(args, job.session.placement.device, partial(draw_here, args, job))


def draw_here(args: argparse.Namespace, job: Job, ranks: Ranks | None, device: str) -> None:
    """Draw in this process, the only one or the first of those that draw together.

    Args:
        device: this process's device.

    Raises:
        Refusal: if the model's files or this machine do not suffice.
    """
    session, drawing = job.session, job.drawings[0]
    if ranks is not None:
        refuse_errors(ranks.check_one_group)
    share(session, ranks, device)
    notices = refuse_errors(session.check)
    if args.save_quantized is not None:
        refuse_errors(lambda: session.files)
        save(session, args.save_quantized)
        return
    demand = refuse_errors(session.demand, drawing)
    notices += refuse_errors(session.fit, demand)
    refuse_errors(lambda: session.files)
    for notice in [*notices, *job.notices]:
        say(notice)
    say_loading(session.preset.name)
    with session.explained(demand):
        notices, embeds = session.encode([drawing])
        model = session.model
        assert model.identity is not None
        for notice in [*model.notices, *job.like.differences(model.identity, drawing.options), *notices]:
            say(notice)
        if args.compare:
            compare(model, drawing, job.outputs[0], embeds)
            return
        for one, output in zip(job.drawings, job.outputs, strict=True):
            picture = draw_with_progress(model, one, embeds)
            while not write_picture(picture.image, output, picture.metadata, replace=job.replaces):
                output = free_name(output)
            print(summary(picture) + saving(picture.trace))
            print(output)
            show(picture.image, args.show)


def print_plan(session: Session, drawing: Drawing) -> None:
    """Print the GPU memory that a drawing needs; the budget is --vram, else this machine's GPU, if it has one.

    Raises:
        Refusal: if it does not fit.
    """
    import torch

    gpu = torch.device("cuda")
    demand = refuse_errors(session.demand, drawing, device=gpu)
    here = resolve_device("auto") if session.vram is None else gpu
    budget = memory_budget(here, session.vram)
    memory = plan_memory(demand, budget, None if budget is None else host_memory())
    print(memory.to_text())
    if memory.num_ranks > 1:
        print(
            f"{memory.num_ranks} GPUs: this is the first one's; each other one needs {memory.of_others() / GIB:.1f} GiB"
        )
    if session.preset.folder is None:
        print(memory.evidence())
    if drawing.options.image is None:
        print(f"seconds: {session.preset.measured or f'none measured for {session.preset.name} yet'}")
    if budget is not None and memory.choice is None:
        raise Refusal(f"{memory.sentence()}: give {', or '.join(ways_out(demand, budget, host_memory()))}")
    if budget is not None and memory.strategy != "resident":
        for way in ways_out(demand, budget, host_memory()):
            if way.endswith("(resident)"):
                print(f"to keep everything on the card: {way.removesuffix(' (resident)')}")


def save(session: Session, folder: Path) -> None:
    """Quantize a model and write it; the folder appears only once it is complete."""
    family = find_family(session.preset)
    if family.is_quantized(session.preset, replace(session.source, quantization="none")):
        raise Refusal("--save_quantized needs files that are not quantized yet, but the model's files already are")
    partial = folder.with_name(f"{folder.name}.partial")
    refuse_errors(partial.mkdir)
    try:
        session.placement = replace(session.placement, encoder_device=None)
        say_loading(session.preset.name)
        family.save_quantized(session.model, partial)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    print(folder)


def plan(args: argparse.Namespace) -> Job:
    """Check everything that the user gave.

    Raises:
        Refusal: with one sentence that names what is wrong.
    """
    if args.text is not None and args.prompt is not None:
        raise Refusal(f"the prompt must be given once, got {args.text!r} and --prompt {args.prompt!r}")
    like = Like.read(args.like)
    preset = find_preset(args.model_type or like.model_type())
    given = args.text if args.text is not None else args.prompt
    prompt = given if given is not None else like.prompt(preset.example)
    try:
        like.check_pictures(args.image, args.mask_image)
        options = options_from(args, prompt, like.options())
        renoises = (options.scheduler or preset.scheduler) in RENOISING
        base = like.cache(preset, renoises, args.target)
        asked = cache_from(args, base, options.drawn_steps(preset))
        source = like.source(args, source_from(args))
        shelf = find_calibrations(preset, source, args.calibration_dir)
        placement = like.placement(args, placement_from(args))
        session = Session(preset, source, placement, shelf, args.vram, split=split_from(args))
        drawing, of_like = like.decided(session, options, asked, args)
        if session.split.size > 1:
            session.demand(drawing)  # what cannot be split is refused before the processes meet
    except (ValueError, TypeError, OSError) as error:
        raise Refusal(name_flag(str(error), args)) from error
    notices = [*of_like, *drawing.notices]
    if preset.vocabulary is not None and args.model_type is None and not like:
        notices.append(
            f"{preset.name} is the small bundled model; --model_type full|dev|fast draws with HiDream-I1, see README.md"
        )
    if given is None and not like:
        notices.append(f"no prompt given: drawing {preset.name}'s example, {preset.example!r}")
    if renoises and asked.target is None and asked.schedule != BEST:
        scheduler = drawing.options.scheduler
        notices.append(
            f"the cache forecasts x0: {scheduler} adds noise at every step, which makes all other targets unpredictable"
        )
    check_modes(args, drawing)
    drawings = several(drawing, args.num_images)
    outputs = tuple(output_of(args.output, one, args.num_images) for one in drawings)
    for path in (*outputs, *(comparison_paths(outputs[0]) if args.compare else ())):
        check_output(path)
    return Job(session, drawings, outputs, args.output is not None, like, tuple(notices))


def check_modes(args: argparse.Namespace, drawing: Drawing) -> None:
    """Refuse flags that ask for different things; raises Refusal."""
    if args.compare and drawing.cache.is_off:
        raise Refusal(
            "--compare draws cached against uncached, so it needs the cache: drop --cache off, or give --full_steps"
        )
    if args.compare:
        refuse_errors(require, "skimage", "metrics", "--compare")
    instead = [f"--{name}" for name in INSTEAD if getattr(args, name)]
    if len(instead) > 1:
        raise Refusal(f"{instead[0]} and {instead[1]} cannot be combined: give one of them")
    if not 1 <= args.num_images <= MAX_IMAGES:
        raise Refusal(f"--num_images must be from 1 to {MAX_IMAGES}, got {args.num_images}")
    if args.save_quantized is not None and split_from(args).size > 1:
        raise Refusal("--ulysses and --guidance_parallel have no effect with --save_quantized")
    for name, is_given in (("num_images", args.num_images > 1), ("show", args.show is not None)):
        if instead and is_given:
            raise Refusal(f"--{name} has no effect with {instead[0]}: drop --{name}")
    if args.save_quantized is not None:
        if args.quantization != "nf4" or args.lora or args.save_quantized.exists():
            raise Refusal("--save_quantized needs --quantization nf4, no --lora, and a folder that does not exist yet")
        if not args.save_quantized.parent.is_dir():
            raise Refusal(f"--save_quantized must lie in an existing folder, got {args.save_quantized}")


def several(drawing: Drawing, num_images: int) -> tuple[Drawing, ...]:
    """The drawing once per picture, with consecutive seeds that begin with its own."""
    options = drawing.options
    seeds = ((options.seed + number) % (LARGEST_SEED + 1) for number in range(num_images))
    return tuple(drawing.again(options.prompt, seed) for seed in seeds)


def output_of(output: Path | None, drawing: Drawing, num_images: int) -> Path:
    """The file that a picture is written to."""
    if output is None:
        return free_name(Path(f"hidream-{drawing.options.seed}.png"))
    return output if num_images == 1 else output.with_name(f"{output.stem}-{drawing.options.seed}{output.suffix}")
