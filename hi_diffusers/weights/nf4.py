"""nf4: Linear layers kept as 4-bit numbers by bitsandbytes, in the published layout, on any device.

diffusers' own loader needs a GPU. This one reads the same folders, plain or already in nf4, one tensor at a time.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from hi_diffusers.weights.layers import Layer
from hi_diffusers.weights.put import check_complete, put_weight

NF4_BLOCK = 64  # numbers that share a scale of 4 bytes


@dataclass(frozen=True)
class Nf4:
    """How weights are kept in nf4.

    Attributes:
        kept: modules whose names contain one of these stay as they are.
        double_quant: whether the blocks' scales are kept in 8 bits, too.
    """

    kept: tuple[str, ...]
    double_quant: bool = False

    @classmethod
    def from_config(cls, settings: Mapping[str, Any]) -> "Nf4":
        """The settings in a folder's quantization_config, which must be nf4's."""
        return cls(tuple(settings.get("llm_int8_skip_modules") or ()), bool(settings.get("bnb_4bit_use_double_quant")))

    def to_config(self, compute_dtype: torch.dtype) -> dict[str, Any]:
        """The quantization_config that diffusers reads."""
        return {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "load_in_8bit": False,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": self.double_quant,
            "bnb_4bit_compute_dtype": str(compute_dtype).removeprefix("torch."),
            "bnb_4bit_quant_storage": "uint8",
            "llm_int8_skip_modules": list(self.kept),
        }

    def takes(self, name: str) -> bool:
        """Whether a Linear of that name is kept in nf4."""
        return not any(kept in name for kept in self.kept)


def nf4_bytes(layer: Layer) -> int:
    """Bytes of a Linear's weight in nf4: half a byte per number, and its blocks' scales."""
    numbers = layer.in_features * layer.out_features
    return -(-numbers // 2) + -(-numbers // NF4_BLOCK) * 4


def load_nf4(model: Any, folder: Path, settings: Nf4, device: torch.device, dtype: torch.dtype) -> Any:
    """Load a model's weights from a folder, and quantize those that are not in nf4 yet.

    Args:
        model: a diffusers model on the meta device; changed in place.
        folder: folder of safetensors files.
        settings: which layers are in nf4, and how.
        device: device of the weights.
        dtype: dtype of the arithmetic, and of weights that are not in nf4.

    Raises:
        ValueError: if weights are missing.
    """
    from bitsandbytes.nn import Linear4bit, Params4bit

    how = {"compute_dtype": dtype, "compress_statistics": settings.double_quant, "quant_type": "nf4"}
    linears: dict[str, Any] = {}
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and settings.takes(name):
            with torch.device("meta"):
                linears[name] = Linear4bit(module.in_features, module.out_features, module.bias is not None, **how)
            model.set_submodule(name, linears[name])
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in _tensors(folder):
        layer, dot, part = name.partition(".weight")
        if layer in linears and dot and (part or tensor.dtype == torch.uint8):
            parts.setdefault(layer, {})[name] = tensor
            continue
        if layer in linears and dot:
            plain = Params4bit(
                tensor.to(dtype),
                requires_grad=False,
                quant_type="nf4",
                compress_statistics=settings.double_quant,
                module=linears[layer],
            )
            value: Tensor = plain.to(device)
        else:
            value = nn.Parameter(tensor.to(device, dtype), requires_grad=False)
        put_weight(model, name, value, tensor.shape)
    for layer, tensors in parts.items():
        data = tensors.pop(f"{layer}.weight", None)
        if data is None or not tensors:
            raise ValueError(f"{folder} is incomplete: it holds only a part of {layer}'s nf4 weight")
        stats = {name.removeprefix(f"{layer}."): tensor.to(device) for name, tensor in tensors.items()}
        packed = Params4bit.from_prequantized(data, stats, device=device, module=linears[layer])
        shape = (linears[layer].out_features, linears[layer].in_features)
        if packed.quant_state.shape != shape:
            raise ValueError(f"{folder} holds a weight {layer} of shape {tuple(packed.quant_state.shape)}, not {shape}")
        linears[layer].weight = packed
    model.register_to_config(quantization_config=settings.to_config(dtype))  # written into a saved folder
    check_complete(model, folder)
    return model.eval()


def check_unused(model: nn.Module) -> None:
    """Raise ValueError if a model has drawn on a CPU: that repacks the scales, and they could not be read back.

    Raises:
        ValueError: if it has.
    """
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        if state is not None and state.absmax.dtype not in (torch.float32, torch.uint8):
            raise ValueError("a model in nf4 must be saved before it has drawn on a CPU: load it again")


def _tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a folder, one at a time, from memory-mapped files."""
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                yield name, file.get_tensor(name)
