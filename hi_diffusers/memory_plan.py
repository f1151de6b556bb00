"""What fits where: the bytes of every stage of a drawing, told from configurations alone.

A drawing has three stages: prompts are encoded, latents denoised, pictures decoded. Each needs its components' weights
and its own tensors. Weights, anchors and latents are counted exactly; what a forward holds on its way is estimated from
the largest tensors that live at once.

Shapes: B pictures, b of them or of both guidance branches, S image tokens, T text tokens, D width, C latent channels.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, LlamaConfig, LlamaModel, T5Config, T5EncoderModel

from cache_functions import CacheConfig
from hi_diffusers import published
from hi_diffusers.models.moe import SwiGLU
from hi_diffusers.models.nf4 import Nf4
from hi_diffusers.models.transformer import HiDreamImageTransformer2DModel
from hi_diffusers.options import ResolvedOptions
from hi_diffusers.presets import ModelPreset, bundled_folder

GIB = 2**30
CUDA_RESERVE = 3 * GIB // 4  # context, kernels, workspaces, and what the allocator cannot use
NF4_BLOCK = 64  # numbers that share a scale of 4 bytes
GPTQ_GROUP = 128
T5_KEPT = ".wo"  # transformers quantizes all Linears of T5 but this one
ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3", "text_encoder_4")
LATENT_BYTES = 4  # latents, x0 and velocity are fp32
STRATEGIES = {
    "resident": "everything stays on the card",
    "free encoders": "prompts are encoded before the transformer is loaded, and the encoders then dropped",
    "offload": "each component is on the card while it works, and in the host's memory otherwise",
}


@dataclass(frozen=True)
class Architecture:
    """A model's components on the meta device: shapes without numbers."""

    components: dict[str, nn.Module]

    @classmethod
    def of(cls, preset: ModelPreset) -> "Architecture":
        """As published, or as the bundled model's files say."""
        if preset.is_bundled:
            configs = {name: _read(bundled_folder() / name) for name in (*ENCODERS, "transformer", "vae")}
        else:
            encoders = (published.CLIP_L, published.CLIP_G, published.T5, published.LLAMA)
            configs = dict(zip(ENCODERS, encoders, strict=True))
            configs |= {"transformer": published.TRANSFORMER, "vae": published.VAE}
        clip, clip_2, t5, llama = (configs[name] for name in ENCODERS)
        with torch.device("meta"):
            architecture = cls(
                {
                    "text_encoder": CLIPTextModelWithProjection(CLIPTextConfig(**clip)),
                    "text_encoder_2": CLIPTextModelWithProjection(CLIPTextConfig(**clip_2)),
                    "text_encoder_3": T5EncoderModel(T5Config(**t5)),
                    "text_encoder_4": LlamaModel(LlamaConfig(**llama)),
                    "transformer": HiDreamImageTransformer2DModel.from_config(configs["transformer"]),
                    "vae": AutoencoderKL.from_config(configs["vae"]),
                }
            )
        architecture.components["text_encoder_3"].tie_weights()
        return architecture

    @property
    def config(self) -> Any:
        """The transformer's."""
        return self.components["transformer"].config


@dataclass(frozen=True)
class Stage:
    """One stage of a drawing.

    Attributes:
        name: "encode", "denoise" or "decode".
        components: whose weights it needs.
        tensors: what else it holds at once -> bytes.
    """

    name: str
    components: tuple[str, ...]
    tensors: dict[str, int]


@dataclass(frozen=True)
class MemoryPlan:
    """What a drawing needs, and how it is fitted into a budget.

    Attributes:
        weights: component -> bytes.
        stages: encode, denoise, decode.
        budget: bytes that may be used on the card; None is no limit.
    """

    weights: dict[str, int]
    stages: tuple[Stage, ...]
    budget: int | None = None

    def peak(self, strategy: str) -> int:
        """Bytes on the card at the worst moment."""
        return max(self._on_card(strategy, stage) + sum(stage.tensors.values()) for stage in self.stages)

    @property
    def strategy(self) -> str | None:
        """The first of STRATEGIES that fits; None if none does."""
        if self.budget is None:
            return next(iter(STRATEGIES))
        return next((name for name in STRATEGIES if self.peak(name) <= self.budget), None)

    def _on_card(self, strategy: str, stage: Stage) -> int:
        if strategy == "resident":
            return sum(self.weights.values())
        if strategy == "free encoders":
            encodes = stage.name == "encode"
            return sum(size for name, size in self.weights.items() if (name in ENCODERS) == encodes)
        return max(self.weights[name] for name in stage.components)

    def to_text(self) -> str:
        """A table in GiB, and one line about the choice."""
        rows = [("", "weights", "tensors", *(f"peak, {name}" for name in STRATEGIES))]
        for stage in self.stages:
            own, tensors = sum(self.weights[name] for name in stage.components), sum(stage.tensors.values())
            peaks = [self._on_card(name, stage) + tensors for name in STRATEGIES]
            rows.append((stage.name, *(f"{value / GIB:.2f}" for value in (own, tensors, *peaks))))
        rows.append(("at once", "", "", *(f"{self.peak(name) / GIB:.2f}" for name in STRATEGIES)))
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
        details = ", ".join(f"{name} {size / GIB:.2f}" for name, size in self.weights.items())
        parts = ", ".join(f"{name} {size / GIB:.2f}" for stage in self.stages for name, size in stage.tensors.items())
        return "\n".join([*lines, f"weights: {details}", f"tensors: {parts}", self.sentence()])

    def sentence(self) -> str:
        """What was chosen and why."""
        peaks = {name: f"{self.peak(name) / GIB:.1f} GiB" for name in STRATEGIES}
        if self.budget is None:
            return f"resident: {STRATEGIES['resident']}, {peaks['resident']}"
        limit = f"{self.budget / GIB:.1f} GiB"
        if self.strategy is None:
            return f"does not fit into {limit}: even with offload it needs {peaks['offload']}"
        before = list(STRATEGIES)[: list(STRATEGIES).index(self.strategy)]
        why = "".join(f"; {name} would need {peaks[name]}" for name in before)
        return f"{self.strategy}: {STRATEGIES[self.strategy]}, {peaks[self.strategy]} of {limit}{why}"


