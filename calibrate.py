"""Calibrate the cache for a model and sampler: `python calibrate.py --model_type nano`.

1. Prompts are drawn uncached, and the Gram matrix of x0 and velocity over the steps is averaged over the first of them.
2. The others are drawn with the cache on, once for every candidate: how strongly the learned weights lean to which
   prior, with and without the corrector. The best of each budget is recorded with its figures.

What was drawn is kept beside the result until it is written, so that a stopped run goes on.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from cache_functions import CacheConfig, Calibration, CalibrationKey
from cache_functions.budget import default_full_steps
from cache_functions.cache_init import ON_LATENTS
from cache_functions.calibration import Choice, calibration_text, merit
from cache_functions.optimum import Rule, optimal_full_steps, step_factors
from hi_diffusers import __version__
from hi_diffusers.console import Parser, Refusal, quiet_libraries, refuse_errors, run_script, say
from hi_diffusers.identity import default_calibration_dir, find_calibrations
from hi_diffusers.metadata import write_atomically
from hi_diffusers.metrics import psnr
from hi_diffusers.model_files import locate
from hi_diffusers.options import ResolvedOptions, SamplingOptions, add_model_arguments, source_from
from hi_diffusers.presets import ModelPreset, calibration_prompts, find_preset
from hi_diffusers.runs.prompt_files import PromptFile
from hi_diffusers.schedulers import SCHEDULERS
from taylor_utils.bases.learned import PRIORS

if TYPE_CHECKING:
    from hi_diffusers import HiDreamImagePipeline
    from hi_diffusers.pipelines.steps import StepEnd

DESCRIPTION = "Draw a few prompts to learn the best forecasts and the best full steps for a model and sampler."
NUM_ANCHORS = 3
RIDGES = (1e-4, 1e-3, 1e-2, 0.03, 0.1, 0.3)
FIRST_RIDGES = (1e-3, 1e-2, 0.1)
CAP_DB = 100.0  # of identical pictures, whose PSNR is infinite


@dataclass(frozen=True)
class Plan:
    """All that was asked for, checked as far as that goes without reading weights.

    Attributes:
        options: one per prompt, resolved; the first `num_fitted` make the matrix, the others choose.
        budgets: numbers of full steps, the largest first.
        targets: what is calibrated, one file each.
        folder: where the files are written.
        model: part of their names where the model's files are not the preset's own.
    """

    preset: ModelPreset
    options: tuple[ResolvedOptions, ...]
    num_fitted: int
    budgets: tuple[int, ...]
    targets: tuple[str, ...]
    folder: Path
    batch_size: int
    model: str = ""

    @property
    def sampler(self) -> ResolvedOptions:
        """The options but for prompt and seed."""
        return self.options[0]

    def key(self, model: str, target: str) -> CalibrationKey:
        """What the file of a target will fit."""
        one = self.sampler
        return CalibrationKey(
            model, one.scheduler, one.num_steps, one.shift, one.guidance if one.guided else 0.0, target
        )

    def path(self, target: str) -> Path:
        """The file of a target; what is the preset's own is not named."""
        one = self.sampler
        shift = "" if one.shift == self.preset.shift else f"-shift{one.shift:g}"
        name = f"{self.preset.name}{self.model}-{one.scheduler}{one.num_steps}{shift}-guidance{one.guidance:g}"
        return self.folder / f"{name}-{target}.json"


@dataclass(frozen=True)
class Candidate:
    """One way to forecast within a budget.

    Attributes:
        full_steps: the schedule.
        prior, ridge: of the learned weights.
        corrector, corrector_from: see `CacheConfig`.
    """

    full_steps: tuple[int, ...]
    prior: str
    ridge: float
    corrector: bool = False
    corrector_from: int = 0

    def config(self, calibration: Calibration) -> CacheConfig:
        """As a configuration of the cache."""
        return CacheConfig(
            target=calibration.key.target,
            basis="learned",
            schedule="mask",
            mask=self.full_steps,
            max_order=NUM_ANCHORS - 1,
            prior=self.prior,
            ridge=self.ridge,
            corrector=self.corrector,
            corrector_from=self.corrector_from,
            calibration=calibration,
        )


@dataclass(frozen=True)
class Score:
    """Median and 10th percentile of the PSNR to the uncached pictures, dB."""

    median: float
    p10: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Score":
        """Of one value per picture."""
        capped = np.minimum(values, CAP_DB)
        return cls(float(np.median(capped)), float(np.percentile(capped, 10)))

    @property
    def merit(self) -> float:
        """What is maximised."""
        return merit(self.median, self.p10)


