"""Bytes of what a drawing holds, from shapes alone.

Weights, anchors and latents are counted exactly; what a forward or a decoding holds on its way is estimated from the
largest tensors that live at once.

Shapes: B pictures, b of them or of both guidance branches, S image tokens, T text tokens, D width, C latent channels.
"""

import math
from collections.abc import Callable

import torch
from torch import nn

from cache_functions import CacheConfig
from cache_functions.anchors import ANCHOR_DTYPES
from hi_diffusers.memory.architecture import Architecture
from hi_diffusers.models.moe import SwiGLU
from hi_diffusers.options import ResolvedOptions

NF4_BLOCK = 64  # numbers that share a scale of 4 bytes
GPTQ_GROUP = 128
TILE = 512  # pixels of a tile's side where a picture is decoded in tiles
LATENT_BYTES = 4  # latents, x0 and velocity are fp32


def weight_bytes(
    module: nn.Module, dtype: torch.dtype, packed: Callable[[str, nn.Module], int | None] | None = None
) -> int:
    """Bytes of a component's parameters.

    Args:
        dtype: of those that are not packed.
        packed: (name, layer) -> bytes of its weight in fewer bits, or None where it stays as it is.
    """
    total = 0
    counted: set[int] = set()  # T5's embedding is held by two modules
    for name, layer in module.named_modules():
        own = [parameter for parameter in layer.parameters(recurse=False) if id(parameter) not in counted]
        counted.update(id(parameter) for parameter in own)
        in_fewer_bits = packed(name, layer) if packed and isinstance(layer, nn.Linear) else None
        if in_fewer_bits is not None:
            total += in_fewer_bits
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
    """What the cache keeps on the card: max_order + 1 full steps of what its target forecasts."""
    if cache.is_off or cache.anchor_device is not None:
        return 0
    kept = cache.max_order + 1
    packed = None if cache.anchor_dtype is None else ANCHOR_DTYPES[cache.anchor_dtype].itemsize
    if cache.target in ("velocity", "x0"):
        return kept * batch_size * latent_numbers(architecture, options) * (packed or LATENT_BYTES)
    config, branches = architecture.config, batch_size * (2 if options.guided else 1)
    width = config.attention_head_dim * config.num_attention_heads
    features = 2 * (config.num_layers + config.num_single_layers) if cache.target == "module" else 1
    return kept * features * branches * image_tokens(architecture, options) * width * (packed or dtype.itemsize)


def forward_bytes(architecture: Architecture, options: ResolvedOptions, branches: int, dtype: torch.dtype) -> int:
    """An estimate of what one forward holds at once: a single-stream block's experts, over all tokens."""
    config = architecture.config
    width = config.attention_head_dim * config.num_attention_heads
    with torch.device("meta"):
        hidden = SwiGLU(width, 4 * width).w1.out_features
    tokens = image_tokens(architecture, options) + 2 * options.max_sequence_length
    copies = config.num_activated_experts
    # per token and copy: gate and up, and their product; the token sorted; and the running streams
    numbers = copies * (3 * hidden + 2 * width) + 5 * width
    return branches * tokens * numbers * dtype.itemsize


def decode_bytes(
    architecture: Architecture, options: ResolvedOptions, batch_size: int, dtype: torch.dtype, tiled: bool = False
) -> int:
    """An estimate of what the VAE's decoder holds at once: a few feature maps at the picture's size, or a tile's."""
    channels = architecture.components["vae"].config.block_out_channels
    pixels = min(options.width * options.height, TILE**2) if tiled else options.width * options.height
    picture = 2 * 3 * options.width * options.height * LATENT_BYTES  # the tiles, and what they are joined to
    maps = 4 * pixels * channels[min(1, len(channels) - 1)] * dtype.itemsize
    return batch_size * (maps + (picture if tiled else 0))


def largest_layer_bytes(module: nn.Module, dtype: torch.dtype) -> int:
    """Of the largest module that holds parameters itself."""
    return max(sum(p.numel() for p in layer.parameters(recurse=False)) for layer in module.modules()) * dtype.itemsize


def pinned_bytes(module: nn.Module, dtype: torch.dtype) -> int:
    """Of the host's memory that its parameters take where they are pinned: torch rounds each up to a power of two."""
    return sum(1 << (parameter.numel() * dtype.itemsize - 1).bit_length() for parameter in module.parameters())


def latent_numbers(architecture: Architecture, options: ResolvedOptions) -> int:
    factor = 2 ** (len(architecture.components["vae"].config.block_out_channels) - 1)
    return architecture.config.in_channels * (options.width // factor) * (options.height // factor)


def image_tokens(architecture: Architecture, options: ResolvedOptions) -> int:
    """Patches of the picture; a picture that is not square is padded to the model's most."""
    config = architecture.config
    most = math.prod(config.max_resolution) // config.patch_size**2
    if options.width != options.height:
        return int(most)
    return int(latent_numbers(architecture, options) // config.in_channels // config.patch_size**2)


def embedded_numbers(architecture: Architecture, options: ResolvedOptions) -> int:
    """Of one prompt's embeddings."""
    config, llama = architecture.config, architecture.components["text_encoder_4"].config
    t5, _ = config.caption_channels
    a_token = t5 + llama.num_hidden_layers * llama.hidden_size
    return int(options.max_sequence_length * a_token + config.text_emb_dim)


def conditioning_bytes(
    architecture: Architecture, options: ResolvedOptions, cache: CacheConfig, branches: int, dtype: torch.dtype
) -> int:
    """What is constant over a drawing: the caption projections' outputs, one a block, T5's, and the last block's once
    more; and of target module the gates of all steps, two a block."""
    config = architecture.config
    width = config.attention_head_dim * config.num_attention_heads
    blocks = config.num_layers + config.num_single_layers
    gates = 2 * blocks * options.num_steps if cache.target == "module" else 0
    return branches * ((blocks + 2) * options.max_sequence_length + gates) * width * dtype.itemsize
