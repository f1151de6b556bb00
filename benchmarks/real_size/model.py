"""HiDream-I1 at its published size without numbers, and drawings of it; see `benchmarks.pretended`."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer

from benchmarks.architecture import TOKENIZERS, build
from benchmarks.pretended import Alive
from cache_functions import CacheConfig
from hi_diffusers import SamplingOptions
from hi_diffusers.engine.generation import denoise_batch, encode_prompts
from hi_diffusers.families.hidream.pipeline import HiDreamImagePipeline
from hi_diffusers.families.hidream.shapes import TILE
from hi_diffusers.families.table import PRESETS
from hi_diffusers.preset import ModelPreset
from hi_diffusers.request.drawing import Drawing, decide
from hi_diffusers.weights.identity import ModelIdentity
from hi_diffusers.weights.nf4 import NF4_BLOCK

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
    batch: Sequence[Drawing],
    alive: Alive,
    denoising: AbstractContextManager[Any] = nullcontext(),  # noqa: B008
) -> dict[str, int]:
    """Draw a batch.

    Args:
        batch: the drawings.
        alive: counts the tensors, and knows the weights.
        denoising: context of that stage.

    Returns:
        Stage -> the most bytes that its tensors took at once, without the model's weights.
    """
    weights, peaks = alive.now, {}

    def ended(stage: str) -> None:
        peaks[stage], alive.most = alive.most - weights, alive.now

    with alive:
        alive.most = alive.now
        embeds = encode_prompts(pipe, [one.options for one in batch])
        ended("encode")
        with denoising:
            latents = denoise_batch(pipe, batch, embeds)
        del embeds
        ended("denoise")
        pipe.decode(latents)
        ended("decode")
    return peaks


def drawings(preset: ModelPreset, cache: CacheConfig, count: int = 1, **options: Any) -> list[Drawing]:
    """Pictures of one prompt and several seeds, of a few steps unless `options` say otherwise."""
    options = {"num_steps": NUM_STEPS} | options
    first = decide(preset, SamplingOptions("a red fox in snow", seed=0, **options), cache)
    return [first.again(first.options.prompt, seed) for seed in range(count)]


@contextmanager
def in_tiles(pipe: HiDreamImagePipeline) -> Iterator[None]:
    """A context in which pictures are decoded in tiles."""
    pipe.vae.tile_sample_min_size, pipe.vae.tile_latent_min_size = TILE, TILE // pipe.vae_scale_factor
    pipe.vae.enable_tiling()
    try:
        yield
    finally:
        pipe.vae.disable_tiling()
