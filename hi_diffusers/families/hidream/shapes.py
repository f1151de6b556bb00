"""The sizes of the family's models, from configurations alone, and the quantization of their layers."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hi_diffusers.families.family import Shapes
from hi_diffusers.families.hidream import published
from hi_diffusers.families.hidream.files import loras_on_disk, stated_llama, stated_quantization
from hi_diffusers.families.hidream.layers import (
    clip_layers,
    llama_layers,
    swiglu_hidden,
    t5_layers,
    transformer_layers,
    vae_layers,
)
from hi_diffusers.preset import ModelPreset
from hi_diffusers.weights.fp8 import fp8_bytes, fp8_fits
from hi_diffusers.weights.gptq import UNPACKING, gptq_bytes
from hi_diffusers.weights.layers import Layer
from hi_diffusers.weights.nf4 import Nf4, nf4_bytes
from hi_diffusers.weights.source import ModelSource

ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3", "text_encoder_4")
TILE = 512
# Measured on the bundled model (docs/models.md): keeping the modulation unquantized, too, would cost 3.4 GiB of
# HiDream-I1 for no gain; the caption projections cost 0.7 GiB for a gain of 1.2 dB.
KEPT_BY_NF4 = ("x_embedder", "t_embedder", "p_embedder", "caption_projection", "final_layer")
T5_KEPT = ".wo"  # transformers quantizes all Linears of T5 but this one
BLOCKS = ("double_stream_blocks", "single_stream_blocks")
MODULATION = "adaLN_modulation"  # one row per picture: fp8 would gain nothing


def takes_fp8(name: str) -> bool:
    """Whether the transformer's Linear of that name multiplies in fp8 if fp8 is on."""
    return name.startswith(BLOCKS) and MODULATION not in name


def shapes(preset: ModelPreset, source: ModelSource, *, fp8: bool = False) -> Shapes:
    """See `Family.shapes`."""
    configs = configurations(preset)
    clip, clip_2, t5, llama = (configs[name] for name in ENCODERS)
    transformer, vae = configs["transformer"], configs["vae"]
    width = transformer["attention_head_dim"] * transformer["num_attention_heads"]
    side, patch_size = transformer["max_resolution"], transformer["patch_size"]
    channels = vae["block_out_channels"]
    quantization, of_llama = stated_quantization(preset, source), stated_llama(preset, source)
    return Shapes(
        components={
            "text_encoder": tuple(clip_layers(clip)),
            "text_encoder_2": tuple(clip_layers(clip_2)),
            "text_encoder_3": tuple(t5_layers(t5)),
            "text_encoder_4": tuple(llama_layers(llama)),
            "transformer": tuple(transformer_layers(transformer)),
            "vae": tuple(vae_layers(vae)),
        },
        encoders=ENCODERS,
        denoiser="transformer",
        decoder="vae",
        packed=_packed(quantization, of_llama, fp8),
        unpacking=_unpacking(quantization, of_llama),
        denoiser_bytes=_file_bytes(source),
        added_bytes=sum(path.stat().st_size for path in loras_on_disk(source)),
        width=width,
        num_blocks=transformer["num_layers"] + transformer["num_single_layers"],
        num_hidden=swiglu_hidden(4 * width),
        num_shared=swiglu_hidden(2 * width),
        num_copies=transformer["num_activated_experts"],
        latent_channels=transformer["in_channels"],
        latent_factor=2 ** (len(channels) - 1),
        patch_size=patch_size,
        num_heads=transformer["num_attention_heads"],
        max_tokens=side[0] * side[1] // patch_size**2,
        text_streams=2,
        text_numbers=transformer["caption_channels"][0] + llama["num_hidden_layers"] * llama["hidden_size"],
        pooled_numbers=transformer["text_emb_dim"],
        decoder_channels=channels[min(1, len(channels) - 1)],
        picture_channels=channels[0],
    )


def configurations(preset: ModelPreset) -> dict[str, dict[str, Any]]:
    """Component -> its configuration, as published, or from the bundled model's files."""
    if preset.folder is not None:
        return {name: _read(preset.folder / name) for name in (*ENCODERS, "transformer", "vae")}
    encoders = (published.CLIP_L, published.CLIP_G, published.T5, published.LLAMA)
    others = {"transformer": published.TRANSFORMER, "vae": published.VAE}
    return dict(zip(ENCODERS, encoders, strict=True)) | others


def _packed(quantization: str, llama: str, fp8: bool) -> dict[str, Callable[[Layer], int | None]]:
    """See `Shapes.packed`."""
    settings, packed = Nf4(KEPT_BY_NF4), {}
    if quantization == "nf4":
        packed["transformer"] = lambda layer: nf4_bytes(layer) if settings.takes(layer.name) else None
        packed["text_encoder_3"] = lambda layer: None if layer.name.endswith(T5_KEPT) else nf4_bytes(layer)
    if fp8:
        packed["transformer"] = lambda layer: (
            fp8_bytes(layer) if takes_fp8(layer.name) and fp8_fits(layer.in_features, layer.out_features) else None
        )
    if llama != "plain":
        packed["text_encoder_4"] = gptq_bytes if llama == "gptq" else nf4_bytes
    return packed


def _unpacking(quantization: str, llama: str) -> dict[str, int]:
    """See `Shapes.unpacking`; bitsandbytes writes a weight in the arithmetic's dtype, of at most two bytes."""
    found = dict.fromkeys(("transformer", "text_encoder_3"), 2) if quantization == "nf4" else {}
    if llama != "plain":
        found["text_encoder_4"] = UNPACKING if llama == "gptq" else 2
    return found


def _file_bytes(source: ModelSource) -> int | None:
    """The size of a transformer's .gguf file, whose layers stay quantized; None for others."""
    path = Path(source.transformer) if source.transformer else None
    return path.stat().st_size if path and path.suffix == ".gguf" and path.is_file() else None


def _read(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return content
