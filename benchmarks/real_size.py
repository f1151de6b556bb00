"""HiDream-I1 at its published size on a pretended accelerator: what a step computes, and what a drawing keeps.

    python -m benchmarks.real_size

No number is computed and no second is measured: see `benchmarks.pretended`.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer

from benchmarks.architecture import TOKENIZERS, build
from benchmarks.pretended import Alive
from hi_diffusers.engine.generation import denoise_batch, encode_prompts
from hi_diffusers.families.hidream.pipeline import HiDreamImagePipeline
from hi_diffusers.families.table import PRESETS
from hi_diffusers.preset import ModelPreset
from hi_diffusers.request.drawing import Drawing
from hi_diffusers.weights.identity import ModelIdentity
from hi_diffusers.weights.nf4 import NF4_BLOCK


class Nf4StandIn(nn.Module):
    """A Linear with the bytes of bitsandbytes' nf4, which does not run without numbers.

    As there, the weight is written out in the arithmetic's dtype for more than one row, and one row is multiplied as it
    is.
    """

    def __init__(self, layer: nn.Linear, device: torch.device, dtype: torch.dtype):
        super().__init__()
        count = layer.in_features * layer.out_features
        self.in_features, self.out_features, self.dtype = layer.in_features, layer.out_features, dtype
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
