"""Bytes that a drawing needs, from shapes alone.

Weights, anchors and latents are counted exactly; the temporary tensors of a forward or a decoding are estimated from
the largest ones that exist at once.

Shapes: B pictures, b of them or of both guidance branches, S image tokens, T text tokens, D width, C latent channels.
"""

import math
from collections.abc import Callable, Iterable

import torch

from cache_functions import CacheConfig
from cache_functions.anchors import ANCHOR_DTYPES
from cache_functions.config import ON_LATENTS
from cache_functions.solver import SOLVER
from hi_diffusers.families.family import Shapes
from hi_diffusers.request.options import ResolvedOptions
from hi_diffusers.weights.layers import Layer

LATENT_BYTES = 4  # latents, x0 and velocity are fp32


def weight_bytes(
    layers: Iterable[Layer], dtype: torch.dtype, packed: Callable[[Layer], int | None] | None = None
) -> int:
    """Bytes of a component's parameters.

    Args:
        dtype: dtype of the parameters that are not quantized.
        packed: Linear -> bytes of its quantized weight, or None if it is not quantized.
    """
    total = 0
    for layer in layers:
        in_fewer_bits = packed(layer) if packed and layer.is_linear else None
        if in_fewer_bits is None:
            total += layer.num_parameters * dtype.itemsize
        else:
            others = layer.num_parameters - math.prod(layer.parameters[0])
            total += in_fewer_bits + others * dtype.itemsize
    return total


def anchor_bytes(
    shapes: Shapes,
    options: ResolvedOptions,
    cache: CacheConfig,
    batch_size: int,
    dtype: torch.dtype,
    num_ranks: int = 1,
) -> int:
    """Bytes that the cache keeps: the target's features at max_order + 1 full steps; a solver's at all.

    Args:
        num_ranks: processes over which the features are split; latents are not.
    """
    if cache.is_off:
        return 0
    kept = cache.max_order + 1
    if cache.target == SOLVER:
        kept = len(cache.mask or ()) * (2 if options.guided else 1)
    packed = None if cache.anchor_dtype is None else ANCHOR_DTYPES[cache.anchor_dtype].itemsize
    if cache.target in (*ON_LATENTS, SOLVER):
        return kept * batch_size * latent_numbers(shapes, options) * (packed or LATENT_BYTES)
    branches = batch_size * (2 if options.guided else 1)
    features = 2 * shapes.num_blocks if cache.target == "module" else 1
    numbers = features * branches * image_tokens(shapes, options) * shapes.width
    return kept * numbers * (packed or dtype.itemsize) // num_ranks


def forward_bytes(
    shapes: Shapes,
    options: ResolvedOptions,
    branches: int,
    dtype: torch.dtype,
    *,
    one_by_one: bool = False,
    fp8: bool = False,
    ulysses: int = 1,
) -> int:
    """Estimated peak bytes of one forward: one block's feed-forward, over all tokens.

    Args:
        one_by_one: whether experts are called one by one, since their weights are not plain. Then the shared one, which
            sees all tokens, needs most.
        fp8: whether the feed-forward's input rows are rounded to fp8, by way of fp32.
        ulysses: ranks over which the tokens are split.
    """
    tokens = (image_tokens(shapes, options) + shapes.text_streams * options.max_sequence_length) // ulysses
    copies = shapes.num_copies * shapes.width  # of each token, one for each of its experts
    streams = 6 * shapes.width
    # plain: the tokens sorted, gate and up, their product, the output; else what was sorted, mixed, and sorted back
    numbers = streams + 2 * copies + shapes.num_copies * 3 * shapes.num_hidden
    written_out = 0
    if one_by_one:
        numbers = streams + 3 * copies + 2 * shapes.num_shared + (3 * shapes.num_shared if fp8 else 0)
        written_out = 0 if fp8 else shapes.width * shapes.num_shared  # one weight of the shared expert, in full
    return (branches * tokens * numbers + written_out) * dtype.itemsize


def decode_bytes(
    shapes: Shapes, options: ResolvedOptions, batch_size: int, dtype: torch.dtype, tile: int | None = None
) -> int:
    """Estimated peak bytes of the decoder: three feature maps of the picture's size, or of a tile's.

    Args:
        tile: pixels along a tile's side; None decodes the whole picture at once.
    """
    whole = options.width * options.height
    pixels = whole if tile is None else min(whole, tile**2)
    picture = 2 * 3 * whole * dtype.itemsize  # the tiles, and the picture that they are joined to
    maps = 3 * pixels * shapes.decoder_channels * dtype.itemsize
    return batch_size * (maps + (0 if tile is None else picture))


def encode_bytes(
    shapes: Shapes, options: ResolvedOptions, batch_size: int, dtype: torch.dtype, tile: int | None = None
) -> int:
    """Estimated peak bytes of encoding pictures to start from: five feature maps of their size, or of a tile's.

    Args:
        tile: as in `decode_bytes`.
    """
    whole = options.width * options.height
    pixels = whole if tile is None else min(whole, tile**2)
    return batch_size * (5 * pixels * shapes.picture_channels + 3 * whole) * dtype.itemsize


def written_out_bytes(layers: Iterable[Layer], bytes_per_number: int) -> int:
    """Bytes of the largest Linear's weight while it is unpacked from fewer bits.

    Args:
        bytes_per_number: of the unpacked weight and what it is made from.
    """
    linears = (layer for layer in layers if layer.is_linear)
    return max((layer.in_features * layer.out_features for layer in linears), default=0) * bytes_per_number


def largest_layer_bytes(layers: Iterable[Layer], dtype: torch.dtype) -> int:
    """Bytes of the largest module that holds parameters itself."""
    return max(layer.num_parameters for layer in layers) * dtype.itemsize


def pinned_bytes(layers: Iterable[Layer], dtype: torch.dtype) -> int:
    """Bytes of host memory for pinned parameters: torch rounds each one up to a power of two."""
    numbers = (math.prod(shape) for layer in layers for shape in layer.parameters)
    return sum(1 << (number * dtype.itemsize - 1).bit_length() for number in numbers)


def latent_numbers(shapes: Shapes, options: ResolvedOptions) -> int:
    """Number of elements in one picture's latent."""
    factor = shapes.latent_factor
    return shapes.latent_channels * (options.width // factor) * (options.height // factor)


def image_tokens(shapes: Shapes, options: ResolvedOptions) -> int:
    """Number of the picture's patches; a picture that is not square is padded to the model's maximum."""
    if options.width != options.height:
        return shapes.max_tokens
    return latent_numbers(shapes, options) // shapes.latent_channels // shapes.patch_size**2


def embedded_numbers(shapes: Shapes, max_sequence_length: int) -> int:
    """Number of elements in one prompt's embeddings."""
    return max_sequence_length * shapes.text_numbers + shapes.pooled_numbers


def conditioning_bytes(
    shapes: Shapes, options: ResolvedOptions, cache: CacheConfig, branches: int, dtype: torch.dtype
) -> int:
    """Bytes of the tensors that are constant over a drawing.

    These are the text's projections for every block, and for the text that runs through all blocks; with target module
    also the gates of all steps, two per block.
    """
    gates = 2 * shapes.num_blocks * options.drawn_steps if cache.target == "module" else 0
    return branches * ((shapes.num_blocks + 2) * options.max_sequence_length + gates) * shapes.width * dtype.itemsize
