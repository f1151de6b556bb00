"""Calibrate the cache for a model and sampler: `python calibrate.py --model_type nano`.

1. Prompts are drawn uncached, and the Gram matrix of x0 and velocity over the steps is averaged over the first of them.
2. The other prompts are drawn with the cache, once per candidate. A candidate is a prior, the strength of its pull on
   the learned weights, and the corrector on or off. The best one of each budget is recorded with its figures.

The pictures are kept beside the result until it is written, so that a stopped run can be resumed.
"""

import argparse
import contextlib
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from cache_functions import CacheConfig, Calibration, CalibrationKey
from cache_functions.budget import default_full_steps
from cache_functions.calibration import calibration_text
from cache_functions.config import ON_LATENTS
from cache_functions.optimum import MAX_CALIBRATED_STEPS
from cache_functions.solver import SOLVER
from hi_diffusers import __version__
from hi_diffusers.calibrating.plan import Plan
from hi_diffusers.calibrating.work import TRIALS, WorkFolder
from hi_diffusers.console import (
    Parser,
    Refusal,
    name_flag,
    quiet_libraries,
    refuse_errors,
    run_script,
    say,
    say_loading,
)
from hi_diffusers.denoising.schedulers import SCHEDULERS
from hi_diffusers.engine.session import Session
from hi_diffusers.families.family import Model
from hi_diffusers.families.table import DEFAULT_MODEL, find_preset
from hi_diffusers.flags import (
    add_model_arguments,
    add_picture_arguments,
    add_pipeline_arguments,
    check_pipeline_flags,
    placement_from,
    source_from,
    stock_source_from,
)
from hi_diffusers.pictures.metadata import write_atomically
from hi_diffusers.request.drawing import Drawing
from hi_diffusers.request.options import SamplingOptions
from hi_diffusers.runs.inputs import with_files
from hi_diffusers.runs.prompt_files import OF_PIPELINES, OVERRIDES, PromptFile
from hi_diffusers.weights.identity import default_calibration_dir, find_calibrations

if TYPE_CHECKING:
    from torch import Tensor

    from hi_diffusers.calibrating.stock import StockUncached
    from hi_diffusers.calibrating.trials import Trials
    from hi_diffusers.calibrating.uncached import Uncached, UncachedPictures, UncachedRuns

DESCRIPTION = "Draw a few prompts to learn the best forecasts and the best full steps for a model and sampler."


def build_parser() -> Parser:
    """The command line's parser."""
    parser = Parser(prog="calibrate.py", description=DESCRIPTION, version=__version__)
    add_model_arguments(parser)
    parser.add_argument("--scheduler", choices=SCHEDULERS, help="the sampler (default: the model's)")
    parser.add_argument("--num_steps", type=int, help="denoising steps (default: the model's)")
    parser.add_argument("--guidance", type=float, help="classifier-free guidance scale (default: the model's)")
    parser.add_argument("--shift", type=float, help="shift of the scheduler's noise levels (default: the model's)")
    parser.add_argument(
        "--prompt_file", type=Path, help="prompt file, as for sampling.py (default: a bundled list of 32)"
    )
    parser.add_argument(
        "--num_prompts", type=int, default=32, help="number of prompts, from the first on (default: %(default)s)"
    )
    parser.add_argument(
        "--num_held_out",
        type=int,
        default=12,
        help="number of these prompts that choose among the candidates (default: %(default)s)",
    )
    parser.add_argument(
        "--full_steps",
        help="numbers of full steps to calibrate for, e.g. 13,8 (default: a quarter of the steps, rounded up)",
    )
    parser.add_argument(
        "--target",
        choices=(SOLVER, *ON_LATENTS),
        help="what is calibrated: the solver, or forecasts of the velocity or of x0 (default: the solver; x0 where the"
        " scheduler adds noise; for --pipeline velocity and x0)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of the first prompt; each next prompt has the next seed (default: 0)"
    )
    parser.add_argument("--batch_size", type=int, default=1, help="pictures per batch (default: %(default)s)")
    parser.add_argument(
        "--calibration_dir",
        type=Path,
        help="output folder (default: the user's cache folder, which all scripts search)",
    )
    add_picture_arguments(parser)
    add_pipeline_arguments(parser)
    size = parser.add_argument_group("size, of a pipeline of diffusers (default: the pipeline's own)")
    size.add_argument("--width", type=int, help="width in pixels")
    size.add_argument("--height", type=int, help="height in pixels")
    size.add_argument("--resolution", metavar="WxH", help="width and height at once, e.g. 1360x768")
    return parser


