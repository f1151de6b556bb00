"""What a solver owes to each part of its fit, and what else was tried.

    python -m benchmarks.solvers --guidance 4 --full_steps 8 --drawbench DrawBench200.txt

Solvers are fitted to the first of nano's calibration prompts, each in another way, and drawn with held-out prompts.
"""

import argparse
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from benchmarks.quality import FIRST_SEED, spread
from benchmarks.quality_report import score
from benchmarks.report import RESULTS, write_json
from cache_functions import CacheConfig, Current
from cache_functions.solver import Solver
from cache_functions.stages import ROUNDS, Moments, fit_stage
from hi_diffusers import SamplingOptions, load_pipeline
from hi_diffusers.calibrating.lockstep import Lockstep, row_features
from hi_diffusers.calibrating.solving import RIDGE, rule_on, schedules
from hi_diffusers.console import Parser, quiet_libraries, run_script, say
from hi_diffusers.denoising.solved import evaluate
from hi_diffusers.engine.generation import denoise_batch
from hi_diffusers.families.hidream.pipeline import HiDreamImagePipeline
from hi_diffusers.pictures.metrics import psnr
from hi_diffusers.request.drawing import decide
from hi_diffusers.runs.prompt_files import PromptFile
from training.evaluate import held_out_prompts
from training.scenes import CPU_TIER

NUM_FITTED, NUM_DRAWN, BATCH_SIZE = 96, 48, 16
REFINING_RATE = 2e-3
OFF = CacheConfig.off()


class Pictures:
    """Prompts with their uncached runs.

    Args:
        prompts: with seeds from `first_seed` on.
        guidance: of all.
    """

    def __init__(self, pipe: HiDreamImagePipeline, prompts: Sequence[str], first_seed: int, guidance: float):
        assert pipe.preset is not None
        self.pipe = pipe
        options = [SamplingOptions(one, seed=first_seed + i, guidance=guidance) for i, one in enumerate(prompts)]
        self.drawings = [decide(pipe.preset, one, OFF) for one in options]
        self.runs = Lockstep(pipe, self.drawings, BATCH_SIZE)
        self.latents = torch.cat([self._uncached(rows, embeds) for rows, embeds in self.runs.batches], dim=1)
        self.pixels = self._decode(self.latents[-1])

    def psnr(self, latents: Tensor) -> list[float]:
        """Of the pictures that these latents are."""
        return [psnr(one, other) for one, other in zip(self._decode(latents), self.pixels, strict=True)]

    def _uncached(self, rows: slice, embeds: Any) -> Tensor:
        """Latents of some runs before every step and at the end, [S+1,B,C,H,W]."""
        latents = [self.runs.noise[rows]]
        denoise_batch(self.pipe, self.drawings[rows], embeds, lambda end: latents.append(end.latents))
        return torch.stack(latents)

    def _decode(self, latents: Tensor) -> np.ndarray:
        starts = range(0, len(latents), BATCH_SIZE)
        return np.concatenate([self.pipe.decode(latents[start : start + BATCH_SIZE]) for start in starts])


