"""A GPTQ-INT4 Llama: the layout as published, written by hand."""

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaModel

from hi_diffusers.families.hidream.load import load_gptq_llama
from hi_diffusers.weights.gptq import GPTQLinear
from tests.gptq_folder import words, write_gptq

CONFIG = LlamaConfig(
    vocab_size=32,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)


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


@pytest.fixture(scope="module")
def plain() -> LlamaModel:
    torch.manual_seed(0)
    return LlamaModel(CONFIG).eval()


@pytest.fixture(scope="module")
def folder(plain: LlamaModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder, of whose weights `plain` is made the expectation."""
    path = tmp_path_factory.mktemp("gptq")
    write_gptq(plain, path)
    return path


def states(model: LlamaModel) -> torch.Tensor:
    tokens = torch.arange(12, device=model.device)[None]
    with torch.no_grad():
        return torch.stack(model(tokens, output_hidden_states=True, use_cache=False).hidden_states)


def test_a_folder_gives_the_states_of_the_weights_it_stands_for(folder: Path, plain: LlamaModel) -> None:
    loaded = load_gptq_llama(folder, torch.float32)
    torch.testing.assert_close(states(loaded), states(plain), rtol=1e-4, atol=1e-5)


def test_it_computes_in_the_dtype_asked_for(folder: Path) -> None:
    fine = states(load_gptq_llama(folder, torch.float32))
    coarse = states(load_gptq_llama(folder, torch.bfloat16))
    assert coarse.dtype == torch.bfloat16
    assert (coarse.float() - fine).norm() / fine.norm() < 0.02


def test_missing_weights_are_named(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    first = sorted(folder.glob("*.safetensors"))[0]
    (tmp_path / first.name).write_bytes(first.read_bytes())
    with pytest.raises(
        ValueError, match=r"holds other GPTQ weights than the model's: missing \['\w+.*'\], unknown \[\]"
    ):
        load_gptq_llama(tmp_path, torch.float32)


def test_all_inputs_can_be_one_group() -> None:
    linear = GPTQLinear(16, 8, group_size=-1)
    linear.qweight = torch.stack([words([[9] * 8] * 8), words([[7] * 8] * 8)])
    linear.qzeros = words([[7] * 8])[None]
    linear.scales = torch.full((1, 8), 0.5, dtype=torch.float16)
    assert linear.dequantize(torch.float32).tolist() == [[0.5] * 8 + [-0.5] * 8] * 8


def test_gptqmodels_kernels_agree_within_a_percent(folder: Path) -> None:
    """Needs an environment with gptqmodel and optimum, which pin a torch of their own."""
    pytest.importorskip("gptqmodel")
    pytest.importorskip("optimum")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    theirs = LlamaModel.from_pretrained(folder, dtype=torch.float16, device_map={"": device})
    ours = load_gptq_llama(folder, torch.float32)
    found, expected = states(theirs.to(device)).float().cpu(), states(ours)
    assert float((found - expected).norm() / expected.norm()) < 0.01