def plan_run(args: argparse.Namespace) -> Plan:
    """Check everything that the user gave.

    Raises:
        ValueError: one sentence naming what is wrong.
    """
    preset = find_preset(args.model_type or DEFAULT_MODEL)
    check_counts(args)
    prompts = read_prompts(args.prompt_file or preset.calibration_prompts, args.num_prompts, OVERRIDES, args.image)
    if len(prompts) <= args.num_held_out:
        raise ValueError(f"num_held_out must be below the {len(prompts)} prompts, got {args.num_held_out}")
    if args.mask_image is not None:
        raise ValueError("a mask has no effect here: a calibration serves drawings with one as well")
    side = math.isqrt(preset.area)
    options = [
        SamplingOptions(
            prompt=one.text,
            seed=args.seed + index,
            width=side,
            height=side,
            scheduler=args.scheduler,
            num_steps=args.num_steps,
            guidance=args.guidance,
            shift=args.shift,
            image=one.image,
            strength=args.strength,
            fit=args.fit,
        ).resolve(preset)
        for index, one in enumerate(prompts)
    ]
    first, off = options[0], CacheConfig.off()
    if first.num_steps > MAX_CALIBRATED_STEPS:
        raise ValueError(f"num_steps must be at most {MAX_CALIBRATED_STEPS} to be calibrated, got {first.num_steps}")
    if args.target not in (None, "x0") and first.renoises:
        raise ValueError(f"target must be x0 with the {first.scheduler} scheduler, got {args.target!r}")
    target = args.target or ("x0" if first.renoises else SOLVER)
    return Plan(
        preset=preset,
        drawings=tuple(Drawing(preset, one, off) for one in options),
        num_fitted=len(prompts) - args.num_held_out,
        budgets=_budgets(args.full_steps, first.drawn_steps),
        targets=(target,),
        folder=args.calibration_dir or default_calibration_dir(),
        batch_size=args.batch_size,
    )


def check_counts(args: argparse.Namespace) -> None:
    """Raise ValueError for numbers below 1."""
    for name in ("num_prompts", "num_held_out", "batch_size"):
        if getattr(args, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(args, name)}")


@dataclass(frozen=True)
class Prompt:
    """A prompt of a calibration, and the picture that it starts from, or None."""

    text: str
    image: Path | None


def read_prompts(path: Path, count: int, names: tuple[str, ...], images: Sequence[Path] = ()) -> list[Prompt]:
    """The first prompts of a file, each with a picture to start from.

    Args:
        names: options that a line could set.
        images: pictures of the prompts that name none, in turn.

    Raises:
        ValueError: if a line sets another option than its picture, or only some have one.
    """
    lines = list(islice(PromptFile(path, names=names), count))
    own = next((line for line in lines if set(line.overrides) - {"image"}), None)
    if own is not None:
        raise ValueError(
            f"prompt_file {path}, line {own.line}: the line must not set {', '.join(own.overrides)}: a"
            " calibration draws all prompts with the same settings"
        )
    found = []
    for number, line in enumerate(lines):
        image = with_files(line.overrides, path.parent.resolve()).get("image")
        found.append(Prompt(line.prompt, image or (images[number % len(images)] if images else None)))
    if len({one.image is None for one in found}) > 1:
        raise ValueError(f"prompt_file {path} names pictures to start from in some lines only: give all, or --image")
    return found


def _budgets(text: str | None, num_steps: int) -> tuple[int, ...]:
    if text is None:
        return (default_full_steps(num_steps),)
    try:
        budgets = {int(part) for part in text.split(",")}
    except ValueError:
        raise ValueError(f"full_steps must be whole numbers separated by commas, got {text!r}") from None
    if not all(1 <= budget <= num_steps for budget in budgets):
        raise ValueError(f"full_steps must lie between 1 and the {num_steps} steps, got {text}")
    return tuple(sorted(budgets, reverse=True))


