"""What nf4 and fp8 cost on the bundled model, and which modules had better stay as they are.

    python -m benchmarks.quantization

For each choice of modules kept out of nf4: bytes of the transformer, the error of its pictures against the uncached
ones of the unquantized weights (same prompts and seeds, float pictures), and how many are as their prompts say. The
choice that `--quantization nf4` makes is drawn with the cache on (`best`, 13 full steps), too, and with T5 in nf4 as
loading does it; TaylorSeer's cache with its anchors in fewer bits. The transformer computes with the numbers that its
nf4 stands for, in fp32.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from benchmarks.report import RESULTS, write_json
from cache_functions import CacheConfig
from hi_diffusers import HiDreamImageTransformer2DModel, SamplingOptions, generate_batch, load_pipeline
from hi_diffusers.console import Parser, quiet_libraries, run_script, say
from hi_diffusers.families.hidream.pipeline import HiDreamImagePipeline
from hi_diffusers.families.hidream.shapes import KEPT_BY_NF4
from hi_diffusers.families.table import PRESETS, find_family
from hi_diffusers.memory.sizes import weight_bytes
from hi_diffusers.pictures.metrics import CAP_DB, psnr, ssim
from hi_diffusers.weights.layers import Layer
from hi_diffusers.weights.nf4 import Nf4, load_nf4, nf4_bytes
from hi_diffusers.weights.source import GIB, ModelSource
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


def unpacked(model: torch.nn.Module) -> torch.nn.Module:
    """The model with the weights that its nf4 stands for as plain layers: the same numbers, much faster on a CPU."""
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit

    for name, layer in list(model.named_modules()):
        if isinstance(layer, Linear4bit):
            plain = torch.nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)
            weight = dequantize_4bit(layer.weight.data, layer.weight.quant_state).to(torch.float32)
            plain.weight = torch.nn.Parameter(weight, requires_grad=False)
            plain.bias = layer.bias
            model.set_submodule(name, plain)
    return model.eval()


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


def real_gib(kept: tuple[str, ...]) -> float:
    """GiB of HiDream-I1's transformer with these modules kept in bf16."""
    full, settings = PRESETS["full"], Nf4(kept)
    transformer = find_family(full).shapes(full, ModelSource()).components["transformer"]

    def packed(layer: Layer) -> int | None:
        return nf4_bytes(layer) if settings.takes(layer.name) else None

    return round(weight_bytes(transformer, torch.bfloat16, packed) / GIB, 2)


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
    plain_size = num_bytes(plain.transformer)
    rows: list[dict[str, Any]] = []
    say(json.dumps({name: real_gib(kept) for name, kept in CHOICES.items()}))

    def add(name: str, size: int, pictures: Sequence[np.ndarray], to: Sequence[np.ndarray]) -> None:
        decibels = [min(psnr(a, b), CAP_DB) for a, b in zip(pictures, to, strict=True)]
        similarity = [ssim(a, b) for a, b in zip(pictures, to, strict=True)]
        held = [checker.check(picture, prompt).all for picture, prompt in zip(pictures, prompts, strict=True)]
        rows.append(
            {
                "what": name,
                "transformer_bytes": size,
                "psnr_median": round(float(np.median(decibels)), 2),
                "psnr_mean": round(float(np.mean(decibels)), 2),
                "psnr_p10": round(float(np.percentile(decibels, 10)), 2),
                "ssim_median": round(float(np.median(similarity)), 4),
                "all_claims": round(float(np.mean([bool(one) for one in held])), 4),
            }
        )
        say(json.dumps(rows[-1]))

    add("not quantized, uncached", plain_size, uncached, uncached)
    add("not quantized, cached", plain_size, cached, uncached)
    for dtype in ("fp32", "bf16", "fp8"):
        cache = replace(CacheConfig.taylorseer(), anchor_dtype=dtype)
        add(f"not quantized, taylorseer, anchors in {dtype}", plain_size, draw(plain, prompts, cache), uncached)
    transformer, folder = plain.transformer, PRESETS["nano"].folder / "transformer"
    for name, kept in tqdm(CHOICES.items(), unit="choice"):
        with torch.device("meta"):
            model = HiDreamImageTransformer2DModel.from_config(transformer.config)
        model = load_nf4(model, folder, Nf4(kept), torch.device("cpu"), torch.float32)
        size = num_bytes(model)
        plain.transformer = unpacked(model)
        in_nf4 = draw(plain, prompts, CacheConfig.off())
        add(f"{name}, uncached", size, in_nf4, uncached)
        if set(kept) == set(KEPT_BY_NF4):
            in_nf4_cached = draw(plain, prompts, best)
            add(f"{name}, cached", size, in_nf4_cached, uncached)
            add(f"{name}, cached, against the same uncached", size, in_nf4_cached, in_nf4)
    rounded = load_pipeline("nano", device="cpu", fp8=True)
    size = num_bytes(rounded.transformer) + sum(buffer.nbytes for buffer in rounded.transformer.buffers())
    add("--fp8, uncached", size, draw(rounded, prompts, CacheConfig.off()), uncached)
    add("--fp8, cached", size, draw(rounded, prompts, best), uncached)
    whole = load_pipeline("nano", device="cpu", quantization="nf4")
    size, whole.transformer = num_bytes(whole.transformer), unpacked(whole.transformer)
    add("--quantization nf4, T5 included, uncached", size, draw(whole, prompts, CacheConfig.off()), uncached)
    add("--quantization nf4, T5 included, cached", size, draw(whole, prompts, best), uncached)
    return rows


def run(args: argparse.Namespace) -> None:
    """Measure and write the result file."""
    quiet_libraries()
    content = {
        "what": "nf4 and fp8 on the bundled model: float pictures against those of the unquantized weights",
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
