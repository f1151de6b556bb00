"""Draws held-out prompts and says how many of their claims hold.

    python -m training.evaluate --model nano --num_prompts 256 --output training/runs/evaluation_nano.json
"""

import argparse
import json
import platform
from dataclasses import asdict, fields, replace
from pathlib import Path

import diffusers
import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from cache_functions import CacheConfig
from hi_diffusers import SamplingOptions, generate_batch, load_pipeline
from hi_diffusers.console import quiet_libraries
from hi_diffusers.pipelines.hidream_image import HiDreamImagePipeline
from training import scenes
from training.checker import Accuracy, Checker, accuracy

PROMPT_SEED = 20_000
SHEET_COLUMNS = 4
SHEET_ENLARGEMENT = 2


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
    rows = [np.concatenate(pictures[row : row + SHEET_COLUMNS], axis=1) for row in range(0, SHEET_COLUMNS**2, SHEET_COLUMNS)]
    sheet = Image.fromarray((np.concatenate(rows) * 255).round().astype(np.uint8))
    return sheet.resize([side * SHEET_ENLARGEMENT for side in sheet.size], Image.Resampling.LANCZOS)


def report(rates: Accuracy) -> dict[str, dict[str, float]]:
    """JSON-able rates of every claim."""
    return {
        claim.name: asdict(getattr(rates, claim.name)) | {"share": round(getattr(rates, claim.name).share, 4)}
        for claim in fields(rates)
    }


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m training.evaluate", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="nano", choices=("nano", "nano-dev", "nano-fast"))
    parser.add_argument("--model_path", help="another folder than the bundled one")
    parser.add_argument("--tier", default="cpu", choices=sorted(scenes.TIERS))
    parser.add_argument("--num_prompts", type=int, default=256)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--guidance", type=float, help="instead of the preset's")
    parser.add_argument("--num_steps", type=int, help="instead of the preset's")
    parser.add_argument("--cached", action="store_true", help="with the preset's cache instead of uncached")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--output", type=Path, help="write the rates as JSON")
    parser.add_argument("--sheet", type=Path, help="write the first 16 pictures as one")
    args = parser.parse_args(argv)
    quiet_libraries()
    tier = scenes.TIERS[args.tier]
    pipe = load_pipeline(args.model, device=args.device, model_path=args.model_path)
    prompts = held_out_prompts(tier, args.num_prompts)
    cache = pipe.preset.cache if args.cached else CacheConfig.off()
    options = SamplingOptions(prompt="", guidance=args.guidance, num_steps=args.num_steps)
    pictures = draw_prompts(pipe, prompts, cache, args.batch_size, options)
    checker = Checker(tier)
    rates = accuracy(checker.check(picture, prompt) for picture, prompt in zip(pictures, prompts, strict=True))
    print(rates)
    if args.sheet:
        contact_sheet(pictures).save(args.sheet)
        print(*prompts[: SHEET_COLUMNS**2], sep="\n")
    if args.output:
        content = {
            "model": asdict(pipe.identity),
            "options": {name: value for name, value in asdict(options.resolve(pipe.preset)).items() if name in _SETTINGS},
            "cache": "off" if cache.is_off else asdict(cache),
            "prompts": f"{len(prompts)} canonical captions of held-out scenes, seed {PROMPT_SEED}; picture seeds 0, 1, ...",
            "rates": report(rates),
            "hardware": f"{platform.machine()}, {torch.get_num_threads()} threads, {pipe.device}",
            "versions": {"torch": torch.__version__, "diffusers": diffusers.__version__},
        }
        args.output.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return 0


_SETTINGS = ("num_steps", "guidance", "scheduler", "shift", "max_sequence_length", "width", "height")


if __name__ == "__main__":
    raise SystemExit(main())
