"""Two experiments on computed schedules, beside the default: costs that know the solver, and a search by drawing.

    python -m benchmarks.schedules

The dynamic program weighs the error of a forecast step by what one Euler step does with it. UniPC is of second order
and keeps a history, so the first experiment takes each step's weight from the solver itself: how far the latent two
steps later moves if x0 is off by one at that step. The second goes on from the chosen schedule by hill climbing: move
one full step by one or two, draw the prompts that the calibration chose with, keep what is better. All are judged on
prompts that neither the calibration nor the search has seen.
"""

import argparse
import itertools
import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from benchmarks.report import RESULTS, write_json
from cache_functions import CacheConfig, resolve
from cache_functions.optimum import Rule, optimal_full_steps
from hi_diffusers import SamplingOptions, generate_batch, load_pipeline
from hi_diffusers.console import Parser, Refusal, quiet_libraries, run_script, say
from hi_diffusers.denoising.schedulers import make_scheduler
from hi_diffusers.families.hidream.pipeline import HiDreamImagePipeline
from hi_diffusers.pictures.metrics import Score, psnr
from training.evaluate import held_out_prompts
from training.scenes import CPU_TIER

BUDGETS = (13, 8)
NUM_CLIMBING = 24
FIRST_SEED = 3_000  # of the pictures that judge
BATCH_SIZE = 16
HORIZON = 2


class Pictures:
    """Prompts with their uncached pictures.

    Args:
        pipe: what draws.
        prompts: one a picture.
        seed: of the first; each next has one more.
        guidance: of all.
    """

    def __init__(self, pipe: HiDreamImagePipeline, prompts: Sequence[str], seed: int, guidance: float):
        self.pipe = pipe
        self.options = [SamplingOptions(one, seed=seed + i, guidance=guidance) for i, one in enumerate(prompts)]
        self.uncached = self._draw(CacheConfig.off())

    def score(self, cache: CacheConfig) -> Score:
        """PSNR of the cached pictures to the uncached ones."""
        drawn = self._draw(cache)
        return Score.of([psnr(a, b) for a, b in zip(drawn, self.uncached, strict=True)])

    def _draw(self, cache: CacheConfig) -> list[np.ndarray]:
        batches = [self.options[i : i + BATCH_SIZE] for i in range(0, len(self.options), BATCH_SIZE)]
        return [picture.pixels for batch in batches for picture in generate_batch(self.pipe, batch, cache)]


def solver_factors(scheduler_name: str, shift: float, num_steps: int) -> torch.Tensor:
    """How far the latent moves within HORIZON solver steps if x0 is off by one at a step [num_steps], float64.

    The solver is linear in latent and x0, so a run whose x0 is one at that step and zero elsewhere, from a latent of
    zeros, tells.
    """
    factors = []
    for off in range(num_steps):
        scheduler = make_scheduler(scheduler_name, shift)
        scheduler.set_timesteps(num_steps)
        scheduler.set_begin_index(0)
        latent, moved = torch.zeros(1, 1, 1, 1), 0.0
        for step in range(min(off + HORIZON, num_steps)):
            sigma = float(scheduler.sigmas[step])
            x0 = torch.full_like(latent, float(step == off))
            latent = scheduler.step((latent - x0) / sigma, scheduler.timesteps[step], latent, return_dict=False)[0]
            moved = float(latent.abs())
        factors.append(moved)
    return torch.tensor(factors, dtype=torch.float64)


def climb(start: CacheConfig, pictures: Pictures, num_steps: int, trials: int) -> tuple[CacheConfig, int]:
    """Hill climbing over schedules; returns the best one and how often it was improved."""
    chooser = random.Random(0)
    best, best_value, improved = start, pictures.score(start).merit, 0
    assert start.mask is not None
    tried = {start.mask}
    for _ in range(trials):
        proposals = [mask for mask in _neighbours(best.mask or (), num_steps) if mask not in tried]
        if not proposals:
            break
        proposal = chooser.choice(proposals)
        tried.add(proposal)
        value = pictures.score(replace(best, mask=proposal)).merit
        if value > best_value:
            best, best_value, improved = replace(best, mask=proposal), value, improved + 1
    return best, improved


def _neighbours(mask: tuple[int, ...], num_steps: int) -> list[tuple[int, ...]]:
    """The schedules that differ by one full step, moved by one or two."""
    moved = (
        (*mask[:place], mask[place] + by, *mask[place + 1 :]) for place in range(1, len(mask)) for by in (-2, -1, 1, 2)
    )
    return [one for one in moved if all(a < b for a, b in itertools.pairwise(one)) and one[-1] < num_steps]


def measure(pipe: HiDreamImagePipeline, guidance: float, args: argparse.Namespace) -> list[dict[str, object]]:
    """The three schedules at every budget."""
    preset = pipe.preset
    lines = preset.calibration_prompts.read_text(encoding="utf-8").splitlines()
    climbing = Pictures(pipe, lines[-NUM_CLIMBING:], FIRST_SEED - NUM_CLIMBING, guidance)
    judging = Pictures(pipe, held_out_prompts(CPU_TIER, args.num_prompts), FIRST_SEED, guidance)
    resolved = judging.options[0].resolve(preset)
    factors = solver_factors(resolved.scheduler, resolved.shift, resolved.num_steps)
    results: list[dict[str, object]] = []
    for budget in BUDGETS:
        default = resolve(CacheConfig.best(budget), resolved.sampler(preset), pipe.calibrations).config
        if default.calibration is None or default.mask is None:
            raise Refusal(f"the bundled model has no calibration at guidance {guidance:g}: run make calibrate-nano")
        rule = Rule(default.max_order + 1, str(default.prior), float(default.ridge or 0), default.corrector)
        mask, _ = optimal_full_steps(default.calibration.gram, factors, rule, budget)
        climbed, improved = climb(default, climbing, resolved.num_steps, args.trials)
        for name, cache in (
            ("the default", default),
            ("costs from the solver", replace(default, mask=mask)),
            (f"hill climbing, {args.trials} trials, {improved} improvements", climbed),
        ):
            score, seen = judging.score(cache), climbing.score(cache)
            results.append(
                {
                    "guidance": guidance,
                    "budget": budget,
                    "schedule": name,
                    "full_steps": cache.mask,
                    "median": round(score.median, 2),
                    "p10": round(score.p10, 2),
                    "median_where_it_climbed": round(seen.median, 2),
                    "p10_where_it_climbed": round(seen.p10, 2),
                }
            )
            say(json.dumps(results[-1]))
    return results


def run(args: argparse.Namespace) -> None:
    """Measure and write the result file."""
    quiet_libraries()
    pipe = load_pipeline("nano", device="cpu")
    content = {
        "what": "computed schedules: PSNR in dB of float pictures to the uncached ones",
        "weights": pipe.identity.fingerprint,
        "num_prompts": args.num_prompts,
        "trials": args.trials,
        "results": [row for guidance in args.guidance for row in measure(pipe, guidance, args)],
    }
    print(write_json(args.output, "schedules", torch.device("cpu"), content))


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = Parser(prog="python -m benchmarks.schedules", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--guidance", type=float, nargs="+", default=[2.0, 4.0], help="default: 2 4")
    parser.add_argument("--num_prompts", type=int, default=32, help="pictures that judge (default: %(default)s)")
    parser.add_argument("--trials", type=int, default=40, help="schedules drawn by the search (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the result (default: %(default)s)")
    return run_script(run, parser, argv)


if __name__ == "__main__":
    raise SystemExit(main())
