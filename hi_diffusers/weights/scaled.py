"""Names of a transformer's weights in a single file, and ComfyUI's fp8 weights with a scale (files named fp8_scaled).

    LAYER . weight                         [out, in] in e4m3 or e5m2
    LAYER . scale_weight | weight_scale    one number, or one per row, that the weight is multiplied by
    LAYER . scale_input | input_scale      scale of the tokens in ComfyUI's fp8 product; not needed here
    LAYER . comfy_quant                    JSON in bytes: {"format": "float8_e4m3fn"}
    scaled_fp8                             marks the file

All names may have one of PREFIXES.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import safe_open
from torch import Tensor

PREFIXES = ("model.diffusion_model.", "diffusion_model.", "transformer.")
SCALES = (".scale_weight", ".weight_scale")
INPUT_SCALES = (".scale_input", ".input_scale")
FORMAT, MARKER = ".comfy_quant", "scaled_fp8"
FORMATS = ("float8_e4m3fn", "float8_e5m2")


class Stored(NamedTuple):
    """Where a file has a weight.

    Attributes:
        weight: name of its tensor.
        scale: name of its scale's tensor; None: it has none.
    """

    weight: str
    scale: str | None


def bare(name: str) -> str:
    """A tensor's name in the transformer, without the prefix that it has in the file."""
    return next((name.removeprefix(prefix) for prefix in PREFIXES if name.startswith(prefix)), name)


def stored_weights(path: Path, header: Mapping[str, Any]) -> dict[str, Stored]:
    """Name of each weight -> where a safetensors file has it.

    Args:
        header: the file's header.

    Raises:
        ValueError: naming a weight that is stored in another format, or whose scale is missing or does not fit.
    """
    names = {bare(name): name for name in header}
    if len(names) < len(header):
        raise ValueError(f"{path} has two tensors for the same weight, with different prefixes: keep one of them")
    scales = {name.removesuffix(end) + ".weight": names[name] for name in names for end in SCALES if name.endswith(end)}
    besides = (*SCALES, *INPUT_SCALES, FORMAT)
    weights = {name: Stored(own, scales.pop(name, None)) for name, own in names.items() if not name.endswith(besides)}
    weights.pop(MARKER, None)
    if scales:
        raise ValueError(f"{path} lacks the weight {next(iter(scales))}, whose scale it has")
    is_scaled = any(stored.scale for stored in weights.values()) or MARKER in names
    for name, stored in weights.items():
        entry = header[stored.weight]
        if stored.scale is None:
            if is_scaled and entry["dtype"].startswith("F8"):
                raise ValueError(f"{path} lacks the scale of {name}")
        elif header[stored.scale]["shape"] not in ([], [1], [1, 1], *_by_row(entry["shape"])):
            raise ValueError(f"{path}: the scale of {name} has shape {header[stored.scale]['shape']}: not one per row")
    _check_formats(path, names)
    return weights


def read_weight(file: Any, stored: Stored) -> Tensor:
    """Read a weight from an open safetensors file; with a scale it is multiplied in fp32.

    Raises:
        ValueError: if the scale is not a finite number.
    """
    weight: Tensor = file.get_tensor(stored.weight)
    if stored.scale is None:
        return weight
    scale: Tensor = file.get_tensor(stored.scale).float()
    if not bool(scale.isfinite().all()):
        raise ValueError(f"the scale {stored.scale} is not a finite number")
    return weight.float() * scale.reshape(-1, *[1] * (weight.dim() - 1))


def _by_row(shape: list[int]) -> list[list[int]]:
    return [[shape[0]], [shape[0], *[1] * (len(shape) - 1)]] if shape else []


def _check_formats(path: Path, names: Mapping[str, str]) -> None:
    """Raise ValueError if a layer's stated format is not fp8."""
    with safe_open(path, "pt") as file:
        texts = {name: bytes(file.get_tensor(own).tolist()) for name, own in names.items() if name.endswith(FORMAT)}
        listed = (file.metadata() or {}).get("_quantization_metadata", "{}")
    try:
        formats: dict[str, Any] = {name.removesuffix(FORMAT): json.loads(text) for name, text in texts.items()}
        formats |= json.loads(listed).get("layers", {})
        stated: dict[str, dict[str, Any]] = {
            layer: {"format": None, "convrot": False} | dict(one) for layer, one in formats.items()
        }
    except (ValueError, TypeError, AttributeError, RecursionError):
        raise ValueError(f"{path} does not say legibly how its weights are quantized") from None
    for layer, one in stated.items():
        if one["format"] not in FORMATS or one["convrot"]:
            raise ValueError(
                f"{path}: {bare(layer)} has the format {str(one['format'])[:40]}: only {' and '.join(FORMATS)} are read"
            )