def run(args: argparse.Namespace) -> None:
    """Do what the flags say.

    Raises:
        Refusal: if the request cannot be carried out, before weights are read.
    """
    try:
        check_pipeline_flags(args)
        if args.pipeline is not None:
            calibrate_pipeline(args)
            return
        for name in ("width", "height", "resolution"):
            if getattr(args, name) is not None:
                raise ValueError(f"{name} has no effect without --pipeline: HiDream's noise levels do not depend on it")
    except (ValueError, OSError) as error:
        raise Refusal(name_flag(str(error), args)) from error
    plan = refuse_errors(plan_run, args)
    if args.lora:
        raise Refusal("--lora cannot be calibrated: a drawing with LoRA uses the base model's calibration. Drop --lora")
    placement = placement_from(args)
    if placement.encoder_device is not None:
        say("--encoder_device has no effect here: prompts are encoded on the device that draws")
    session = Session(
        plan.preset, refuse_errors(source_from, args), replace(placement, encoder_device=None), vram=args.vram
    )
    notices = refuse_errors(session.check)
    refuse_errors(lambda: session.files)
    session.calibrations = shelf = find_calibrations(plan.preset, session.source)
    assert shelf is not None
    if session.source.model_path is not None or session.source.transformer is not None or shelf.altered:
        altered = "" if not shelf.altered else "-" + shelf.altered.lower().replace(" and ", "-")
        plan = replace(plan, model=f"-{shelf.model[:8]}{altered}")
    work = plan.folder / f"{plan.path('x0').stem.rpartition('-')[0]}.progress"
    folder = refuse_errors(WorkFolder, work)
    demand = session.demand(plan.most_demanding(), batch_size=plan.batch_size, keeps_encoders=True)
    for notice in notices + refuse_errors(session.fit, demand):
        say(notice)
    loaded = [repr(session.placement), *session.source.packing()]
    with contextlib.ExitStack() as stack:
        refuse_errors(stack.enter_context, folder.locked())
        for notice in refuse_errors(folder.claim, settings_of(plan, shelf.model, loaded)):
            say(notice)
        say_loading(plan.preset.name)
        with session.explained(demand):
            calibrate(plan, session.model, folder, shelf.model)


def calibrate(plan: Plan, model: Model, folder: WorkFolder, fingerprint: str) -> None:
    """Draw, choose and write the result; the pictures are kept until then."""
    from hi_diffusers.calibrating.trials import Trials
    from hi_diffusers.calibrating.uncached import UncachedPictures, UncachedRuns

    is_solver = SOLVER in plan.targets
    uncached = (UncachedRuns if is_solver else UncachedPictures)(model, plan, folder.path)
    say(f"drawing {len(plan.drawings)} prompts uncached: {plan.num_fitted} to fit, the others to choose")
    if isinstance(uncached, UncachedRuns):
        print(calibrate_solver(fingerprint, uncached, folder.path / TRIALS))
    else:
        uncached.complete()
        trials = Trials(uncached, folder.path / TRIALS)
        for target in plan.targets:
            print(calibrate_target(target, fingerprint, uncached, trials))
    folder.remove()


def calibrate_solver(fingerprint: str, uncached: "UncachedRuns", found: Path) -> Path:
    """Fit and choose a solver for every budget, and write the file.

    Args:
        found: keeps the solvers that were fitted.
    """
    from hi_diffusers.calibrating.solving import SolverSearch

    plan = uncached.plan
    search = SolverSearch(uncached, found)
    drawn, most = plan.num_pictures * plan.sampler.drawn_steps, search.evaluations()
    say(f"{drawn:,} evaluations of the network uncached, and at most {most:,} to fit and to choose")
    uncached.complete()
    with tqdm(total=most, unit="evaluation", file=sys.stderr) as bar:
        search.tell = bar.update
        choices = {budget: search.choose(budget) for budget in plan.budgets}
    about = {"model_type": plan.preset.name}
    return write_choices(
        plan.path(SOLVER), plan.key(fingerprint, SOLVER), None, uncached, choices, about, plan.sampler.seed
    )


def settings_of(plan: Plan, model: str, loaded: Sequence[str]) -> dict[str, Any]:
    """All that the pictures' bits depend on.

    Args:
        loaded: how the model is kept and packed.
    """
    return {
        "key": asdict(plan.key(model, "")),
        "prompts": [(one.options.prompt, one.options.seed) for one in plan.drawings],
        "images": [one.options.image and one.options.image.sha256 for one in plan.drawings],
        "num_fitted": plan.num_fitted,
        "loaded": loaded,
        "targets": plan.targets,
    }


