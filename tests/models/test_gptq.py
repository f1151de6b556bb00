"""A GPTQ-INT4 Llama: the layout as published, written here by hand."""

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaModel

from hi_diffusers.models.gptq import GPTQLinear, load_gptq_llama

QUANTIZATION = {
    "quant_method": "gptq",
    "bits": 4,
    "group_size": 16,
    "desc_act": True,
    "sym": True,
    "checkpoint_format": "gptq",
}
CONFIG = LlamaConfig(
    vocab_size=32,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)


def words(nibbles: list[list[int]]) -> torch.Tensor:
    """Rows of eight numbers of 4 bits, the first one lowest, as int32; by the standard library alone."""
    packed = [sum(value << (4 * place) for place, value in enumerate(row)) for row in nibbles]
    return torch.tensor([struct.unpack("<i", struct.pack("<I", word))[0] for word in packed], dtype=torch.int32)


def test_literal_integers_give_the_weight_of_the_formula() -> None:
    linear = GPTQLinear(8, 8, group_size=4)
    # output 0 has the levels 0..7 for inputs 0..7, all other outputs level 15
    linear.qweight = words([list(range(8)), *[[15] * 8] * 7])[None]
    # zeros: group 0 has 8 (stored 7) everywhere, group 1 has 3 (stored 2), and 0 (stored 15) for the last output
    linear.qzeros = torch.stack([words([[7] * 8]), words([[2] * 7 + [15]])])
    linear.scales = torch.tensor([[0.5] * 8, [2.0] * 8], dtype=torch.float16)
    linear.g_idx = torch.tensor([0, 1, 0, 1, 0, 1, 0, 1], dtype=torch.int32)
    weight = linear.dequantize(torch.float32)
    assert weight.shape == (8, 8)
    assert weight[0].tolist() == [-4.0, -4.0, -3.0, 0.0, -2.0, 4.0, -1.0, 8.0]
    assert weight[1].tolist() == [3.5, 24.0] * 4
    assert weight[7].tolist() == [3.5, 30.0] * 4
    assert torch.equal(linear(torch.eye(8)), weight.T)


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


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sharded GPTQ folder with a head, act-ordered groups and its expectation in expected.pt."""
    torch.manual_seed(0)
    plain = LlamaModel(CONFIG).eval()
    tensors, path = {"lm_head.weight": torch.zeros(32, 64)}, tmp_path_factory.mktemp("gptq")
    for name, value in list(plain.state_dict().items()):
        if name.endswith("_proj.weight"):
            order = torch.randperm(value.shape[1])
            packed, meant = quantized(value, QUANTIZATION["group_size"], order)
            plain.get_parameter(name).data = meant
            layer = name.removesuffix("weight")
            tensors |= {f"model.{layer}{part}": tensor.contiguous() for part, tensor in packed.items()}
            tensors[f"model.{layer}bias"] = torch.zeros(value.shape[0], dtype=torch.float16)
        else:
            tensors[f"model.{name}"] = value.half()
            plain.get_parameter(name).data = value.half().float()
    names = sorted(tensors)
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        save_file({name: tensors[name] for name in part}, path / f"model-{number:05d}-of-00002.safetensors")
    config = CONFIG.to_dict() | {"architectures": ["LlamaForCausalLM"], "quantization_config": QUANTIZATION}
    (path / "config.json").write_text(json.dumps(config))
    torch.save(plain.state_dict(), path / "expected.pt")
    return path


def states(model: LlamaModel) -> torch.Tensor:
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        return torch.stack(model(tokens, output_hidden_states=True, use_cache=False).hidden_states)


def test_a_folder_gives_the_states_of_the_weights_it_stands_for(folder: Path) -> None:
    plain = LlamaModel(CONFIG).eval()
    plain.load_state_dict(torch.load(folder / "expected.pt", weights_only=True))
    loaded = load_gptq_llama(folder, torch.float32)
    torch.testing.assert_close(states(loaded), states(plain), rtol=1e-4, atol=1e-5)


def test_it_computes_in_the_dtype_asked_for(folder: Path) -> None:
    fine = states(load_gptq_llama(folder, torch.float32))
    coarse = states(load_gptq_llama(folder, torch.bfloat16))
    assert coarse.dtype == torch.bfloat16
    assert (coarse.float() - fine).norm() / fine.norm() < 0.02


@pytest.mark.parametrize(
    ("change", "found"),
    [({"bits": 8}, "'bits': 8"), ({"checkpoint_format": "gptq_v2"}, "gptq_v2"), ({"quant_method": "awq"}, "awq")],
)
def test_another_format_is_refused(folder: Path, tmp_path: Path, change: dict[str, object], found: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="must hold GPTQ weights of 4 bits in format v1") as refusal:
        load_gptq_llama(tmp_path, torch.float32)
    assert found in str(refusal.value)


def test_missing_weights_are_named(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    first = sorted(folder.glob("*.safetensors"))[0]
    (tmp_path / first.name).write_bytes(first.read_bytes())
    with pytest.raises(ValueError, match="holds no GPTQ Llama: missing"):
        load_gptq_llama(tmp_path, torch.float32)
