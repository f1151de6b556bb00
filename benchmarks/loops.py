"""Why a forecast loses what it loses: open loop against closed loop, step by step, and how much calibration it takes.

    python -m benchmarks.loops

Open loop: each skipped step is forecast from the full steps of the *uncached* drawing, which is what a calibration's
Gram matrix knows. Closed loop: the cached drawing itself, whose full steps are evaluated at states that earlier
forecasts have moved. Both are root mean squares of x0's error over prompts that nothing was calibrated on. The learning
curve draws the same schedule, prior and ridge with weights fitted to fewer prompts.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.report import RESULTS, write_json
from cache_functions import CacheConfig, resolve, settle
from hi_diffusers import SamplingOptions, load_pipeline
from hi_diffusers.calibrating.plan import sampler_sigmas
from hi_diffusers.console import Parser, Refusal, quiet_libraries, run_script, say
from hi_diffusers.engine.generation import denoise_batch, encode_prompts
from hi_diffusers.families.hidream.pipeline import HiDreamImagePipeline
from hi_diffusers.pictures.metrics import Score, psnr
from hi_diffusers.request.drawing import decide
from taylor_utils import basis_weights, weighted_sum
from training.evaluate import held_out_prompts
from training.scenes import CPU_TIER

FIRST_SEED = 6_000
BATCH_SIZE = 16
BUDGETS = (13, 8)
FITTED = (2, 4, 8, 16, 32)


@dataclass(frozen=True)
class Drawn:
    """Drawings, step by step.

    Attributes:
        x0: as the solver was given it [B,S,C,H,W].
        velocity: the same as velocity.
        pixels: float pictures [B,H,W,3].
    """

    x0: Tensor
    velocity: Tensor
    pixels: np.ndarray


def draw(pipe: HiDreamImagePipeline, options: Sequence[SamplingOptions], cache: CacheConfig) -> Drawn:
    """Draw with every step watched."""
    parts = [_draw_batch(pipe, options[i : i + BATCH_SIZE], cache) for i in range(0, len(options), BATCH_SIZE)]
    x0, velocity = (torch.cat([getattr(part, name) for part in parts]) for name in ("x0", "velocity"))
    return Drawn(x0, velocity, np.concatenate([part.pixels for part in parts]))


def _draw_batch(pipe: HiDreamImagePipeline, options: Sequence[SamplingOptions], cache: CacheConfig) -> Drawn:
    drawings = [decide(pipe.preset, one, cache, pipe.calibrations) for one in options]
    first, resolved = drawings[0].options, [one.options for one in drawings]
    generators = [torch.Generator().manual_seed(one.seed) for one in resolved]
    states, x0 = [pipe.draw_noise(len(resolved), first.width, first.height, generators)], []

    def observe(end: Any) -> None:
        x0.append(end.x0)
        states.append(end.latents)

    latents = denoise_batch(pipe, drawings, encode_prompts(pipe, resolved), observe)
    clean, before = torch.stack(x0, dim=1), torch.stack(states[:-1], dim=1)
    sigmas = torch.tensor(sampler_sigmas(first)[:-1])[:, None, None, None]
    return Drawn(clean, (before - clean) / sigmas, pipe.decode(latents))


def open_loop(uncached: Drawn, cache: CacheConfig, full_steps: Sequence[int], sigmas: Sequence[float]) -> list[float]:
    """Error of every step's x0, forecast from the uncached drawing's own steps."""
    features = uncached.velocity if cache.target == "velocity" else uncached.x0
    settings: dict[str, Any] = {}
    if cache.basis == "learned":
        settings = {"gram": cache.calibration.gram, "prior": cache.prior, "ridge": cache.ridge}  # type: ignore[union-attr]
    errors = []
    for step in range(features.shape[1]):
        anchors = [one for one in full_steps if one <= step][-cache.max_order - 1 :]
        weights = basis_weights(cache.basis, anchors, step, min(cache.max_order, len(anchors) - 1), **settings)
        forecast = weighted_sum(weights, [features[:, one] for one in anchors])
        scale = sigmas[step] if cache.target == "velocity" else 1.0
        errors.append(0.0 if step in full_steps else scale * _rms(forecast - features[:, step]))
    return errors


def _rms(error: Tensor) -> float:
    return float(error.double().pow(2).mean().sqrt())


def _score(drawn: Drawn, uncached: Drawn) -> dict[str, float]:
    score = Score.of([psnr(a, b) for a, b in zip(drawn.pixels, uncached.pixels, strict=True)])
    return {"psnr_median": round(score.median, 2), "psnr_p10": round(score.p10, 2)}


def measure(pipe: HiDreamImagePipeline, guidance: float, num_prompts: int) -> list[dict[str, Any]]:
    """One entry per budget."""
    prompts = held_out_prompts(CPU_TIER, num_prompts)
    options = [SamplingOptions(one, seed=FIRST_SEED + i, guidance=guidance) for i, one in enumerate(prompts)]
    lines = pipe.preset.calibration_prompts.read_text(encoding="utf-8").splitlines()[: max(FITTED)]
    fitting = [SamplingOptions(one, seed=i, guidance=guidance) for i, one in enumerate(lines)]
    uncached, fitted = draw(pipe, options, CacheConfig.off()), draw(pipe, fitting, CacheConfig.off())
    resolved = options[0].resolve(pipe.preset)
    sigmas = sampler_sigmas(resolved)
    found = []
    for budget in BUDGETS:
        best = resolve(CacheConfig.best(budget), resolved.sampler(pipe.preset), pipe.calibrations).config
        if best.calibration is None or isinstance(best.calibration, str) or best.mask is None:
            raise Refusal(f"the bundled model has no calibration at guidance {guidance:g}: run make calibrate-nano")
        even = CacheConfig(target=best.target, basis="taylor", full_steps=budget)
        entry: dict[str, Any] = {"guidance": guidance, "full_steps": budget, "target": best.target, "rules": {}}
        rules = {"default": best, "default, no corrector": replace(best, corrector=False, corrector_from=0)}
        for name, cache in {**rules, "Taylor 1, even": even}.items():
            settled = settle(cache, resolved.num_steps)
            full = list(best.mask) if cache.mask else list(range(0, resolved.num_steps, settled.fresh_threshold or 1))
            drawn = draw(pipe, options, cache)
            closed = [_rms(drawn.x0[:, s] - uncached.x0[:, s]) for s in range(resolved.num_steps)]
            opened = open_loop(uncached, cache, full, sigmas)
            entry["rules"][name] = {
                **_score(drawn, uncached),
                "schedule": full,
                "open_loop_rms": [round(one, 5) for one in opened],
                "closed_loop_rms": [round(one, 5) for one in closed],
            }
        features = fitted.velocity if best.target == "velocity" else fitted.x0
        entry["learning_curve"] = []
        for num_fitted in FITTED:
            flat = features[:num_fitted].flatten(2).double()
            gram = (flat @ flat.transpose(1, 2) / flat.shape[2]).mean(0)
            cache = replace(best, calibration=replace(best.calibration, gram=gram))
            entry["learning_curve"].append({"num_fitted": num_fitted} | _score(draw(pipe, options, cache), uncached))
        found.append(entry)
        say(f"guidance {guidance:g}, {budget} full steps: {json.dumps(entry['learning_curve'])}")
    return found


def run(args: argparse.Namespace) -> None:
    """Measure and write the result file."""
    quiet_libraries()
    pipe = load_pipeline("nano", device="cpu")
    content = {
        "what": "x0's error open loop and closed loop, root mean square per step; PSNR in dB of float pictures",
        "weights": pipe.identity.fingerprint,
        "num_prompts": args.num_prompts,
        "results": [entry for guidance in args.guidance for entry in measure(pipe, guidance, args.num_prompts)],
    }
    print(write_json(args.output, "loops", torch.device("cpu"), content))


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = Parser(prog="python -m benchmarks.loops", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--guidance", type=float, nargs="+", default=[2.0, 4.0], help="default: 2 4")
    parser.add_argument("--num_prompts", type=int, default=32, help="pictures (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the result (default: %(default)s)")
    return run_script(run, parser, argv)


if __name__ == "__main__":
    raise SystemExit(main())