def calibrate_target(target: str, model: str, uncached: "UncachedPictures", trials: "Trials") -> Path:
    """Choose for every budget and write the target's file."""
    plan = uncached.plan
    about = {"model_type": plan.preset.name}
    return write_calibration(plan.path(target), plan.key(model, target), uncached, trials, about, plan.sampler.seed)


def write_calibration(
    path: Path,
    key: CalibrationKey,
    uncached: "Uncached",
    trials: "Trials",
    about: Mapping[str, Any],
    first_seed: int,
) -> Path:
    """Choose for every budget, and write a calibration file.

    Args:
        about: information for readers: which model.
        first_seed: seed of the first picture.
    """
    from hi_diffusers.calibrating.choosing import choose

    plan, gram = uncached.plan, uncached.gram(key.target)
    unchosen = Calibration(key, gram, uncached.sigmas, {}, {}, "")
    choices = {}
    for full_steps in tqdm(plan.budgets, desc=f"choosing for {key.target}", unit="budget", file=sys.stderr):
        choices[full_steps] = choose(unchosen, full_steps, trials, corrects=uncached.corrects)
    return write_choices(path, key, gram, uncached, choices, about, first_seed)


def write_choices(
    path: Path,
    key: CalibrationKey,
    gram: "Tensor | None",
    uncached: "Uncached",
    choices: Mapping[int, Any],
    about: Mapping[str, Any],
    first_seed: int,
) -> Path:
    """Write a calibration file. Arguments as in `write_calibration`, and the matrix and each budget's choice."""
    import torch

    plan = uncached.plan
    made_of = {
        "software": f"hi-diffusers {__version__}, torch {torch.__version__}",
        **about,
        "prompts_fitted": plan.num_fitted,
        "prompts_choosing": plan.num_pictures - plan.num_fitted,
        "first_seed": first_seed,
        "figures": "PSNR in dB of float pictures to the uncached ones, over the prompts that chose",
    }
    write_atomically(path, calibration_text(key, gram, uncached.sigmas, choices, made_of).encode())
    return path


def calibrate_pipeline(args: argparse.Namespace) -> None:
    """Calibrate a pipeline of diffusers; raises ValueError for what the user gave wrong."""
    quiet_libraries()
    from hi_diffusers.calibrating.stock import StockUncached, make_stock_plan
    from hi_diffusers.calibrating.trials import Trials
    from hi_diffusers.stock.drawing import StockModel

    check_counts(args)
    source = stock_source_from(args)
    if args.prompt_file is None and source.pipeline_class.draws_classes:
        numbers = sorted(source.pipeline_class.labels) or [0]
        prompts = [str(numbers[place * len(numbers) // args.num_prompts]) for place in range(args.num_prompts)]
    else:
        path = args.prompt_file or find_preset("full").calibration_prompts
        prompts = [one.text for one in read_prompts(path, args.num_prompts, OF_PIPELINES)]
    plan = make_stock_plan(args, source, prompts, _budgets)
    folder = WorkFolder(plan.folder / f"{plan.stem}.progress")
    settings = {
        "model": source.fingerprint,
        "options": dict(plan.first.options),
        "images": list(plan.first.image_hashes),
        "prompts": [(one.prompt, one.seed) for one in plan.requests],
        "num_fitted": plan.num_fitted,
        "placed": [source.device, source.dtype, source.compiled, source.attention_backend],
        "velocity": "velocity" in plan.targets,
    }
    with folder.locked():
        for notice in folder.claim(settings):
            say(notice)
        say_loading(source.where)
        try:
            model = StockModel.open(source)
            uncached = StockUncached(model, plan, folder.path)
            say(f"drawing {plan.num_pictures} prompts uncached: {plan.num_fitted} to fit, the others to choose")
            uncached.complete()
            trials = Trials(uncached, folder.path / TRIALS)
            for target in plan.targets:
                print(calibrate_stock_target(target, uncached, trials))
        except ValueError as error:  # weights were read, so this is no refusal
            raise RuntimeError(str(error)) from error
        folder.remove()


def calibrate_stock_target(target: str, uncached: "StockUncached", trials: "Trials") -> Path:
    """Choose for every budget and write the target's file."""
    plan = uncached.plan
    about = {"pipeline": plan.first.source.pipeline_class.class_name, "options": dict(plan.first.options)}
    return write_calibration(plan.path(target), plan.key(target), uncached, trials, about, plan.first.seed)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Exit codes: 0 done, 2 refused before weights are read, 1 failed, 130 interrupted."""
    return run_script(run, build_parser(), argv)
