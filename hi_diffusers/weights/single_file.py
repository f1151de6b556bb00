"""Loads a transformer from a single file: .safetensors in any dtype, or .gguf."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from hi_diffusers.weights.put import check_complete, put_weight


def load_single_file(
    model: Any,
    path: Path,
    device: torch.device,
    dtype: torch.dtype,
    rename: Callable[[dict[str, Tensor]], dict[str, Tensor]],
) -> Any:
    """Load a transformer's weights from one file.

    Args:
        model: the transformer on the meta device; changed in place.
        path: a .safetensors file, or a .gguf file, whose quantized layers stay as they are.
        device: device of the weights.
        dtype: dtype of the arithmetic, and of weights that are not quantized.
        rename: changes the file's tensor names to the model's.

    Raises:
        ValueError: if weights are missing or another model's.
    """
    read = _read_gguf if path.suffix == ".gguf" else _read_safetensors
    tensors: dict[str, Tensor] = rename(read(path))
    if path.suffix == ".gguf":
        _take_quantized(model, tensors, dtype)
    packed = {name for name, layer in model.named_modules() if type(layer).__name__ == "GGUFLinear"}
    for name in list(tensors):
        tensor = tensors.pop(name)
        if name.removesuffix(".weight") in packed:
            put_weight(model, name, tensor.to(device), tensor.quant_shape)  # type: ignore[attr-defined]
        else:
            plain = _unpacked(tensor)
            put_weight(model, name, nn.Parameter(plain.to(device, dtype), requires_grad=False), plain.shape)
    check_complete(model, path)
    return model.eval()


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    with safe_open(path, "pt") as file:  # memory-mapped: tensors take no memory before they are used
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def _read_gguf(path: Path) -> dict[str, Tensor]:
    from diffusers.models.model_loading_utils import load_gguf_checkpoint

    try:
        tensors: dict[str, Tensor] = load_gguf_checkpoint(str(path))
    except (ValueError, LookupError) as error:
        raise ValueError(f"{path} cannot be read; is the file complete? {error}") from error
    return tensors


def _take_quantized(model: nn.Module, tensors: dict[str, Tensor], dtype: torch.dtype) -> None:
    """Replace the Linears whose weights are quantized in the file by diffusers' own."""
    from diffusers.quantizers.gguf.utils import _replace_with_gguf_linear

    _replace_with_gguf_linear(model, dtype, tensors)


def _unpacked(tensor: Tensor) -> Tensor:
    """The tensor, dequantized if the file quantizes it although it is no Linear's weight, e.g. the experts' gate."""
    if not hasattr(tensor, "quant_shape"):
        return tensor
    from diffusers.quantizers.gguf.utils import dequantize_gguf_tensor

    plain: Tensor = dequantize_gguf_tensor(tensor)
    return plain
