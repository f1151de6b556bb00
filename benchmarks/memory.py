"""The memory plan against what a GPU really holds: HiDream-I1 in nf4 at its published size, with random weights.

    python -m benchmarks.memory

The process is held to 24 GiB of the card. Guided pictures of 1024x1024 pixels are drawn with the target of `best`,
everything resident, and with TaylorSeer's, the encoders freed; each stage's peak stands beside the plan's.
"""

import argparse
import gc
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.architecture import build
from benchmarks.report import RESULTS, write_json
from cache_functions import CacheConfig, settle
from hi_diffusers.console import Parser, Refusal, quiet_libraries, run_script, say
from hi_diffusers.denoising.schedulers import make_scheduler
from hi_diffusers.families.hidream.pipeline import HiDreamImagePipeline
from hi_diffusers.families.hidream.prompts import PromptEmbeds
from hi_diffusers.families.hidream.shapes import ENCODERS
from hi_diffusers.families.table import find_preset
from hi_diffusers.memory.plan import CUDA_RESERVE, Demand, plan_memory
from hi_diffusers.request.drawing import Drawing
from hi_diffusers.request.options import SamplingOptions
from hi_diffusers.weights.source import GIB, ModelSource

NUM_STEPS = 8  # the peak is that of a full step with all anchors kept
CACHES = {
    "x0, everything resident": (CacheConfig(target="x0", fresh_threshold=2, max_order=2), "resident"),
    "module, encoders freed": (CacheConfig(target="module", fresh_threshold=2), "free encoders"),
}


def encode(pipe: HiDreamImagePipeline, num_tokens: int, device: torch.device) -> PromptEmbeds:
    """All encoders at work on random tokens, both guidance branches."""
    ids = torch.randint(2, 20, (2, num_tokens), device=device)
    pooled = [encoder(ids[:, :77]).text_embeds for encoder in (pipe.text_encoder, pipe.text_encoder_2)]
    states = pipe.text_encoder_4(ids, output_hidden_states=True, use_cache=False).hidden_states[1:]
    return PromptEmbeds(pipe.text_encoder_3(ids)[0], torch.stack(states), torch.cat(pooled, dim=-1))


@torch.no_grad()
def measure(
    pipe: HiDreamImagePipeline, demand: Demand, strategy: str, device: torch.device, peak: Callable[[], int]
) -> list[dict[str, Any]]:
    """Draw once; a row per stage.

    Args:
        peak: bytes at the worst moment since it was last called.
    """
    options, plan = demand.drawing.options, plan_memory(demand)
    peak()
    embeds = encode(pipe, options.max_sequence_length, device)
    measured = [peak()]
    if strategy == "free encoders":
        pipe.register_modules(**dict.fromkeys(ENCODERS))
        gc.collect()
        torch.cuda.empty_cache()
        peak()
    scheduler = make_scheduler(options.scheduler, options.shift)
    scheduler.set_timesteps(NUM_STEPS, device=device)
    noise = pipe.draw_noise(1, options.width, options.height, torch.Generator().manual_seed(0)).to(device)
    settings = {"scheduler": scheduler, "guidance": options.guidance, "cache": demand.drawing.cache}
    latents: Tensor = pipe.denoise(noise, embeds, **settings)
    measured.append(peak())
    pipe.decode(latents)
    measured.append(peak())
    # the whole model is built at once, so prompts are encoded beside the transformer here
    planned = [plan.at("resident" if stage.name == "encode" else strategy, stage) for stage in plan.stages]
    return [
        {
            "stage": stage.name,
            "planned_gib": round(expected / GIB, 2),
            "measured_gib": round(found / GIB, 2),
            "measured_over_planned": round(found / expected, 3),
        }
        for stage, expected, found in zip(plan.stages, planned, measured, strict=True)
    ]


def run(args: argparse.Namespace) -> None:
    """Measure and write the result file."""
    quiet_libraries()
    if not torch.cuda.is_available():
        raise Refusal("benchmarks.memory measures a GPU's memory, and torch sees none: inference.py --plan plans it")
    device, dtype, preset = torch.device("cuda"), torch.bfloat16, find_preset(args.model_type)
    whole = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, (args.limit_gib * GIB - CUDA_RESERVE) / whole), device)

    def peak() -> int:
        torch.cuda.synchronize()
        found = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return found

    options = SamplingOptions("", seed=0).resolve(preset)
    source = ModelSource(quantization="nf4")
    pipe = build(preset, device, dtype, "nf4")
    rows = {}
    for name, (cache, strategy) in CACHES.items():  # the one that frees the encoders is the last
        demand = Demand(Drawing(preset, options, settle(cache, NUM_STEPS)), source, dtype)
        rows[name] = measure(pipe, demand, strategy, device, peak)
        say(json.dumps({name: rows[name]}))
    content = {
        "what": "peak of torch's allocations in GiB, beside the plan's; random weights",
        "model_type": preset.name,
        "limit_gib": args.limit_gib,
        "reserve_gib": CUDA_RESERVE / GIB,
        "reserved_by_torch_gib": round(torch.cuda.max_memory_reserved(device) / GIB, 2),
        "drawings": rows,
    }
    print(write_json(args.output, f"memory_{preset.name}", device, content))


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = Parser(prog="python -m benchmarks.memory", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model_type", choices=("full", "dev", "fast"), default="full", help="default: %(default)s")
    parser.add_argument("--limit_gib", type=float, default=24.0, help="of the card that may be used (default: 24)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the result (default: %(default)s)")
    return run_script(run, parser, argv)


if __name__ == "__main__":
    raise SystemExit(main())
