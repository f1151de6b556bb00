"""HiDream-I1 at its published size on a pretended accelerator: what a step computes, and what a drawing keeps.

    python -m benchmarks.real_size

Shapes alone: no number is computed and no second is measured, see `benchmarks.pretended`. It writes the operations of a
step, by kind and beside diffusers' class, and the most memory that is alive in each stage, beside the plan's.
"""

import argparse
import itertools
import re
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import diffusers
import torch
from diffusers.models.transformers import transformer_hidream_image as of_diffusers
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm
from transformers import AutoTokenizer

from benchmarks.architecture import TOKENIZERS, build
from benchmarks.pretended import Alive, place, pretended_device, spread_evenly
from benchmarks.report import RESULTS, write_json
from cache_functions import CacheConfig
from hi_diffusers import SamplingOptions
from hi_diffusers.console import Parser, quiet_libraries, run_script
from hi_diffusers.denoising.steps import StepEnd
from hi_diffusers.engine.generation import denoise_batch, encode_prompts
from hi_diffusers.families.hidream.pipeline import HiDreamImagePipeline
from hi_diffusers.families.hidream.published import TRANSFORMER
from hi_diffusers.families.table import PRESETS
from hi_diffusers.memory.plan import STRATEGIES, Demand, plan_memory
from hi_diffusers.preset import ModelPreset
from hi_diffusers.request.drawing import Drawing, decide
from hi_diffusers.weights.identity import ModelIdentity
from hi_diffusers.weights.nf4 import NF4_BLOCK
from hi_diffusers.weights.source import GIB, ModelSource

PEAK_TFLOPS = 790.0  # that dense bf16 products may reach on an H100, whose data sheet says 989; fp8 twice that
SHARES = (0.6, 0.8)
EVALUATIONS = (50, 13, 8)
KINDS = {  # of a transformer's parts, by their names in both classes
    "routed experts": r"\.ff_i\.experts\.",
    "shared experts": r"\.shared_experts\.",
    "text feed-forwards": r"\.ff_t\.",
    "modulation": r"adaLN_modulation\.",
    "captions": r"caption_projection\.",
    "attention projections": r"\.attn1\.to_",
}
CACHES = {
    "off": CacheConfig.off(),
    "module": CacheConfig(fresh_threshold=3),
    "residual": CacheConfig(target="residual", fresh_threshold=3),
    "velocity": CacheConfig(target="velocity", fresh_threshold=3),
    "x0": CacheConfig(target="x0", fresh_threshold=3),
}
NUM_STEPS = 7  # of which the first three, the sixth and the last are full at that threshold


