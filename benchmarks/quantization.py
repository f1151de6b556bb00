"""What nf4 costs on the bundled model, and which modules had better stay as they are.

    python -m benchmarks.quantization

For each choice of modules kept out of nf4: bytes of the transformer, the error of its uncached pictures against those
of the unquantized weights (same prompts and seeds, float pictures), and how many are as their prompts say. The choice
that `--quantization nf4` makes is drawn with the cache on, too, and with T5 in nf4 as loading does it.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from benchmarks.report import RESULTS, write_json
from cache_functions import CacheConfig
from hi_diffusers import HiDreamImageTransformer2DModel, SamplingOptions, generate_batch, load_pipeline
from hi_diffusers.console import Parser, quiet_libraries, run_script, say
from hi_diffusers.metrics import CAP_DB, psnr, ssim
from hi_diffusers.models.nf4 import Nf4, load_nf4
from hi_diffusers.pipelines.hidream_image import HiDreamImagePipeline
from hi_diffusers.presets import bundled_folder
from training.checker import Checker
from training.evaluate import held_out_prompts
from training.scenes import CPU_TIER

FIRST_SEED = 4_000
BATCH_SIZE = 16
ENDS = ("x_embedder", "final_layer")  # a small part, and at nano's widths nothing that 4 bits can hold
EMBEDDERS, MODULATION, CAPTIONS = ("t_embedder", "p_embedder"), ("adaLN_modulation",), ("caption_projection",)
CHOICES: dict[str, tuple[str, ...]] = {
    "first and last layer kept": ENDS,
    "and embedders of timestep and pooled text": (*ENDS, *EMBEDDERS),
    "and embedders, modulation": (*ENDS, *EMBEDDERS, *MODULATION),
    "and embedders, captions": (*ENDS, *EMBEDDERS, *CAPTIONS),
    "and embedders, modulation, captions": (*ENDS, *EMBEDDERS, *MODULATION, *CAPTIONS),
}


def num_bytes(model: torch.nn.Module) -> int:
    """Of a model in nf4 or bf16: what is not packed counts two bytes a number; scales count as they are."""
    total = 0
    for parameter in model.parameters():
        packed = parameter.dtype == torch.uint8
        total += parameter.numel() if packed else 2 * parameter.numel()
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            total += state.absmax.numel() * state.absmax.element_size()
    return total


def draw(pipe: HiDreamImagePipeline, prompts: Sequence[str], cache: CacheConfig) -> list[np.ndarray]:
    """Float pictures."""
    options = [SamplingOptions(prompt, seed=FIRST_SEED + place) for place, prompt in enumerate(prompts)]
    batches = [options[start : start + BATCH_SIZE] for start in range(0, len(options), BATCH_SIZE)]
    return [one.pixels for batch in batches for one in generate_batch(pipe, batch, cache)]


def measure(num_prompts: int) -> list[dict[str, Any]]:
    """A row per choice."""
    prompts, checker = held_out_prompts(CPU_TIER, num_prompts), Checker(CPU_TIER)
    plain = load_pipeline("nano", device="cpu")
    best = CacheConfig.best(13)
    uncached, cached = draw(plain, prompts, CacheConfig.off()), draw(plain, prompts, best)
    rows: list[dict[str, Any]] = []

    def add(name: str, pipe: HiDreamImagePipeline, pictures: Sequence[np.ndarray], to: Sequence[np.ndarray]) -> None:
        decibels = [min(psnr(a, b), CAP_DB) for a, b in zip(pictures, to, strict=True)]
        similarity = [ssim(a, b) for a, b in zip(pictures, to, strict=True)]
        held = [checker.check(picture, prompt).all for picture, prompt in zip(pictures, prompts, strict=True)]
        rows.append(
            {
                "what": name,
                "transformer_bytes": num_bytes(pipe.transformer),
                "psnr_median": round(float(np.median(decibels)), 2),
                "psnr_mean": round(float(np.mean(decibels)), 2),
                "psnr_p10": round(float(np.percentile(decibels, 10)), 2),
                "ssim_median": round(float(np.median(similarity)), 4),
                "all_claims": round(float(np.mean([bool(one) for one in held])), 4),
            }
        )
        say(json.dumps(rows[-1]))

    add("not quantized, uncached", plain, uncached, uncached)
    add("not quantized, cache best with 13 of 50 full steps, against uncached", plain, cached, uncached)
    transformer, folder = plain.transformer, bundled_folder() / "transformer"
    for name, kept in tqdm(CHOICES.items(), unit="choice"):
        with torch.device("meta"):
            model = HiDreamImageTransformer2DModel.from_config(transformer.config)
        plain.transformer = load_nf4(model, folder, Nf4(kept), torch.device("cpu"), torch.float32)
        add(f"{name}, uncached", plain, draw(plain, prompts, CacheConfig.off()), uncached)
    whole = load_pipeline("nano", device="cpu", quantization="nf4")
    in_nf4 = draw(whole, prompts, CacheConfig.off())
    add("--quantization nf4, T5 included, uncached", whole, in_nf4, uncached)
    in_nf4_cached = draw(whole, prompts, best)
    add("--quantization nf4, cache best, against not quantized and uncached", whole, in_nf4_cached, uncached)
    add("--quantization nf4, cache best, against the same uncached", whole, in_nf4_cached, in_nf4)
    return rows


def run(args: argparse.Namespace) -> None:
    """Measure and write the result file."""
    quiet_libraries()
    content = {
        "what": "nf4 on the bundled model: float pictures against those of the unquantized weights",
        "num_prompts": args.num_prompts,
        "rows": measure(args.num_prompts),
    }
    print(write_json(args.output, "quantization", torch.device("cpu"), content))


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = Parser(prog="python -m benchmarks.quantization", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--num_prompts", type=int, default=64, help="pictures (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the result (default: %(default)s)")
    return run_script(run, parser, argv)


if __name__ == "__main__":
    raise SystemExit(main())