def plan_memory(
    preset: ModelPreset,
    options: ResolvedOptions,
    cache: CacheConfig,
    *,
    dtype: torch.dtype = torch.bfloat16,
    quantization: str = "none",
    batch_size: int = 1,
    budget: int | None = None,
) -> MemoryPlan:
    """What a drawing needs.

    Args:
        options: size, guidance and prompt length.
        cache: as resolved.
        dtype: of the weights that are not quantized, and of the arithmetic.
        quantization: "none", or "nf4" with a GPTQ-INT4 Llama, as for HiDream-I1 without other files.
        batch_size: pictures at once.
        budget: bytes that may be used; None is no limit.
    """
    architecture = Architecture.of(preset)
    packing: dict[str, Callable[[str, nn.Module], int | None]] = {}
    if quantization == "nf4":
        settings = Nf4()
        packing["transformer"] = lambda name, module: nf4_bytes(module) if settings.takes(name, module) else None
        packing["text_encoder_3"] = lambda name, module: None if name.endswith(T5_KEPT) else nf4_bytes(module)
        if not preset.is_bundled:
            packing["text_encoder_4"] = lambda name, module: gptq_bytes(module)
    weights = {name: weight_bytes(module, dtype, packing.get(name)) for name, module in architecture.components.items()}
    branches = batch_size * (2 if options.guided else 1)
    latent = batch_size * _latent_numbers(architecture, options)
    embeds = branches * _embedded_numbers(architecture, options) * dtype.itemsize
    stages = (
        Stage("encode", ENCODERS, {"embeddings": embeds}),
        Stage(
            "denoise",
            ("transformer",),
            {
                "embeddings and their projections": embeds
                + _conditioning_bytes(architecture, options, branches, dtype),
                "latents": 4 * latent * LATENT_BYTES,
                "anchors": anchor_bytes(architecture, options, cache, batch_size, dtype),
                "a forward": forward_bytes(architecture, options, branches, dtype),
            },
        ),
        Stage("decode", ("vae",), {"a decoding": decode_bytes(architecture, options, batch_size, dtype)}),
    )
    return MemoryPlan(weights, stages, budget)


def memory_budget(device: torch.device, vram: float | None) -> int | None:
    """Bytes that weights and tensors may take on the device; None where nothing limits them, as on the CPU.

    Args:
        vram: GiB of the card that may be used; None is what is free.
    """
    if device.type != "cuda":
        return None
    free = torch.cuda.mem_get_info(device)[0] if vram is None else int(vram * GIB)
    return free - CUDA_RESERVE


def ways_out(
    preset: ModelPreset, options: ResolvedOptions, cache: CacheConfig, quantization: str, budget: int, **settings: Any
) -> list[str]:
    """What would make a drawing fit that does not, the mildest first.

    Args:
        budget: bytes that it does not fit into.
        settings: dtype and batch_size, as in `plan_memory`.
    """
    light = replace(cache, target="x0") if cache.target in ("module", "residual") else cache
    ways = {"--quantization nf4": {"cache": cache, "quantization": "nf4"}}
    if light != cache:
        ways = {
            "--cache best, which keeps a few latents": {"cache": light, "quantization": quantization},
            **ways,
            "--quantization nf4 with --cache best": {"cache": light, "quantization": "nf4"},
        }
    found = [
        way
        for way, given in ways.items()
        if plan_memory(preset, options, budget=budget, **given, **settings).strategy is not None
    ]
    return [*found[:2], "--device cpu"]


