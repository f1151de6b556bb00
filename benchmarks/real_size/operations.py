"""The operations of a step at HiDream-I1's published size, by kind, and beside diffusers' class.

Counted are matrix products, attention and convolutions, as torch's counter does; sums, norms and activations are not.
"""

import re
from collections.abc import Callable
from typing import Any
from unittest import mock

import diffusers
import torch
from diffusers.models.transformers import transformer_hidream_image as of_diffusers
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.architecture import fill
from benchmarks.pretended import spread_evenly
from benchmarks.real_size.model import CACHES, build_pretended, drawings
from hi_diffusers.denoising.steps import StepEnd
from hi_diffusers.engine.generation import denoise_batch, encode_prompts
from hi_diffusers.families.hidream.pipeline import HiDreamImagePipeline
from hi_diffusers.families.hidream.published import TRANSFORMER
from hi_diffusers.families.table import PRESETS
from hi_diffusers.request.drawing import Drawing

PEAK_TFLOPS = 790.0  # 80 % of the 989 in bf16 on an H100's data sheet, a guess of what large products reach; fp8: twice
SHARES = (0.6, 0.8)
FULL_STEPS = (50, 13, 8)
KINDS = {  # of a transformer's parts, by their names in both classes
    "routed experts": r"\.ff_i\.experts\.",
    "shared experts": r"\.shared_experts\.",
    "text feed-forwards": r"\.ff_t\.",
    "modulation": r"adaLN_modulation\.",
    "captions": r"caption_projection\.",
    "attention projections": r"\.attn1\.to_",
}


def flops_of_steps(pipe: HiDreamImagePipeline, drawing: Drawing) -> dict[str, int]:
    """Operations of a picture: "once" before the first step, of a "full" step, and of a "forecast" one.

    The first step is taken to cost as much as the last full one, and the rest of it to be done once.
    """
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


def flops_by_kind(model: nn.Module, evaluate: Callable[[], Any]) -> dict[str, int]:
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
    assert missing >= 0, "an operation was counted twice"
    return found | {"the rest": found["the rest"] + missing}


def infer_evenly(feed_forward: Any, x: Tensor, expert: Tensor, weight: Tensor) -> Tensor:
    """diffusers' experts, with equal numbers of tokens."""
    rows = x.repeat_interleave(feed_forward.num_activated_experts, dim=0)
    slices = rows.split(spread_evenly(expert, len(feed_forward.experts)))
    return torch.cat([one(part) for one, part in zip(feed_forward.experts, slices, strict=True)])[: len(x)]


def guided_inputs(device: torch.device) -> dict[str, Any]:
    """Latents, timesteps and texts of both guidance branches, for 1024x1024 pixels."""
    like: dict[str, Any] = {"dtype": torch.bfloat16, "device": device}
    return {
        "hidden_states": torch.empty(2, 16, 128, 128, **like),
        "timesteps": torch.empty(2, device=device),
        "encoder_hidden_states_t5": torch.empty(2, 128, 4096, **like),
        "encoder_hidden_states_llama3": torch.empty(32, 2, 128, 4096, **like),
        "pooled_embeds": torch.empty(2, 2048, **like),
    }


def flops_of_ours(pipe: HiDreamImagePipeline, device: torch.device) -> dict[str, int]:
    """Operations of one guided evaluation by our class, by kind; what is constant over a drawing is not counted."""
    latents, timesteps, *texts = guided_inputs(device).values()
    conditioning = pipe.transformer.prepare(*texts, (64, 64))
    return flops_by_kind(pipe.transformer, lambda: pipe.transformer(latents, timesteps, conditioning=conditioning))


def flops_of_diffusers() -> dict[str, int]:
    """Operations of the same by diffusers' class; on a pretended CPU, since it reads what it made."""
    cpu = torch.device("cpu")
    with torch.device("meta"):
        model = diffusers.HiDreamImageTransformer2DModel.from_config(TRANSFORMER).eval()
    fill(model, cpu, torch.bfloat16)
    inputs = guided_inputs(cpu)
    with mock.patch.object(of_diffusers.MOEFeedForwardSwiGLU, "moe_infer", infer_evenly):
        return flops_by_kind(model, lambda: model(**inputs))


def flops_in_fp8(device: torch.device) -> int:
    """Operations of a guided evaluation that `--fp8` multiplies in fp8."""
    pipe = build_pretended(PRESETS["full"], device, fp8=True)
    latents, timesteps, *texts = guided_inputs(device).values()
    conditioning = pipe.transformer.prepare(*texts, (64, 64))
    with FlopCounterMode(display=False) as counter:
        pipe.transformer(latents, timesteps, conditioning=conditioning)
    return sum(count for op, count in counter.get_flop_counts()["Global"].items() if "scaled_mm" in str(op))


def count_flops(device: torch.device) -> dict[str, Any]:
    """A guided picture of 1024x1024 pixels in bf16."""
    full = PRESETS["full"]
    pipe = build_pretended(full, device)
    steps = {name: flops_of_steps(pipe, drawings(full, cache)[0]) for name, cache in CACHES.items()}
    ours, in_fp8 = flops_of_ours(pipe, device), flops_in_fp8(device)
    whole = sum(ours.values())
    by_dtype = {"bf16": whole, "fp8": whole - in_fp8 / 2}
    return {
        "steps": steps,
        "full_step_by_kind": {"ours": ours, "diffusers": flops_of_diffusers()},
        "full_step_in_fp8": in_fp8,
        "seconds_by_arithmetic": {
            f"{count} full steps at {share:.0%}": {
                dtype: round(count * flops / share / PEAK_TFLOPS / 1e12, 2) for dtype, flops in by_dtype.items()
            }
            for count in FULL_STEPS
            for share in SHARES
        },
    }
