"""The default away from what it was calibrated on: other prompts, sizes, guidances and weights.

    python -m benchmarks.robustness --guidance 4

Every situation is drawn uncached, with the default, with TaylorSeer of order 1, with its rule on the velocity, and with
as many steps as the default has full ones. PSNR is to the uncached picture of that situation.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.quality import BATCH_SIZE, FIRST_SEED
from benchmarks.quality_report import score
from benchmarks.report import RESULTS, write_json
from cache_functions import CacheConfig, Calibration, resolve
from cache_functions.calibration import SolverChoice
from cache_functions.solver import Solver
from hi_diffusers import SamplingOptions, generate_batch, load_pipeline
from hi_diffusers.console import Parser, Refusal, quiet_libraries, run_script, say
from hi_diffusers.families.hidream.pipeline import HiDreamImagePipeline
from hi_diffusers.pictures.metrics import psnr
from training.evaluate import held_out_prompts
from training.scenes import CPU_TIER

OFF = CacheConfig.off()
LORA_RANK, LORA_SIZE = 4, 0.02


@dataclass(frozen=True)
class Situation:
    """One way to draw that the calibration does not know.

    Attributes:
        name: of the row.
        prompts: which of the held-out prompts.
        changes: options that differ.
        guidance: added to the calibration's.
        weights: loads the model.
    """

    name: str
    prompts: Callable[[str], bool] = lambda prompt: True
    changes: dict[str, Any] = field(default_factory=dict)
    guidance: float = 0.0
    weights: Callable[[], HiDreamImagePipeline] = lambda: load_pipeline("nano", device="cpu")


def with_lora() -> HiDreamImagePipeline:
    """nano with a LoRA of random weights."""
    from peft import LoraConfig

    pipe = load_pipeline("nano", device="cpu")
    names = ["to_q", "to_k", "to_v", "to_out"]
    pipe.transformer.add_adapter(LoraConfig(r=LORA_RANK, lora_alpha=LORA_RANK, target_modules=names))
    generator = torch.Generator().manual_seed(0)
    for name, weight in pipe.transformer.named_parameters():
        if "lora_B" in name:
            weight.data = LORA_SIZE * torch.randn(weight.shape, generator=generator)
    return pipe


SITUATIONS = (
    Situation("as calibrated"),
    Situation("one object", lambda prompt: "of" not in prompt and "above" not in prompt and "below" not in prompt),
    Situation("two objects", lambda prompt: "of" in prompt or "above" in prompt or "below" in prompt),
    Situation("a negative prompt", changes={"negative_prompt": "a large red circle on a black background"}),
    Situation("no prompt", changes={"prompt": ""}),
    Situation("another size", changes={"width": 80, "height": 48}),
    Situation("guidance 1.5 lower", guidance=-1.5),
    Situation("guidance 1.5 higher", guidance=1.5),
    Situation("a LoRA", weights=with_lora),
    Situation("nf4", weights=lambda: load_pipeline("nano", device="cpu", quantization="nf4")),
)


def at_guidance(solver: Solver, fitted: float, wanted: float) -> Solver:
    """The solver with the guided estimates of another guidance: u + g d in its rows becomes u + g' d."""
    rows = []
    for stage, row in enumerate(solver.rows):
        share, (firsts, seconds) = solver.weights(stage)
        rows.append([share, *firsts, *(b + (wanted - fitted) * a for a, b in zip(firsts, seconds, strict=True))])
        assert len(rows[-1]) == len(row)
    return Solver.of(solver.full_steps, rows)


def default_for(pipe: HiDreamImagePipeline, fitted: float, wanted: float, full_steps: int) -> CacheConfig:
    """The default at a guidance, and its solver made for another one."""
    assert pipe.preset is not None and pipe.calibrations is not None
    known = SamplingOptions("", guidance=fitted).resolve(pipe.preset).sampler(pipe.preset)
    found = resolve(CacheConfig.best(full_steps), known, pipe.calibrations).config
    if found.target != "solver" or not isinstance(found.calibration, Calibration):
        raise Refusal(f"nano has no solver for guidance {fitted:g} and {full_steps} full steps")
    solver = at_guidance(found.solver, fitted, wanted)
    key = replace(found.calibration.key, guidance=wanted)
    choices = {full_steps: SolverChoice(solver, 0.0, 0.0)}
    return replace(found, calibration=replace(found.calibration, key=key, choices=choices))


def measure(situation: Situation, fitted: float, full_steps: int, num_prompts: int) -> dict[str, Any]:
    """Every way to draw in one situation."""
    pipe, wanted = situation.weights(), fitted + situation.guidance
    many = [one for one in held_out_prompts(CPU_TIER, 4 * num_prompts) if situation.prompts(one)][:num_prompts]
    options = [
        SamplingOptions(**({"prompt": one, "seed": FIRST_SEED + i, "guidance": wanted} | situation.changes))
        for i, one in enumerate(many)
    ]

    def draw(cache: CacheConfig, **changes: Any) -> list[np.ndarray]:
        changed = [replace(one, **changes) for one in options]
        starts = range(0, len(changed), BATCH_SIZE)
        return [
            one.pixels for start in starts for one in generate_batch(pipe, changed[start : start + BATCH_SIZE], cache)
        ]

    uncached = draw(OFF)
    drawn = {
        "best": draw(default_for(pipe, fitted, wanted, full_steps)),
        "TaylorSeer: module, taylor 1": draw(CacheConfig(full_steps=full_steps)),
        "velocity, taylor 1": draw(CacheConfig(target="velocity", full_steps=full_steps)),
        "fewer steps, UniPC": draw(OFF, num_steps=full_steps),
    }
    return {
        "situation": situation.name,
        "num_prompts": len(many),
        "methods": {
            name: score([psnr(one, other) for one, other in zip(pictures, uncached, strict=True)])
            for name, pictures in drawn.items()
        },
    }


def run(args: argparse.Namespace) -> None:
    """Measure and write the result file."""
    quiet_libraries()
    results = []
    for situation in SITUATIONS:
        results.append(measure(situation, args.guidance, args.full_steps, args.num_prompts))
        say(str(results[-1]))
    content = {
        "what": "the default away from its calibration; PSNR to the uncached picture, dB, before rounding",
        "guidance": args.guidance,
        "full_steps": args.full_steps,
        "results": results,
    }
    name = f"robustness_guidance{args.guidance:g}_k{args.full_steps}"
    print(write_json(args.output, name, torch.device("cpu"), content))


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = Parser(prog="python -m benchmarks.robustness", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--guidance", type=float, default=4.0, help="calibrated guidance (default: %(default)s)")
    parser.add_argument("--full_steps", type=int, default=13, help="budget (default: %(default)s)")
    parser.add_argument("--num_prompts", type=int, default=64, help="pictures (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results (default: %(default)s)")
    return run_script(run, parser, argv)


if __name__ == "__main__":
    raise SystemExit(main())