def weight_bytes(
    module: nn.Module, dtype: torch.dtype, packed: Callable[[str, nn.Module], int | None] | None = None
) -> int:
    """Bytes of a component's parameters.

    Args:
        dtype: of those that are not packed.
        packed: (name, layer) -> bytes of its weight in 4 bits, or None where it stays as it is.
    """
    total = 0
    counted: set[int] = set()  # T5's embedding is held by two modules
    for name, layer in module.named_modules():
        own = [parameter for parameter in layer.parameters(recurse=False) if id(parameter) not in counted]
        counted.update(id(parameter) for parameter in own)
        in_four_bits = packed(name, layer) if packed and isinstance(layer, nn.Linear) else None
        if in_four_bits is not None:
            total += in_four_bits
            own = [parameter for parameter in own if parameter is not layer.weight]
        total += sum(parameter.numel() for parameter in own) * dtype.itemsize
    return total


def nf4_bytes(layer: nn.Module) -> int:
    """Of a Linear's weight in nf4: half a byte a number, and its blocks' scales."""
    assert isinstance(layer, nn.Linear)
    numbers = layer.weight.numel()
    return -(-numbers // 2) + -(-numbers // NF4_BLOCK) * 4


def gptq_bytes(layer: nn.Module) -> int:
    """Of a Linear's weight in GPTQ-INT4: half a byte a number, and its groups' scales, zeros and indices."""
    assert isinstance(layer, nn.Linear)
    groups = -(-layer.in_features // GPTQ_GROUP)
    scales_and_zeros = groups * layer.out_features * 2 + groups * layer.out_features // 2
    return layer.weight.numel() // 2 + scales_and_zeros + layer.in_features * 4


def anchor_bytes(
    architecture: Architecture, options: ResolvedOptions, cache: CacheConfig, batch_size: int, dtype: torch.dtype
) -> int:
    """What the cache keeps: max_order + 1 full steps of what its target forecasts."""
    if cache.is_off:
        return 0
    kept = cache.max_order + 1
    if cache.target in ("velocity", "x0"):
        return kept * batch_size * _latent_numbers(architecture, options) * LATENT_BYTES
    config, branches = architecture.config, batch_size * (2 if options.guided else 1)
    width = config.attention_head_dim * config.num_attention_heads
    features = 2 * (config.num_layers + config.num_single_layers) if cache.target == "module" else 1
    return kept * features * branches * _image_tokens(architecture, options) * width * dtype.itemsize


def forward_bytes(architecture: Architecture, options: ResolvedOptions, branches: int, dtype: torch.dtype) -> int:
    """An estimate of what one forward holds at once: a single-stream block's experts, over all tokens."""
    config = architecture.config
    width = config.attention_head_dim * config.num_attention_heads
    with torch.device("meta"):
        hidden = SwiGLU(width, 4 * width).w1.out_features
    tokens = _image_tokens(architecture, options) + 2 * options.max_sequence_length
    copies = config.num_activated_experts
    # per token and copy: gate and up, their activation and product; the token sorted; and the running streams
    numbers = copies * (4 * hidden + 2 * width) + 5 * width
    return branches * tokens * numbers * dtype.itemsize


def decode_bytes(architecture: Architecture, options: ResolvedOptions, batch_size: int, dtype: torch.dtype) -> int:
    """An estimate of what the VAE's decoder holds at once: a few feature maps at the picture's size."""
    channels = architecture.components["vae"].config.block_out_channels
    return 4 * batch_size * options.width * options.height * channels[min(1, len(channels) - 1)] * dtype.itemsize


def _latent_numbers(architecture: Architecture, options: ResolvedOptions) -> int:
    factor = 2 ** (len(architecture.components["vae"].config.block_out_channels) - 1)
    return architecture.config.in_channels * (options.width // factor) * (options.height // factor)


def _image_tokens(architecture: Architecture, options: ResolvedOptions) -> int:
    """Patches of the picture; a picture that is not square is padded to the model's most."""
    config = architecture.config
    most = math.prod(config.max_resolution) // config.patch_size**2
    if options.width != options.height:
        return int(most)
    return int(_latent_numbers(architecture, options) // config.in_channels // config.patch_size**2)


def _embedded_numbers(architecture: Architecture, options: ResolvedOptions) -> int:
    """Of one prompt's embeddings."""
    config, llama = architecture.config, architecture.components["text_encoder_4"].config
    t5, _ = config.caption_channels
    a_token = t5 + llama.num_hidden_layers * llama.hidden_size
    return int(options.max_sequence_length * a_token + config.text_emb_dim)


def _conditioning_bytes(architecture: Architecture, options: ResolvedOptions, branches: int, dtype: torch.dtype) -> int:
    """The caption projections' outputs, constant over a drawing: one a block, T5's, and the last block's once more."""
    config = architecture.config
    width = config.attention_head_dim * config.num_attention_heads
    texts = config.num_layers + config.num_single_layers + 2
    return branches * texts * options.max_sequence_length * width * dtype.itemsize


def _read(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return content
