"""How smoothly a model's features move over the steps: what makes it an instrument for forecasting.

    python -m training.smoothness --output assets/hidream-nano/smoothness.json

For every step: the change of each block's attention and feed-forward output (image tokens) and of the guided denoised
estimate x0 since the step before, relative to its size, trained against random weights.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cache_functions import CacheConfig
from hi_diffusers import HiDreamImageTransformer2DModel, SamplingOptions, load_pipeline
from hi_diffusers.console import Parser, quiet_libraries, refuse_errors, run_script
from hi_diffusers.denoising.schedulers import make_scheduler
from hi_diffusers.families.hidream.files import locate
from hi_diffusers.families.hidream.pipeline import HiDreamImagePipeline
from hi_diffusers.families.table import find_preset
from hi_diffusers.weights.source import ModelSource
from training import scenes
from training.evaluate import held_out_prompts
from training.recipe import require_positive


class Movement:
    """Relative change of every observed tensor from step to step."""

    def __init__(self) -> None:
        self.last: dict[str, Tensor] = {}
        self.changes: dict[str, list[float]] = {}

    def observe(self, name: str, value: Tensor) -> None:
        """Take in the value of `name` at the next step."""
        before = self.last.get(name)
        if before is not None:
            change = (value - before).norm() / value.norm()
            self.changes.setdefault(name, []).append(change.item())
        self.last[name] = value.clone()


def measure(pipe: HiDreamImagePipeline, prompts: list[str], guidance: float, num_steps: int) -> dict[str, list[float]]:
    """Medians over blocks, of "blocks" and of "x0", for the steps 1 to num_steps - 1."""
    movement, hooks = Movement(), []
    num_image = (pipe.default_sample_size // pipe.transformer.config.patch_size) ** 2

    def watch(name: str) -> object:
        def hook(module: object, inputs: object, output: Tensor | tuple[Tensor, ...]) -> None:
            image = output[0] if isinstance(output, tuple) else output
            movement.observe(name, image[:, :num_image])

        return hook

    for name, module in pipe.transformer.named_modules():
        if name.endswith((".attn1", ".ff_i")):
            hooks.append(module.register_forward_hook(watch(name)))
    side = pipe.default_sample_size * pipe.vae_scale_factor
    scheduler = make_scheduler("unipc", 3.0)
    scheduler.set_timesteps(num_steps)
    generators = [torch.Generator().manual_seed(seed) for seed in range(len(prompts))]
    pipe.denoise(
        pipe.draw_noise(len(prompts), side, side, generators),
        pipe.encode(prompts, pipe.preset.max_sequence_length, [""] * len(prompts)),
        scheduler=scheduler,
        guidance=guidance,
        cache=CacheConfig.off(),
        on_step_end=lambda end: movement.observe("x0", end.x0),
    )
    for hook in hooks:
        hook.remove()
    x0 = movement.changes.pop("x0")
    blocks = np.median(np.array(list(movement.changes.values())), axis=0)
    return {"blocks": [round(float(value), 4) for value in blocks], "x0": [round(value, 4) for value in x0]}


def summary(changes: list[float]) -> str:
    """Median over the steps, and the largest."""
    return f"median {np.median(changes):.3f}, largest {max(changes):.3f} (step {int(np.argmax(changes)) + 1})"


def run(args: argparse.Namespace) -> None:
    """Do what the flags say."""
    quiet_libraries()
    refuse_errors(require_positive, args, "num_prompts")
    refuse_errors(locate, find_preset("nano"), ModelSource(args.model_path))
    pipe = load_pipeline("nano", model_path=args.model_path)
    options = SamplingOptions(prompt="").resolve(pipe.preset)
    prompts = held_out_prompts(scenes.TIERS[args.tier], args.num_prompts)
    result: dict[str, object] = {
        "what": "relative change since the step before, ||f_t - f_{t-1}|| / ||f_t||, over a batch of prompts",
        "prompts": len(prompts),
        "num_steps": options.num_steps,
        "guidance": options.guidance,
        "model": pipe.identity.fingerprint,
    }
    result["trained"] = measure(pipe, prompts, options.guidance, options.num_steps)
    torch.manual_seed(0)
    pipe.transformer = HiDreamImageTransformer2DModel.from_config(pipe.transformer.config).eval()
    result["random"] = measure(pipe, prompts, options.guidance, options.num_steps)
    for weights in ("trained", "random"):
        for what, changes in result[weights].items():
            print(f"{weights:8} {what:7} {summary(changes)}")
    args.output.write_text(json.dumps(result) + "\n", encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = Parser(prog="python -m training.smoothness", description=__doc__.splitlines()[0])
    parser.add_argument("--model_path", help="folder of the model (default: the bundled one)")
    parser.add_argument(
        "--tier", default="cpu", choices=sorted(scenes.TIERS), help="world of the prompts (default: %(default)s)"
    )
    parser.add_argument("--num_prompts", type=int, default=8, help="pictures in the batch (default: %(default)s)")
    parser.add_argument("--output", type=Path, required=True, help="JSON file, one value a step")
    return run_script(run, parser, argv)


if __name__ == "__main__":
    raise SystemExit(main())
