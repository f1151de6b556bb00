"""LoRA files (arXiv 2106.09685) of all common trainers; every tensor is either used or reported.

    PREFIX LAYER . lora_A.weight | lora_down.weight        [r, in]
    PREFIX LAYER . lora_B.weight | lora_up.weight          [out, r]
    PREFIX LAYER . alpha                                   a number: the product is scaled by alpha / r

PREFIX is diffusers', PEFT's, ComfyUI's or kohya's; kohya's layer names have underscores instead of dots.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from hi_diffusers.weights.headers import safetensors_header

PREFIXES = (
    "base_model.model.",
    "model.diffusion_model.",
    "diffusion_model.",
    "transformer.",
    "lora_unet_",
    "lora_transformer_",
    "lycoris_",
)
DOWN = ("lora_A.weight", "lora_A.default.weight", "lora_down.weight", "lora.down.weight")
UP = ("lora_B.weight", "lora_B.default.weight", "lora_up.weight", "lora.up.weight")
PARTS = {**dict.fromkeys(DOWN, "down"), **dict.fromkeys(UP, "up"), "alpha": "alpha"}
OTHER_KINDS = {
    "dora_scale": "DoRA",
    "lora_magnitude_vector": "DoRA",
    "lokr_w1": "LoKr",
    "lokr_w2": "LoKr",
    "lokr_t2": "LoKr",
    "hada_w1": "LoHa",
    "hada_w2": "LoHa",
    "oft_blocks": "OFT",
    "lora_mid": "LoCon",
}
METADATA = "lora_adapter_metadata"  # diffusers' record of PEFT's settings


@dataclass(frozen=True)
class LoraNames:
    """The names of a file's tensors, sorted by layer.

    Attributes:
        layers: layer of the transformer -> part ("down", "up", "alpha") -> name of the tensor.
        others: names of tensors that do not belong to the transformer.
    """

    layers: Mapping[str, Mapping[str, str]]
    others: tuple[str, ...]


def check_lora(path: Path, wanted: Mapping[str, Sequence[int]]) -> LoraNames:
    """Read a file's names and shapes, and check that they can be added to a transformer.

    Args:
        path: a .safetensors file.
        wanted: name -> shape of every weight of the transformer.

    Raises:
        ValueError: naming the layer, or the kind of the file.
    """
    header = safetensors_header(path)
    kind = next((kind for name in header for mark, kind in OTHER_KINDS.items() if mark in name), None)
    if kind is not None:
        raise ValueError(f"lora {path} is a {kind}, which is not supported: convert it to a plain LoRA")
    found = _sort(header, [name.removesuffix(".weight") for name in wanted if name.endswith(".weight")])
    if not found.layers:
        raise ValueError(
            f"lora {path} does not fit this transformer: none of its tensors is named as one of the transformer's"
            " layers, such as transformer.LAYER.lora_A.weight"
        )
    for layer, parts in found.layers.items():
        if not {"down", "up"} <= set(parts):
            raise ValueError(f"lora {path} is incomplete: {layer} lacks its {'up' if 'down' in parts else 'down'} part")
        down, up = (header[parts[part]]["shape"] for part in ("down", "up"))
        outputs, inputs = wanted[f"{layer}.weight"]
        if len(down) != 2 or len(up) != 2 or (down[1], up[0], up[1]) != (inputs, outputs, down[0]):
            raise ValueError(
                f"lora {path} does not fit this transformer: {layer} has {inputs} inputs and {outputs} outputs, but"
                f" the file's parts have shapes {down} and {up}"
            )
    return found


def read_lora(path: Path, names: LoraNames) -> dict[str, Tensor]:
    """Read a file's tensors in diffusers' layout, with alpha / r multiplied into the up part.

    Args:
        names: the result of `check_lora`.
    """
    with safe_open(path, "pt") as file:
        settings = _settings(file.metadata() or {})
        tensors: dict[str, Tensor] = {}
        for layer, parts in names.layers.items():
            down, up = file.get_tensor(parts["down"]), file.get_tensor(parts["up"])
            alpha = float(file.get_tensor(parts["alpha"])) if "alpha" in parts else _alpha(settings, layer)
            if alpha is not None and alpha != len(down):
                up = (up.float() * (alpha / len(down))).to(up.dtype)
            tensors[f"transformer.{layer}.lora_A.weight"] = down
            tensors[f"transformer.{layer}.lora_B.weight"] = up
    if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values()):
        raise ValueError(f"lora {path} holds NaN or infinity")
    return tensors


def _sort(names: Iterable[str], layers: Sequence[str]) -> LoraNames:
    known = {layer: layer for layer in layers} | {layer.replace(".", "_"): layer for layer in layers}
    found: dict[str, dict[str, str]] = {}
    others = []
    for name in names:
        end = next((end for end in PARTS if name.endswith(f".{end}")), None)
        layer = None if end is None else _layer(name.removesuffix(f".{end}"), known)
        if layer is None:
            others.append(name)
        else:
            found.setdefault(layer, {})[PARTS[str(end)]] = name
    return LoraNames(found, tuple(others))


def _layer(stem: str, known: Mapping[str, str]) -> str | None:
    while stem not in known:
        prefix = next((prefix for prefix in PREFIXES if stem.startswith(prefix)), None)
        if prefix is None:
            return None
        stem = stem.removeprefix(prefix)
    return known[stem]


def _settings(metadata: Mapping[str, str]) -> dict[str, Any]:
    """PEFT's settings if diffusers wrote them into the file, else an empty dictionary."""
    try:
        content = json.loads(metadata.get(METADATA, "{}"))
    except (ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _alpha(settings: Mapping[str, Any], layer: str) -> float | None:
    pattern = settings.get("transformer.alpha_pattern")
    own = pattern.get(layer) if isinstance(pattern, dict) else None
    found = own if own is not None else settings.get("transformer.lora_alpha")
    return float(found) if isinstance(found, int | float) else None
