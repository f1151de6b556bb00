"""Draws held-out prompts and says how many of their claims hold.

    python -m training.evaluate --model nano --num_prompts 256 --output training/runs/evaluation_nano.json

The seed of a picture is its place in the list of prompts.
"""

import argparse
import json
import platform
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from cache_functions import CacheConfig
from hi_diffusers import SamplingOptions, generate_batch, load_pipeline
from hi_diffusers.console import Parser, quiet_libraries, refuse_errors, run_script
from hi_diffusers.engine.loading import resolve_device
from hi_diffusers.families.hidream.files import locate
from hi_diffusers.families.hidream.pipeline import HiDreamImagePipeline
from hi_diffusers.families.table import PRESETS, find_preset
from hi_diffusers.weights.source import ModelSource
from training import scenes
from training.checker import Accuracy, Checker, accuracy
from training.recipe import require_positive

PROMPT_SEED = 20_000
SHEET_COLUMNS = 4
SHEET_ENLARGEMENT = 2
# Of the options, what is the same for all pictures.
SETTINGS = ("num_steps", "guidance", "scheduler", "shift", "max_sequence_length", "width", "height")
BUNDLED = tuple(name for name, preset in PRESETS.items() if preset.folder is not None)


def held_out_prompts(tier: scenes.Tier, count: int) -> list[str]:
    """Canonical captions of scenes that training never saw, each once."""
    rng = np.random.default_rng(PROMPT_SEED)
    prompts: dict[str, None] = {}
    while len(prompts) < count:
        prompts[scenes.caption(scenes.sample_scene(rng, tier, held_out=True))] = None
    return list(prompts)


def draw_prompts(
    pipe: HiDreamImagePipeline, prompts: list[str], cache: CacheConfig, batch_size: int, options: SamplingOptions
) -> list[np.ndarray]:
    """Float pictures [H,W,3]; the seed of a picture is its place in the list."""
    pictures: list[np.ndarray] = []
    for start in tqdm(range(0, len(prompts), batch_size), unit="batch", disable=None):
        batch = [
            replace(options, prompt=prompt, seed=start + offset)
            for offset, prompt in enumerate(prompts[start : start + batch_size])
        ]
        pictures += [picture.pixels for picture in generate_batch(pipe, batch, cache)]
    return pictures


def contact_sheet(pictures: list[np.ndarray]) -> Image.Image:
    """The first 16 pictures as 4 x 4."""
    starts = range(0, SHEET_COLUMNS**2, SHEET_COLUMNS)
    rows = [np.concatenate(pictures[start : start + SHEET_COLUMNS], axis=1) for start in starts]
    sheet = Image.fromarray((np.concatenate(rows) * 255).round().astype(np.uint8))
    return sheet.resize([side * SHEET_ENLARGEMENT for side in sheet.size], Image.Resampling.LANCZOS)


def report_rates(rates: Accuracy) -> dict[str, dict[str, float | None]]:
    """JSON-able rates of every claim; a share is None where no prompt makes the claim."""
    report = {}
    for claim in fields(rates):
        rate = getattr(rates, claim.name)
        report[claim.name] = asdict(rate) | {"share": round(rate.share, 4) if rate.stated else None}
    return report


def report(pipe: HiDreamImagePipeline, options: SamplingOptions, cache: CacheConfig, rates: Accuracy) -> dict[str, Any]:
    """Everything needed to repeat the evaluation, and the rates."""
    settings = options.resolve(pipe.preset).settings()
    return {
        "model": asdict(pipe.identity),
        "options": {name: settings[name] for name in SETTINGS},
        "cache": "off" if cache.is_off else cache.settings(),
        "prompts": f"{rates.all.stated} canonical captions of held-out scenes, seed {PROMPT_SEED}",
        "seeds": "a picture's seed is its prompt's place in the list, from 0",
        "rates": report_rates(rates),
        "hardware": f"{platform.machine()}, {torch.get_num_threads()} threads, {pipe.device}",
        "versions": {"torch": torch.__version__, "diffusers": diffusers.__version__},
    }


def _check_outputs(args: argparse.Namespace) -> None:
    for path in filter(None, (args.output, args.sheet)):
        if not path.parent.is_dir():
            raise ValueError(f"{path} cannot be written: there is no folder {path.parent}")
    if args.sheet and args.num_prompts < SHEET_COLUMNS**2:
        raise ValueError(f"--sheet shows {SHEET_COLUMNS**2} pictures, got --num_prompts {args.num_prompts}")


def run(args: argparse.Namespace) -> None:
    """Do what the flags say."""
    quiet_libraries()
    refuse_errors(require_positive, args, "num_prompts", "batch_size")
    refuse_errors(_check_outputs, args)
    options = refuse_errors(SamplingOptions, prompt="", guidance=args.guidance, num_steps=args.num_steps)
    refuse_errors(resolve_device, args.device)
    refuse_errors(locate, find_preset(args.model), ModelSource(args.model_path))
    pipe = load_pipeline(args.model, device=args.device, model_path=args.model_path)
    tier = scenes.TIERS[args.tier]
    prompts = held_out_prompts(tier, args.num_prompts)
    cache = pipe.preset.cache if args.cached else CacheConfig.off()
    pictures = draw_prompts(pipe, prompts, cache, args.batch_size, options)
    checker = Checker(tier)
    rates = accuracy(checker.check(picture, prompt) for picture, prompt in zip(pictures, prompts, strict=True))
    print(rates)
    if args.sheet:
        contact_sheet(pictures).save(args.sheet)
        print(*prompts[: SHEET_COLUMNS**2], sep="\n")
    if args.output:
        content = report(pipe, options, cache, rates)
        args.output.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = Parser(prog="python -m training.evaluate", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="nano", choices=BUNDLED, help="preset (default: %(default)s)")
    parser.add_argument("--model_path", help="folder of the model (default: the bundled one)")
    parser.add_argument(
        "--tier", default="cpu", choices=sorted(scenes.TIERS), help="world of the prompts (default: %(default)s)"
    )
    parser.add_argument("--num_prompts", type=int, default=256, help="pictures to draw (default: %(default)s)")
    parser.add_argument("--batch_size", type=int, default=16, help="pictures at once (default: %(default)s)")
    parser.add_argument("--guidance", type=float, help="classifier-free guidance scale (default: the preset's)")
    parser.add_argument("--num_steps", type=int, help="denoising steps (default: the preset's)")
    parser.add_argument("--cached", action="store_true", help="with the preset's cache (default: uncached)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="JSON file for the rates (default: none)")
    parser.add_argument("--sheet", type=Path, help="picture file for the first 16 (default: none)")
    return run_script(run, parser, argv)


if __name__ == "__main__":
    raise SystemExit(main())
