"""Llamas in the published GPTQ-INT4 layout (format v1), packed here by the standard library alone."""

import json
import struct
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaModel

GROUP_SIZE = 16
QUANTIZATION = {
    "quant_method": "gptq",
    "bits": 4,
    "group_size": GROUP_SIZE,
    "desc_act": True,
    "sym": True,
    "checkpoint_format": "gptq",
}


def words(nibbles: list[list[int]]) -> torch.Tensor:
    """Rows of eight numbers of 4 bits, the first one lowest, as int32; by the standard library alone."""
    packed = [sum(value << (4 * place) for place, value in enumerate(row)) for row in nibbles]
    return torch.tensor([struct.unpack("<i", struct.pack("<I", word))[0] for word in packed], dtype=torch.int32)


def quantized(
    weight: torch.Tensor, group_size: int, order: torch.Tensor
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """A weight [O, I] in the layout, and the weight that the layout stands for; inputs are grouped in `order`."""
    inputs = weight.shape[1]
    group = torch.empty(inputs, dtype=torch.long)
    group[order] = torch.arange(inputs) // group_size
    scales = torch.stack([weight[:, group == g].abs().amax(1) / 7 for g in range(inputs // group_size)]).half()
    zeros = torch.randint(6, 10, scales.shape, generator=torch.Generator().manual_seed(0))
    levels = (weight.T / scales.float()[group] + zeros[group]).round().clamp(0, 15).long()
    meant = ((levels - zeros[group]) * scales.float()[group]).T
    qweight = torch.stack([words(levels[row : row + 8].T.tolist()) for row in range(0, inputs, 8)])
    qzeros = torch.stack([words((zeros[g] - 1).reshape(-1, 8).tolist()) for g in range(len(zeros))])
    return {"qweight": qweight, "qzeros": qzeros, "scales": scales, "g_idx": group.to(torch.int32)}, meant


def write_gptq(model: LlamaModel, folder: Path) -> None:
    """Write two shards with act-ordered groups and an unused head; the model becomes what the files stand for."""
    tensors = {"lm_head.weight": torch.zeros(8, model.config.hidden_size)}
    generator = torch.Generator().manual_seed(0)
    for name, value in list(model.state_dict().items()):
        parameter = model.get_parameter(name)
        if name.endswith("_proj.weight"):
            order = torch.randperm(value.shape[1], generator=generator)
            packed, meant = quantized(value.float(), GROUP_SIZE, order)
            parameter.data = meant.to(value.dtype)
            layer = name.removesuffix("weight")
            tensors |= {f"model.{layer}{part}": tensor.contiguous() for part, tensor in packed.items()}
            tensors[f"model.{layer}bias"] = torch.zeros(value.shape[0], dtype=torch.float16)
        else:
            tensors[f"model.{name}"] = value.half()
            parameter.data = value.half().to(value.dtype)
    folder.mkdir(parents=True, exist_ok=True)
    names, shards = sorted(tensors), {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"model-{number:05d}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file)
        shards |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": shards}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = model.config.to_dict() | {"architectures": ["LlamaForCausalLM"], "quantization_config": QUANTIZATION}
    (folder / "config.json").write_text(json.dumps(config))