class Drawings:
    """The uncached pictures: drawn once, kept in a folder.

    Args:
        pipe: what draws.
        plan: what is drawn.
        folder: where one file per picture is kept until the calibration is done.
    """

    def __init__(self, pipe: "HiDreamImagePipeline", plan: Plan, folder: Path):
        self.pipe, self.plan, self.folder = pipe, plan, folder

    def complete(self) -> None:
        """Draw what is missing."""
        missing = [i for i in range(len(self.plan.options)) if not self._path(i).is_file()]
        size = self.plan.batch_size
        with tqdm(total=len(self.plan.options), initial=len(self.plan.options) - len(missing), unit="picture") as bar:
            for start in range(0, len(missing), size):
                batch = missing[start : start + size]
                self._draw(batch)
                bar.update(len(batch))

    def gram(self, target: str) -> Tensor:
        """Mean over the pictures that are fitted, [num_steps, num_steps], float64, per element of the latent."""
        return torch.stack([self._load(i)[target] for i in range(self.plan.num_fitted)]).mean(0)

    def pixels(self, index: int) -> Any:
        """A picture that chooses, float [H,W,3]."""
        return self._load(index)["pixels"].numpy()

    def _draw(self, indices: list[int]) -> None:
        from hi_diffusers.generation import denoise_batch, encode_prompts

        options = [self.plan.options[i] for i in indices]
        embeds = encode_prompts(self.pipe, options)
        x0: list[Tensor] = []
        after: list[Tensor] = []

        def observe(end: "StepEnd") -> None:
            x0.append(end.x0.cpu())
            after.append(end.latents.cpu())

        latents = denoise_batch(self.pipe, options, CacheConfig.off(), embeds, observe)
        pixels = torch.from_numpy(self.pipe.decode(latents))
        features = {"x0": torch.stack(x0, dim=1)}
        if "velocity" in self.plan.targets:
            features["velocity"] = self._velocities(features["x0"], torch.stack(after, dim=1), options)
        for row, index in enumerate(indices):
            content = {name: _inner_products(values[row]) for name, values in features.items()}
            if index >= self.plan.num_fitted:
                content["pixels"] = pixels[row].clone()
            partial = self._path(index).with_suffix(".partial")
            torch.save(content, partial)
            partial.replace(self._path(index))

    def _velocities(self, x0: Tensor, after: Tensor, options: list[ResolvedOptions]) -> Tensor:
        """(x - x0) / sigma of every step [B,S,C,H,W]; x is what the step before left."""
        generators = [torch.Generator().manual_seed(one.seed) for one in options]
        noise = self.pipe.draw_noise(len(options), options[0].width, options[0].height, generators).cpu()
        before = torch.cat((noise[:, None], after[:, :-1]), dim=1)
        sigmas = torch.tensor(sampler_sigmas(options[0])[:-1])
        return (before - x0) / sigmas[None, :, None, None, None]

    def _path(self, index: int) -> Path:
        return self.folder / f"picture-{index:04d}.pt"

    def _load(self, index: int) -> dict[str, Tensor]:
        content: dict[str, Tensor] = torch.load(self._path(index), weights_only=True)
        return content


class Trials:
    """The cached pictures: every candidate's score, kept in a file so that none is drawn twice."""

    def __init__(self, drawings: Drawings, path: Path):
        self.drawings, self.path = drawings, path
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        self.known = {json.dumps(line["candidate"]): line["psnr"] for line in map(json.loads, lines)}

    def score(self, candidate: Candidate, calibration: Calibration) -> Score:
        """Draw the prompts that choose with this candidate, unless that was done before."""
        name = json.dumps([calibration.key.target, *asdict(candidate).values()])
        if name not in self.known:
            self.known[name] = list(self._draw(candidate.config(calibration)))
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"candidate": json.loads(name), "psnr": self.known[name]}) + "\n")
        return Score.of(self.known[name])

    def _draw(self, cache: CacheConfig) -> Iterator[float]:
        from hi_diffusers import generate_batch

        plan = self.drawings.plan
        indices = range(plan.num_fitted, len(plan.options))
        for start in range(0, len(indices), plan.batch_size):
            batch = indices[start : start + plan.batch_size]
            options = [SamplingOptions(**plan.options[i].settings()) for i in batch]
            drawn = generate_batch(self.drawings.pipe, options, cache)
            for index, picture in zip(batch, drawn, strict=True):
                yield psnr(picture.pixels, self.drawings.pixels(index))


