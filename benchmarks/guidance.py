"""An experiment: at some full steps evaluate the conditional branch alone, and forecast the difference of the branches.

    python -m benchmarks.guidance

A guided full step costs two evaluations. Where the difference d = x0_positive - x0_negative is forecast from earlier
steps by the same machinery, a full step costs one, and the same number of evaluations buys more of them. Everything
else is the default's: target x0, learned weights, the optimal schedule for that many full steps, no corrector.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.report import RESULTS, write_json
from cache_functions import CacheConfig
from cache_functions.optimum import Rule, optimal_full_steps, step_factors
from forecasting.levels import sampler_of
from hi_diffusers import SamplingOptions, generate_batch, load_pipeline
from hi_diffusers.console import Parser, Refusal, quiet_libraries, run_script, say
from hi_diffusers.denoising.schedulers import make_scheduler
from hi_diffusers.engine.generation import encode_prompts
from hi_diffusers.families.hidream.pipeline import HiDreamImagePipeline
from hi_diffusers.families.hidream.transformer import Conditioning
from hi_diffusers.pictures.metrics import psnr
from hi_diffusers.request.options import ResolvedOptions
from taylor_utils import basis_weights, weighted_sum
from training.evaluate import held_out_prompts
from training.scenes import CPU_TIER

FIRST_SEED = 2_000
BUDGETS = (26, 16)  # evaluations of 13 and 8 guided full steps
SHARES = (1.0, 0.75, 0.5, 0.25)
NUM_ANCHORS = 3


@dataclass(frozen=True)
class Plan:
    """Which steps evaluate what.

    Attributes:
        both: steps that evaluate both branches, the first one among them.
        conditional: steps that evaluate the conditional branch alone.
    """

    both: tuple[int, ...]
    conditional: tuple[int, ...]

    @property
    def full(self) -> tuple[int, ...]:
        """All steps that evaluate anything."""
        return tuple(sorted((*self.both, *self.conditional)))

    @property
    def evaluations(self) -> int:
        """Of the transformer, a picture."""
        return 2 * len(self.both) + len(self.conditional)

    @classmethod
    def make(cls, full: Sequence[int], num_both: int) -> "Plan":
        """Spread `num_both` evaluations of both branches evenly over the full steps, from the first one on."""
        places = {round(i * len(full) / num_both) for i in range(num_both)}
        return cls(
            tuple(step for i, step in enumerate(full) if i in places),
            tuple(step for i, step in enumerate(full) if i not in places),
        )


def draw(
    pipe: HiDreamImagePipeline, options: Sequence[ResolvedOptions], plan: Plan, gram: Tensor, rule: Rule, basis: str
) -> np.ndarray:
    """Float pictures [B,H,W,3].

    Args:
        plan: which steps evaluate what.
        gram: of the guided x0.
        rule: of the learned weights.
        basis: rule that forecasts the branches' difference, "reuse" or "hermite".
    """
    first = options[0]
    scheduler = make_scheduler(first.scheduler, first.shift)
    scheduler.set_timesteps(first.num_steps)
    scheduler.set_begin_index(0)
    generators = [torch.Generator().manual_seed(one.seed) for one in options]
    latents = pipe.draw_noise(len(options), first.width, first.height, generators)
    embeds = encode_prompts(pipe, options)
    negative, positive = (
        pipe.transformer.prepare(embeds.t5[part], embeds.llama[:, part], embeds.pooled[part], (8, 8))
        for part in (slice(None, len(options)), slice(len(options), None))
    )
    anchors: dict[int, Tensor] = {}
    differences: dict[int, Tensor] = {}
    for step, timestep in enumerate(scheduler.timesteps):
        sigma = float(scheduler.sigmas[step])

        if step in plan.full:
            conditional = _denoised(pipe, latents, timestep, sigma, positive)
            if step in plan.both:
                differences[step] = conditional - _denoised(pipe, latents, timestep, sigma, negative)
                difference = differences[step]
            else:
                difference = _forecast(differences, step, basis)
            x0 = conditional + (first.guidance - 1) * difference
            anchors[step] = x0
        else:
            steps = sorted(anchors)[-NUM_ANCHORS:]
            settings = {"gram": gram, "prior": rule.prior, "ridge": rule.ridge}
            weights = basis_weights("learned", steps, step, NUM_ANCHORS - 1, **settings)
            x0 = weighted_sum(weights, [anchors[one] for one in steps])
        latents = scheduler.step((latents - x0) / sigma, timestep, latents, return_dict=False)[0]
    return pipe.decode(latents)


def _denoised(
    pipe: HiDreamImagePipeline, latents: Tensor, timestep: Tensor, sigma: float, conditioning: Conditioning
) -> Tensor:
    """One branch's x0 [B,C,H,W]; the network's output is minus the velocity."""
    times = timestep.expand(len(latents))
    (output,) = pipe.transformer(latents, times, conditioning=conditioning, return_dict=False)
    return latents + sigma * output


def _forecast(kept: dict[int, Tensor], step: int, basis: str) -> Tensor:
    steps = sorted(kept)[-2:]
    return weighted_sum(basis_weights(basis, steps, step, len(steps) - 1), [kept[one] for one in steps])


def measure(pipe: HiDreamImagePipeline, num_prompts: int) -> list[dict[str, object]]:
    """Every share of guided full steps at every budget, in the order of BUDGETS."""
    prompts = held_out_prompts(CPU_TIER, num_prompts)
    options = [SamplingOptions(prompt, seed=FIRST_SEED + i) for i, prompt in enumerate(prompts)]
    resolved = [one.resolve(pipe.preset) for one in options]
    uncached = [picture.pixels for picture in generate_batch(pipe, options, CacheConfig.off())]
    first = resolved[0]
    scheduler = make_scheduler(first.scheduler, first.shift)
    key = sampler_of(scheduler, first.num_steps, first.guidance).key(pipe.identity.fingerprint, "x0")
    calibration = pipe.calibrations.find(key)
    if calibration is None:
        raise Refusal("the bundled model has no calibration of x0 for its own sampler: run make calibrate-nano")
    results: list[dict[str, object]] = []
    for budget in BUDGETS:
        choice = calibration.nearest_choice(budget // 2)
        rule = Rule(NUM_ANCHORS, choice.prior, choice.ridge)
        factors = step_factors(calibration.sigmas, "x0")
        for share in SHARES:
            # of n full steps the share s evaluates both branches: n (1 + s) evaluations
            num_full = round(budget / (1 + share))
            num_both = budget - num_full
            full, _ = optimal_full_steps(calibration.gram, factors, rule, num_full)
            plan = Plan.make(full, num_both)
            for basis in ("reuse", "hermite") if share < 1 else ("reuse",):
                with torch.no_grad():
                    pictures = draw(pipe, resolved, plan, calibration.gram, rule, basis)
                values = [psnr(a, b) for a, b in zip(pictures, uncached, strict=True)]
                results.append(
                    {
                        "evaluations": plan.evaluations,
                        "full_steps": num_full,
                        "both_branches": num_both,
                        "difference": basis if share < 1 else "evaluated",
                        "psnr_median": round(float(np.median(values)), 2),
                        "psnr_mean": round(float(np.mean(values)), 2),
                        "psnr_p10": round(float(np.percentile(values, 10)), 2),
                    }
                )
                say(json.dumps(results[-1]))
    return results


def run(args: argparse.Namespace) -> None:
    """Measure and write the result file."""
    quiet_libraries()
    pipe = load_pipeline("nano", device="cpu")
    content = {
        "what": "conditional branch alone at some full steps, at equal model evaluations",
        "weights": pipe.identity.fingerprint,
        "guidance": pipe.preset.guidance,
        "num_prompts": args.num_prompts,
        "results": measure(pipe, args.num_prompts),
    }
    print(write_json(args.output, "guidance", torch.device("cpu"), content))


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = Parser(prog="python -m benchmarks.guidance", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--num_prompts", type=int, default=32, help="pictures (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the result (default: %(default)s)")
    return run_script(run, parser, argv)


if __name__ == "__main__":
    raise SystemExit(main())