@dataclass(frozen=True)
class Fit:
    """One way to fit.

    Attributes:
        rounds, ridge: see `fit_stage`.
        is_guided: whether both branches' outputs are one feature, the guided estimate.
        bands: side of the blocks whose means are features of their own; 1: none.
    """

    rounds: int = ROUNDS
    ridge: float = RIDGE
    is_guided: bool = False
    bands: int = 1

    def features(self, latents: Tensor, kept: Sequence[Sequence[Tensor]], guidance: float) -> list[Tensor]:
        """The tensors [N,C,H,W] that the latents at the next full step are a weighted sum of."""
        if self.is_guided:
            found = [latents, *(first + guidance * second for first, second in kept)]
        else:
            found = row_features(latents, kept)
        return found + ([_means(one, self.bands) for one in found] if self.bands > 1 else [])

    def prior(self, row: Sequence[float], num_features: int, guidance: float) -> Tensor:
        """The coefficients of these features that make a solver's row."""
        values = list(row)
        if self.is_guided:  # a rule's coefficient of the guided estimate is that of its first part
            values = values[: 1 + (len(row) - 1) // 2]
        return torch.tensor(values + [0.0] * (num_features - len(values)), dtype=torch.float64)


def _means(values: Tensor, side: int) -> Tensor:
    means = functional.avg_pool2d(values, side)
    return functional.interpolate(means, scale_factor=side, mode="bilinear")


def run_stages(
    pictures: Pictures, prior: Solver, fit: Fit, rows: Sequence[Tensor] | None = None
) -> tuple[list[Tensor], Tensor]:
    """Fit stage by stage, or draw with the rows that were fitted; returns the rows and the last latents."""
    runs, found = pictures.runs, list[Tensor]()
    latents, kept = runs.noise, list[list[Tensor]]()
    ends = [*prior.full_steps[1:], len(runs.sigmas) - 1]
    for stage, (step, end) in enumerate(zip(prior.full_steps, ends, strict=True)):
        kept.append(runs.evaluate(latents, step))
        features = fit.features(latents, kept, runs.guidance)
        if rows is None:
            towards = fit.prior(prior.rows[stage], len(features), runs.guidance)
            moments = [
                Moments.of([one[run] for one in features], pictures.latents[end, run], towards)
                for run in range(len(latents))
            ]
            row, _ = fit_stage(moments, towards, fit.ridge, fit.rounds)
        else:
            row = rows[stage]
        found.append(row)
        latents = torch.einsum("m,mnchw->nchw", row, torch.stack(features).double()).float()
    return found, latents


def refined(pictures: Pictures, solver: Solver, num_rounds: int) -> Solver:
    """Adam on all coefficients at once, through the K evaluations, from a fitted solver.

    The loss is the mean of the log of the last latents' squared error; a round takes one batch of the runs. Changes of
    a stage are made in a basis in which the features are uncorrelated.
    """
    runs = pictures.runs
    pictures.pipe.transformer.requires_grad_(False)
    start = [torch.tensor(row, dtype=torch.float64) for row in solver.rows]
    bases = _uncorrelated(pictures, solver)
    changes = [torch.zeros(len(row), dtype=torch.float64, requires_grad=True) for row in start]
    optimizer = torch.optim.Adam(changes, lr=REFINING_RATE, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_rounds, REFINING_RATE / 20)
    for number in range(num_rounds):
        rows, embeds = runs.batches[number % len(runs.batches)]
        denoiser = pictures.pipe.denoiser(embeds, runs.scheduler, runs.guidance)
        latents, kept = runs.noise[rows], list[list[Tensor]]()
        denoiser.condition(latents)
        for stage, step in enumerate(solver.full_steps):
            current = Current(len(runs.sigmas) - 1, step)
            arguments = (denoiser, latents, step, runs.sigmas[step], current)
            kept.append(checkpoint(evaluate, *arguments, use_reentrant=False))
            row = (start[stage] + bases[stage] @ changes[stage]).float()
            latents = torch.einsum("m,mnchw->nchw", row, torch.stack(row_features(latents, kept)))
        error = (latents - pictures.latents[-1, rows]).square().flatten(1).mean(1)
        loss = error.clamp(min=1e-9).log().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(changes, 1.0)
        optimizer.step()
        schedule.step()
        if (number + 1) % len(runs.batches) == 0:
            say(f"{number + 1} of {num_rounds} rounds, loss {float(loss.detach()):.2f}")
    found = [a + base @ change.detach() for a, base, change in zip(start, bases, changes, strict=True)]
    return Solver.of(solver.full_steps, [row.tolist() for row in found])


def _uncorrelated(pictures: Pictures, solver: Solver) -> list[Tensor]:
    """For each stage a matrix whose columns combine its features to uncorrelated ones of size 1."""
    found = []
    for latents, kept in itertools.islice(pictures.runs.stages(solver), len(solver.full_steps)):
        features = torch.stack(row_features(latents, kept)).flatten(1).double()
        products = features @ features.T / features.shape[1]
        root = torch.linalg.cholesky(products + RIDGE * torch.diag(products.diagonal()))
        found.append(torch.linalg.solve_triangular(root.T, torch.eye(len(root), dtype=root.dtype), upper=True))
    return found


def surprises(estimates: Sequence[Tensor], full_steps: Sequence[int]) -> Tensor:
    """How wrong a forecast of each full step would have been, [K - 2,N]: that of the guided estimate by a line.

    Relative to the estimate's size, and to the median of the runs at that step.

    Args:
        estimates: guided estimates at the full steps, each [N,C,H,W].
    """
    found = []
    for place in range(2, len(full_steps)):
        before, last, here = full_steps[place - 2 : place + 1]
        line = torch.lerp(estimates[place - 2], estimates[place - 1], (here - before) / (last - before))
        size = (line - estimates[place]).flatten(1).norm(dim=1) / estimates[place].flatten(1).norm(dim=1)
        found.append(size / size.median())
    return torch.stack(found)


def foreseen(pictures: Pictures, solver: Solver) -> dict[str, float]:
    """Whether a trigger could foresee bad pictures: rank correlation of surprise and PSNR, and what it would flag."""
    *_, (end, kept) = pictures.runs.stages(solver)
    decibels = np.array(pictures.psnr(end))
    estimates = [first + sum(pictures.runs.guidance * one for one in second) for first, *second in kept]
    surprise = surprises(estimates, solver.full_steps)
    early, whole = (part.max(dim=0).values.numpy() for part in (surprise[: len(surprise) // 2], surprise))
    tenth = max(1, len(decibels) // 10)
    worst, flagged = set(np.argsort(decibels)[:tenth]), set(np.argsort(-early)[:tenth])
    return {
        "rank_correlation_early": round(float(spearmanr(early, decibels).statistic), 3),
        "rank_correlation": round(float(spearmanr(whole, decibels).statistic), 3),
        "worst_tenth_among_the_tenth_flagged_early": round(len(worst & flagged) / len(worst), 3),
    }


def measure(sets: dict[str, Pictures], full_steps: int, num_rounds: int) -> list[dict[str, Any]]:
    """Every variant on the sets; the first of them is fitted to."""
    fitted_to, *others = sets
    runs, options = sets[fitted_to].runs, sets[fitted_to].drawings[0].options
    num_steps = options.num_steps
    ends = schedules(num_steps, full_steps)
    dense = tuple(sorted({round((num_steps - 1) * (place / (full_steps - 1)) ** 1.2) for place in range(full_steps)}))
    sparse = tuple(sorted({round((num_steps - 1) * (place / (full_steps - 1)) ** 0.9) for place in range(full_steps)}))
    usual = Fit()
    variants: list[tuple[str, tuple[int, ...], Fit | None]] = [
        ("not fitted: the rule that fits are pulled to", ends[0], None),
        *((f"as calibrated, last full step {steps[-1]}", steps, usual) for steps in ends),
        ("runs not weighted", ends[0], replace(usual, rounds=1)),
        ("guided output as one", ends[0], replace(usual, is_guided=True)),
        *((f"ridge {ridge:g}", ends[0], replace(usual, ridge=ridge)) for ridge in (1e-6, 1e-1)),
        *((f"means of {side} x {side} apart", ends[0], replace(usual, bands=side)) for side in (2, 4)),
        ("denser at the start", dense, usual),
        ("sparser at the start", sparse, usual),
    ]
    results = []
    for name, steps, fit in tqdm(variants, unit="variant", disable=None):
        prior = rule_on(options, steps)
        if fit is None:
            ends_at = {one: sets[one].runs.run(prior) for one in sets}
        else:
            rows, latents = run_stages(sets[fitted_to], prior, fit)
            ends_at = {fitted_to: latents} | {one: run_stages(sets[one], prior, fit, rows)[1] for one in others}
        scores: dict[str, Any] = {one: score(sets[one].psnr(latents)) for one, latents in ends_at.items()}
        results.append({"variant": name, "steps": list(steps), **scores})
        say(str(results[-1]))
    if num_rounds:
        prior = rule_on(options, ends[0])
        solver, _ = runs.fit(prior, lambda step: sets[fitted_to].latents[step], RIDGE)
        solver = refined(sets[fitted_to], solver, num_rounds)
        scores = {one: score(sets[one].psnr(sets[one].runs.run(solver))) for one in sets}
        results.append({"variant": f"end to end, {num_rounds} rounds of Adam", "steps": list(ends[0]), **scores})
        say(str(results[-1]))
    return results


def run(args: argparse.Namespace) -> None:
    """Measure and write the result file."""
    quiet_libraries()
    pipe = load_pipeline("nano", device="cpu")
    assert pipe.preset is not None and pipe.identity is not None
    fitted = [line.prompt for line in PromptFile(pipe.preset.calibration_prompts)][:NUM_FITTED]
    sets = {} if args.foreseen else {"fitted": Pictures(pipe, fitted, 0, args.guidance)}
    sets["held out"] = Pictures(pipe, held_out_prompts(CPU_TIER, NUM_DRAWN), FIRST_SEED, args.guidance)
    if args.drawbench is not None:
        prompts = spread([line.prompt for line in PromptFile(args.drawbench)], NUM_DRAWN)
        sets["DrawBench"] = Pictures(pipe, prompts, FIRST_SEED, args.guidance)
    options = sets["held out"].drawings[0].options
    for full_steps in args.full_steps:
        steps = schedules(options.num_steps, full_steps)[0]
        prior = rule_on(options, steps)
        kind = "foreseen" if args.foreseen else "solvers"
        content = {
            "what": "solvers fitted in different ways; PSNR to the uncached picture, dB, before rounding; and whether"
            " bad pictures can be foreseen from their full steps",
            "weights": pipe.identity.fingerprint,
            "guidance": args.guidance,
            "full_steps": full_steps,
            "prompts": {name: len(one.drawings) for name, one in sets.items()},
            "results": [] if args.foreseen else measure(sets, full_steps, args.refine),
            "foreseen": {name: foreseen(one, prior) for name, one in sets.items()},
        }
        print(write_json(args.output, f"{kind}_guidance{args.guidance:g}_k{full_steps}", torch.device("cpu"), content))


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = Parser(prog="python -m benchmarks.solvers", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--guidance", type=float, default=4.0, help="guidance scale (default: %(default)s)")
    parser.add_argument("--full_steps", type=int, nargs="+", default=[13, 8], help="budgets (default: 13 8)")
    parser.add_argument(
        "--refine", type=int, default=0, help="rounds of Adam end to end, each 20 to 30 times a batch's evaluation (0)"
    )
    parser.add_argument("--foreseen", action="store_true", help="only whether bad pictures can be foreseen; no fits")
    parser.add_argument("--drawbench", type=Path, help="DrawBench's prompts, one a line (default: none of them)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results (default: %(default)s)")
    return run_script(run, parser, argv)


if __name__ == "__main__":
    raise SystemExit(main())
