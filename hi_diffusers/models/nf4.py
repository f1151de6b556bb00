"""nf4: Linear layers kept as 4-bit numbers by bitsandbytes, in the published layout, on any device.

diffusers' own loader wants a GPU. This one reads the same folders, plain or already in nf4, one tensor at a time.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

# Little in bytes, much in error: docs/models.md has the figures.
KEPT = ("x_embedder", "t_embedder", "p_embedder", "caption_projection", "adaLN_modulation", "final_layer")


@dataclass(frozen=True)
class Nf4:
    """How weights are kept in nf4.

    Attributes:
        kept: modules whose names contain one of these stay as they are.
        double_quant: keep the blocks' scales in 8 bits, too.
    """

    kept: tuple[str, ...] = KEPT
    double_quant: bool = False

    @classmethod
    def from_config(cls, settings: Mapping[str, Any], folder: Path) -> "Nf4":
        """What a folder's quantization_config says.

        Raises:
            ValueError: if it is another quantization.
        """
        method, kind = settings.get("quant_method"), settings.get("bnb_4bit_quant_type")
        if (method, kind) != ("bitsandbytes", "nf4"):
            raise ValueError(f"{folder} must hold plain or nf4 weights, its config.json says {method} {kind or ''}")
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

    def takes(self, name: str, module: nn.Module) -> bool:
        """Whether a module is kept in nf4."""
        return isinstance(module, nn.Linear) and not any(kept in name for kept in self.kept)


def load_nf4(model: nn.Module, folder: Path, settings: Nf4, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Fill a model from a folder, quantizing on the way what is not in nf4 yet.

    Args:
        model: on the meta device; changed in place.
        folder: of safetensors files.
        settings: which layers, and how.
        device: where the weights go.
        dtype: of the arithmetic, and of what is not in nf4.

    Raises:
        ValueError: if weights are missing.
    """
    from bitsandbytes.nn import Linear4bit, Params4bit

    how = {"compute_dtype": dtype, "compress_statistics": settings.double_quant, "quant_type": "nf4"}
    linears: dict[str, Any] = {}
    for name, module in list(model.named_modules()):
        if settings.takes(name, module):
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
        _put(model, name, value)
    for layer, tensors in parts.items():
        data = tensors.pop(f"{layer}.weight")
        stats = {name.removeprefix(f"{layer}."): tensor.to(device) for name, tensor in tensors.items()}
        packed = Params4bit.from_prequantized(data, stats, device=device, module=linears[layer])
        _put(model, f"{layer}.weight", packed)
    missing = [name for name, value in model.named_parameters() if value.is_meta]
    if missing:
        raise ValueError(f"{folder} lacks {len(missing)} of the model's weights, among them {missing[0]}")
    return model.eval()


def save_nf4(model: Any, folder: Path, settings: Nf4) -> None:
    """Write a model that `load_nf4` made, in the layout that diffusers reads. To be called before it has drawn.

    A CPU's first forward repacks the scales in place, and they could not be read back.
    """
    model.save_pretrained(folder)
    path = folder / "config.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    content["quantization_config"] = settings.to_config(model.dtype)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _put(model: nn.Module, name: str, value: Tensor) -> None:
    owner, _, last = name.rpartition(".")
    try:
        setattr(model.get_submodule(owner), last, value)
    except AttributeError:
        raise ValueError(f"the model has no weight {name}: the file is another model's") from None


def _tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a folder, one at a time, from memory-mapped files."""
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                yield name, file.get_tensor(name)