def choose(calibration: Calibration, full_steps: int, trials: Trials, corrects: bool) -> Choice:
    """The best candidate for a budget: prior and ridge first, then the corrector, then the ridge once more."""
    factors = step_factors(calibration.sigmas, calibration.key.target)

    def schedule(prior: str, ridge: float, corrector: bool = False) -> tuple[int, ...]:
        rule = Rule(NUM_ANCHORS, prior, ridge, corrector)
        return optimal_full_steps(calibration.gram, factors, rule, full_steps)[0]

    def best_of(candidates: Sequence[Candidate]) -> Candidate:
        return max(candidates, key=lambda one: trials.score(one, calibration).merit)

    def neighbours(one: Candidate) -> list[Candidate]:
        place = RIDGES.index(one.ridge)
        ridges = [RIDGES[i] for i in (place - 1, place + 1) if 0 <= i < len(RIDGES)]
        return [replace(one, ridge=r, full_steps=schedule(one.prior, r, one.corrector)) for r in ridges]

    best = best_of([Candidate(schedule(p, r), p, r) for p in PRIORS for r in FIRST_RIDGES])
    best = best_of([best, *neighbours(best)])
    if corrects and full_steps > 1:
        middle = best.full_steps[full_steps // 2]
        aware = replace(best, full_steps=schedule(best.prior, best.ridge, True), corrector=True)
        corrected = best_of(
            [
                aware,
                replace(aware, corrector_from=aware.full_steps[full_steps // 2]),
                replace(best, corrector=True),
                replace(best, corrector=True, corrector_from=middle),
            ]
        )
        best = best_of([best, corrected, *neighbours(corrected)])
    score = trials.score(best, calibration)
    return Choice(
        full_steps=best.full_steps,
        max_order=NUM_ANCHORS - 1,
        prior=best.prior,
        ridge=best.ridge,
        corrector=best.corrector,
        corrector_from=best.corrector_from,
        median_db=round(score.median, 3),
        p10_db=round(score.p10, 3),
    )


def sampler_sigmas(options: ResolvedOptions) -> list[float]:
    """Noise level at every step and after the last one."""
    from hi_diffusers.schedulers import make_scheduler

    scheduler = make_scheduler(options.scheduler, options.shift)
    scheduler.set_timesteps(options.num_steps)
    return [float(sigma) for sigma in scheduler.sigmas]


def _inner_products(values: Tensor) -> Tensor:
    """Mean products [S,S] of the features [S,C,H,W] of one picture."""
    flat = values.flatten(1).double()
    return flat @ flat.T / flat.shape[1]


def build_parser() -> Parser:
    """All flags."""
    parser = Parser(prog="calibrate.py", description=DESCRIPTION)
    add_model_arguments(parser)
    parser.add_argument("--scheduler", choices=SCHEDULERS, help="the sampler (default: the model's)")
    parser.add_argument("--num_steps", type=int, help="denoising steps (default: the model's)")
    parser.add_argument("--guidance", type=float, help="classifier-free guidance scale (default: the model's)")
    parser.add_argument("--shift", type=float, help="of the sampler's noise levels (default: the model's)")
    parser.add_argument("--prompt_file", type=Path, help="as sampling.py reads them (default: a bundled list of 32)")
    parser.add_argument("--num_prompts", type=int, default=32, help="take the first so many (default: %(default)s)")
    parser.add_argument("--num_held_out", type=int, default=12, help="of them, for choosing (default: %(default)s)")
    parser.add_argument(
        "--full_steps", help="budgets to choose for, such as 13,8 (default: a quarter of the steps, rounded up)"
    )
    parser.add_argument(
        "--target", choices=ON_LATENTS, help="what is forecast (default: both, x0 where noise is added)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the first prompt; each next has one more (default: 0)")
    parser.add_argument("--batch_size", type=int, default=1, help="pictures at once (default: %(default)s)")
    parser.add_argument(
        "--calibration_dir", type=Path, help="where to write (default: where all scripts look, the user's cache folder)"
    )
    return parser


def plan_run(args: argparse.Namespace) -> Plan:
    """Check everything that the user gave.

    Raises:
        ValueError: one sentence naming what is wrong.
    """
    preset = find_preset(args.model_type or "nano")
    for name in ("num_prompts", "num_held_out", "batch_size"):
        if getattr(args, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(args, name)}")
    lines = list(islice(PromptFile(args.prompt_file or calibration_prompts(preset)), args.num_prompts))
    own = next((line for line in lines if line.overrides), None)
    if own is not None:
        raise ValueError(
            f"prompt_file {args.prompt_file}, line {own.line}: {', '.join(own.overrides)} of its own cannot be"
            " calibrated: one sampler draws all prompts"
        )
    prompts = [line.prompt for line in lines]
    if len(prompts) <= args.num_held_out:
        raise ValueError(f"num_held_out must be below the {len(prompts)} prompts, got {args.num_held_out}")
    options = [
        SamplingOptions(
            prompt=prompt,
            seed=args.seed + index,
            scheduler=args.scheduler,
            num_steps=args.num_steps,
            guidance=args.guidance,
            shift=args.shift,
        ).resolve(preset)
        for index, prompt in enumerate(prompts)
    ]
    first = options[0]
    if args.target == "velocity" and first.renoises:
        raise ValueError(f"target must be x0 with the {first.scheduler} scheduler, got 'velocity'")
    targets = (args.target,) if args.target else ("x0",) if first.renoises else ON_LATENTS
    return Plan(
        preset=preset,
        options=tuple(options),
        num_fitted=len(prompts) - args.num_held_out,
        budgets=_budgets(args.full_steps, first.num_steps),
        targets=tuple(targets),
        folder=args.calibration_dir or default_calibration_dir(),
        batch_size=args.batch_size,
    )


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
        Refusal: before weights are read.
    """
    plan = refuse_errors(plan_run, args)
    quiet_libraries()
    from hi_diffusers.loading import load_pipeline, resolve_device

    device = refuse_errors(resolve_device, args.device)
    source = refuse_errors(source_from, args)
    refuse_errors(locate, plan.preset, source)
    shelf = find_calibrations(plan.preset, source)
    assert shelf is not None
    if source.model_path is not None or source.quantization != "none":
        plan = replace(plan, model=f"-{shelf.model[:8]}{'' if source.quantization == 'none' else '-nf4'}")
    work = plan.folder / f"{plan.path('x0').stem.rpartition('-')[0]}.progress"
    refuse_errors(work.mkdir, parents=True, exist_ok=True)
    _claim(work, plan, shelf.model, [str(device), args.dtype or "auto", source.quantization, source.llama or ""])
    pipe = load_pipeline(plan.preset.name, device=args.device, dtype=args.dtype or "auto", **asdict(source))
    drawings = Drawings(pipe, plan, work)
    say(f"drawing {len(plan.options)} prompts uncached, {plan.num_fitted} to fit and the others to choose")
    drawings.complete()
    trials = Trials(drawings, work / "trials.jsonl")
    for target in plan.targets:
        print(calibrate_target(target, shelf.model, drawings, trials))
    for path in work.iterdir():
        path.unlink()
    work.rmdir()


def _claim(work: Path, plan: Plan, model: str, loaded: Sequence[str]) -> None:
    """Note in the folder of unfinished work whose it is; raises Refusal if it is another run's.

    Args:
        loaded: device, dtype and what else the pictures' bits depend on.
    """
    settings = {
        "key": asdict(plan.key(model, "")),
        "prompts": [(one.prompt, one.seed) for one in plan.options],
        "num_fitted": plan.num_fitted,
        "loaded": loaded,
        "velocity": "velocity" in plan.targets,
    }
    text, path = json.dumps(settings), work / "settings.json"
    if path.is_file() and path.read_text(encoding="utf-8") != text:
        raise Refusal(f"{work} holds the unfinished work of other settings: finish that, or delete the folder")
    path.write_text(text, encoding="utf-8")


def calibrate_target(target: str, model: str, drawings: Drawings, trials: Trials) -> Path:
    """Choose for every budget and write the target's file."""
    plan = drawings.plan
    key, gram, sigmas = plan.key(model, target), drawings.gram(target), tuple(sampler_sigmas(plan.sampler))
    unchosen = Calibration(key, gram, sigmas, {}, {}, "")
    choices = {}
    for full_steps in tqdm(plan.budgets, desc=f"choosing for {target}", unit="budget", file=sys.stderr):
        choices[full_steps] = choose(unchosen, full_steps, trials, corrects=not plan.sampler.renoises)
    made_of = {
        "software": f"hi-diffusers {__version__}, torch {torch.__version__}",
        "model_type": plan.preset.name,
        "prompts_fitted": plan.num_fitted,
        "prompts_choosing": len(plan.options) - plan.num_fitted,
        "first_seed": plan.sampler.seed,
        "figures": "PSNR in dB of float pictures to the uncached ones, over the prompts that chose",
    }
    path = plan.path(target)
    write_atomically(path, calibration_text(key, gram, sigmas, choices, made_of).encode())
    return path


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Exit codes: 0 done, 2 refused before weights are read, 1 failed, 130 interrupted."""
    return run_script(run, build_parser(), argv)


if __name__ == "__main__":
    raise SystemExit(main())