class Nf4StandIn(nn.Module):
    """A Linear with the bytes of bitsandbytes' nf4, which does not run without numbers.

    As there, the weight is written out in the arithmetic's dtype for more than one row, and one row is multiplied as it
    is.
    """

    def __init__(self, layer: nn.Linear, device: torch.device, dtype: torch.dtype):
        super().__init__()
        count = layer.in_features * layer.out_features
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.register_buffer("packed", torch.empty(count // 2, dtype=torch.uint8, device=device))
        self.register_buffer("absmax", torch.empty(-(-count // NF4_BLOCK), dtype=torch.float32, device=device))
        bias = None if layer.bias is None else torch.empty(layer.out_features, dtype=dtype, device=device)
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        if x.numel() == x.shape[-1]:
            return x.new_empty((*x.shape[:-1], self.out_features))
        weight = torch.empty(self.out_features, self.in_features, dtype=x.dtype, device=x.device)
        return nn.functional.linear(x, weight, self.bias)


def build_pretended(
    preset: ModelPreset, device: torch.device, quantization: str = "none", *, fp8: bool = False
) -> HiDreamImagePipeline:
    """A model at its published size in bf16, with nano's tokenizers; within `pretended_device`."""
    pipe = build(preset, device, torch.bfloat16, quantization, fp8=fp8, make_nf4=Nf4StandIn)
    folder = PRESETS["nano"].folder
    assert folder is not None
    pipe.register_modules(**{name: AutoTokenizer.from_pretrained(folder / name) for name in TOKENIZERS})
    pipe.preset, pipe.fp8, pipe.identity = preset, fp8, ModelIdentity(preset.name, "pretended", quantization)
    return pipe


def stage_peaks(
    pipe: HiDreamImagePipeline,
    drawings: Sequence[Drawing],
    alive: Alive,
    denoising: AbstractContextManager[Any] = nullcontext(),  # noqa: B008
) -> dict[str, int]:
    """Draw a batch.

    Args:
        denoising: context of that stage.

    Returns:
        Stage -> the most bytes that its tensors took at once, without the model's weights.
    """
    weights, peaks = alive.now, {}

    def ended(stage: str) -> None:
        peaks[stage], alive.most = alive.most - weights, alive.now

    with alive:
        alive.most = alive.now
        embeds = encode_prompts(pipe, [one.options for one in drawings])
        ended("encode")
        with denoising:
            latents = denoise_batch(pipe, drawings, embeds)
        del embeds
        ended("denoise")
        pipe.decode(latents)
        ended("decode")
    return peaks


def draw_one(preset: ModelPreset, cache: CacheConfig, count: int = 1) -> list[Drawing]:
    """Pictures of a few steps."""
    first = decide(preset, SamplingOptions("a red fox in snow", seed=0, num_steps=NUM_STEPS), cache)
    return [first.again(first.options.prompt, seed) for seed in range(count)]


def flops_of_steps(pipe: HiDreamImagePipeline, drawing: Drawing) -> dict[str, int]:
    """Operations of a picture: "once" before the first step, of a "full" step, and of a "forecast" one."""
    embeds = encode_prompts(pipe, [drawing.options])
    found: dict[str, int] = {}
    ends = [0]

    def note(end: StepEnd) -> None:
        ends.append(counter.get_total_flops())
        if end.record.index:
            found[end.record.kind] = ends[-1] - ends[-2]

    with FlopCounterMode(display=False) as counter:
        denoise_batch(pipe, [drawing], embeds, note)
    return {"once": ends[1] - found["full"], **found}


def flops_by_kind(model: nn.Module, evaluate: Any) -> dict[str, int]:
    """Operations of one call, by the part of the transformer that makes them."""
    found = dict.fromkeys((*KINDS, "attention", "the rest"), 0)
    with FlopCounterMode(display=False) as counter:
        evaluate()
    counts = counter.get_flop_counts()
    leaves = {name for name, module in model.named_modules() if not list(module.children())}
    root = type(model).__name__
    for name, by_op in counts.items():
        own = name.removeprefix(f"{root}.")
        if own in leaves:
            kind = next((kind for kind, pattern in KINDS.items() if re.search(pattern, f".{own}.")), "the rest")
            found[kind] += sum(by_op.values())
    everywhere = {str(op): count for op, count in counts["Global"].items()}
    found["attention"] = sum(count for op, count in everywhere.items() if "attention" in op)
    found["routed experts"] += sum(count for op, count in everywhere.items() if "_grouped_mm" in op)
    missing = sum(everywhere.values()) - sum(found.values())
    return found | {"the rest": found["the rest"] + missing}


def infer_evenly(feed_forward: Any, x: Tensor, expert: Tensor, weight: Tensor) -> Tensor:
    """diffusers' experts, with equal numbers of tokens."""
    rows = x.repeat_interleave(feed_forward.num_activated_experts, dim=0)
    slices = rows.split(spread_evenly(expert, len(feed_forward.experts)))
    return torch.cat([one(part) for one, part in zip(feed_forward.experts, slices, strict=True)])[: len(x)]


def flops_of_diffusers(latents: Tensor, timesteps: Tensor, texts: dict[str, Tensor]) -> dict[str, int]:
    """Operations of diffusers' class at the same size, by kind; on a pretended CPU, since it reads what it made."""
    with torch.device("meta"):
        model = diffusers.HiDreamImageTransformer2DModel.from_config(TRANSFORMER)
    place(model, torch.device("cpu"), torch.bfloat16)
    arguments = {name: torch.empty_like(one, device="cpu") for name, one in texts.items()}
    positional = [torch.empty_like(one, device="cpu") for one in (latents, timesteps)]
    with mock.patch.object(of_diffusers.MOEFeedForwardSwiGLU, "moe_infer", infer_evenly):
        return flops_by_kind(model, lambda: model(*positional, **arguments))


def count_flops(device: torch.device) -> dict[str, Any]:
    """A guided picture of 1024x1024 pixels in bf16."""
    full = PRESETS["full"]
    pipe = build_pretended(full, device)
    steps = {name: flops_of_steps(pipe, draw_one(full, cache)[0]) for name, cache in CACHES.items()}
    texts = {
        "encoder_hidden_states_t5": torch.empty(2, 128, 4096, dtype=torch.bfloat16, device=device),
        "encoder_hidden_states_llama3": torch.empty(32, 2, 128, 4096, dtype=torch.bfloat16, device=device),
        "pooled_embeds": torch.empty(2, 2048, dtype=torch.bfloat16, device=device),
    }
    latents = torch.empty(2, 16, 128, 128, dtype=torch.bfloat16, device=device)
    timesteps = torch.empty(2, device=device)
    conditioning = pipe.transformer.prepare(*texts.values(), (64, 64))
    ours = flops_by_kind(pipe.transformer, lambda: pipe.transformer(latents, timesteps, conditioning=conditioning))
    theirs = flops_of_diffusers(latents, timesteps, texts)
    fp8 = build_pretended(full, device, fp8=True)
    conditioning = fp8.transformer.prepare(*texts.values(), (64, 64))
    with FlopCounterMode(display=False) as counter:
        fp8.transformer(latents, timesteps, conditioning=conditioning)
    in_fp8 = sum(count for op, count in counter.get_flop_counts()["Global"].items() if "scaled_mm" in str(op))
    whole = sum(ours.values())
    return {
        "steps": steps,
        "full_step_by_kind": {"ours": ours, "diffusers": theirs},
        "full_step_in_fp8": in_fp8,
        "seconds_by_arithmetic": {
            f"{count} evaluations at {share:.0%}": {
                "bf16": round(count * whole / share / PEAK_TFLOPS / 1e12, 2),
                "fp8": round(count * (whole - in_fp8 / 2) / share / PEAK_TFLOPS / 1e12, 2),
            }
            for count in EVALUATIONS
            for share in SHARES
        },
    }


def track_memory(device: torch.device) -> list[dict[str, Any]]:
    """The most memory of each stage, for every strategy that keeps whole components on the card."""
    rows = []
    ways = itertools.product(("full", "dev"), ("bf16", "nf4", "fp8"))
    for name, precision in tqdm(list(ways), unit="model", disable=None):
        preset, quantization = PRESETS[name], "nf4" if precision == "nf4" else "none"
        pipe = build_pretended(preset, device, quantization, fp8=precision == "fp8")
        caches = ("off", "module", "residual", "x0") if name == "full" else ("off", "x0")
        for cache, count in itertools.product(caches, (1, 4)):
            many = draw_one(preset, CACHES[cache], count)
            alive = Alive.beside(pipe, device)
            peaks = stage_peaks(pipe, many, alive)
            source = ModelSource(quantization=quantization)
            plan = plan_memory(Demand(many[0], source, torch.bfloat16, count, fp8=pipe.fp8))
            for strategy in STRATEGIES:
                if strategy == "group offload":  # its hooks do not run on this device
                    continue
                whole = [
                    (plan.at(strategy, one), plan.at(strategy, one) - sum(one.tensors.values()) + peaks[one.name])
                    for one in plan.stages
                ]
                planned, tracked = (max(values) for values in zip(*whole, strict=True))
                rows.append(
                    {
                        "model": name,
                        "precision": precision,
                        "cache": cache,
                        "batch_size": count,
                        "strategy": strategy,
                        "planned_gib": round(planned / GIB, 2),
                        "tracked_gib": round(tracked / GIB, 2),
                        "tracked_over_planned": round(tracked / planned, 3),
                        "stages_tracked_gib": {stage: round(size / GIB, 3) for stage, size in peaks.items()},
                    }
                )
    return rows


def run(args: argparse.Namespace) -> None:
    """Count and write both result files."""
    quiet_libraries()
    with pretended_device() as device:
        flops, memory = count_flops(device), track_memory(device)
    about = {"what": "shapes alone, at HiDream-I1's published size; 1024x1024 pixels, guidance 5 (full), bf16"}
    cpu = torch.device("cpu")
    print(write_json(args.output, "real_size_flops", cpu, about | flops))
    print(write_json(args.output, "real_size_memory", cpu, about | {"rows": memory}))


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = Parser(prog="python -m benchmarks.real_size", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results (default: %(default)s)")
    return run_script(run, parser, argv)


if __name__ == "__main__":
    raise SystemExit(main())
