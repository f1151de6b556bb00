"""A LoRA of random numbers."""

from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file


def write_lora(model: Path, path: Path, size: float = 1 / 8) -> None:
    """Write a LoRA of rank 2 on all image queries of a model folder, in diffusers' layout."""
    generator, tensors = torch.Generator().manual_seed(0), {}
    for part in sorted((model / "transformer").glob("*.safetensors")):
        with safe_open(part, "pt") as file:
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
        for name, (outputs, inputs) in ((name, shape) for name, shape in shapes.items() if len(shape) == 2):
            if name.endswith("attn1.to_q.weight"):
                layer = f"transformer.{name.removesuffix('.weight')}"
                tensors[f"{layer}.lora_A.weight"] = torch.randn(2, inputs, generator=generator) * size
                tensors[f"{layer}.lora_B.weight"] = torch.randn(outputs, 2, generator=generator) * size
    save_file(tensors, path)
