"""Loads a transformer from a single file: .safetensors in any dtype, or .gguf."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from hi_diffusers.weights.headers import safetensors_header
from hi_diffusers.weights.put import check_complete, put_weight
from hi_diffusers.weights.scaled import bare, read_weight, stored_weights


def load_single_file(model: Any, path: Path, device: torch.device, dtype: torch.dtype) -> Any:
    """Load a transformer's weights from one file.

    Args:
        model: the transformer on the meta device; changed in place.
        path: a .safetensors file, or a .gguf file, whose quantized layers stay as they are.
        device: device of the weights.
        dtype: dtype of the arithmetic, and of weights that are not quantized.

    Raises:
        ValueError: if weights are missing or another model's.
    """
    tensors = _gguf_weights(model, path, dtype) if path.suffix == ".gguf" else _safetensors_weights(path)
    packed = {name for name, layer in model.named_modules() if type(layer).__name__ == "GGUFLinear"}
    for name, tensor in tensors:
        if name.removesuffix(".weight") in packed:
            put_weight(model, name, tensor.to(device), tensor.quant_shape)  # type: ignore[attr-defined]
        else:
            plain = _unpacked(tensor)
            put_weight(model, name, nn.Parameter(plain.to(device, dtype), requires_grad=False), plain.shape)
    check_complete(model, path)
    return model.eval()


def _safetensors_weights(path: Path) -> Iterator[tuple[str, Tensor]]:
    stored = stored_weights(path, safetensors_header(path))
    with safe_open(path, "pt") as file:  # memory-mapped: tensors take no memory before they are used
        for name, one in stored.items():
            yield name, read_weight(file, one)


def _gguf_weights(model: nn.Module, path: Path, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Read a file, and replace the model's Linears whose weights it quantizes by diffusers' own."""
    from diffusers.models.model_loading_utils import load_gguf_checkpoint
    from diffusers.quantizers.gguf.utils import _replace_with_gguf_linear

    try:
        tensors = {bare(name): tensor for name, tensor in load_gguf_checkpoint(str(path)).items()}
    except (ValueError, LookupError) as error:
        raise ValueError(f"{path} cannot be read; is the file complete? {error}") from error
    _replace_with_gguf_linear(model, dtype, tensors)
    return iter(tensors.items())


def _unpacked(tensor: Tensor) -> Tensor:
    """The tensor, dequantized if the file quantizes it although it is no Linear's weight, e.g. the experts' gate."""
    if not hasattr(tensor, "quant_shape"):
        return tensor
    from diffusers.quantizers.gguf.utils import dequantize_gguf_tensor

    plain: Tensor = dequantize_gguf_tensor(tensor)
    return plain
