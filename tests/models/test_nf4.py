"""Weights in nf4: folders written by diffusers and bitsandbytes, read here on a CPU."""

import json
from pathlib import Path

import diffusers
import pytest
import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hi_diffusers.families.hidream.shapes import KEPT_BY_NF4 as KEPT
from hi_diffusers.families.hidream.transformer import HiDreamImageTransformer2DModel
from hi_diffusers.weights.nf4 import Nf4, check_unused, load_nf4
from tests.tiny import Inputs, randomize
from tests.tiny_folder import TRANSFORMER

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    stock = diffusers.HiDreamImageTransformer2DModel(**TRANSFORMER)
    randomize(stock)
    folder = tmp_path_factory.mktemp("plain")
    stock.save_pretrained(folder)
    return folder


def write_published(plain: Path, folder: Path, settings: Nf4) -> Path:
    """The folder as bitsandbytes and stock diffusers write it, without our reader's or writer's help."""
    stock = diffusers.HiDreamImageTransformer2DModel.from_pretrained(plain)
    for name, linear in list(stock.named_modules()):
        if isinstance(linear, nn.Linear) and not any(part in name for part in settings.kept):
            packed = Linear4bit(
                linear.in_features,
                linear.out_features,
                bias=linear.bias is not None,
                quant_type="nf4",
                compress_statistics=settings.double_quant,
            )
            packed.weight = Params4bit(
                linear.weight.data,
                requires_grad=False,
                quant_type="nf4",
                compress_statistics=settings.double_quant,
                module=packed,
            )
            packed.bias = linear.bias
            stock.set_submodule(name, packed.to("cpu"))
    stock.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": settings.double_quant,
        "llm_int8_skip_modules": list(settings.kept),
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def read(folder: Path, settings: Nf4) -> HiDreamImageTransformer2DModel:
    with torch.device("meta"):
        model = HiDreamImageTransformer2DModel.from_config(HiDreamImageTransformer2DModel.load_config(folder))
    return load_nf4(model, folder, settings, CPU, torch.float32)


def outputs(model: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(1)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    inputs = Inputs(
        noise(2, 4, 16, 16), torch.tensor([900.0, 300.0]), noise(2, 8, 64), noise(4, 2, 8, 64), noise(2, 128)
    )
    with torch.no_grad():
        return model(*inputs.positional, return_dict=False)[0]


@pytest.mark.parametrize("double_quant", [False, True])
def test_a_published_folder_draws_what_the_plain_one_does_when_quantized_on_loading(
    plain: Path, tmp_path: Path, double_quant: bool
) -> None:
    settings = Nf4(KEPT, double_quant=double_quant)
    published = write_published(plain, tmp_path, settings)
    stated = json.loads((published / "config.json").read_text())["quantization_config"]
    assert Nf4.from_config(stated) == settings
    torch.testing.assert_close(outputs(read(published, settings)), outputs(read(plain, settings)))


def test_what_is_kept_and_what_is_not(plain: Path) -> None:
    model = read(plain, Nf4(KEPT))
    kinds = {name: type(module) for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert {kind for name, kind in kinds.items() if any(part in name for part in KEPT)} == {nn.Linear}
    assert {kind for name, kind in kinds.items() if not any(part in name for part in KEPT)} == {Linear4bit}
    assert all(parameter.dtype in (torch.float32, torch.uint8) for parameter in model.parameters())


def test_the_error_is_that_of_four_bits(plain: Path) -> None:
    exact = outputs(HiDreamImageTransformer2DModel.from_pretrained(plain))
    error = (outputs(read(plain, Nf4(KEPT))) - exact).norm() / exact.norm()
    assert 0.001 < error < 0.2


@pytest.mark.parametrize("double_quant", [False, True])
def test_a_saved_folder_is_read_back_bit_by_bit(plain: Path, tmp_path: Path, double_quant: bool) -> None:
    settings = Nf4(KEPT, double_quant=double_quant)
    model = read(plain, settings)
    model.save_pretrained(tmp_path)
    stated = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert Nf4.from_config(stated) == settings
    check_unused(model)
    again = read(tmp_path, settings)
    for name, value in model.named_parameters():
        assert torch.equal(again.get_parameter(name), value), name
    assert torch.equal(outputs(again), outputs(model))


def test_missing_and_foreign_weights_are_named(plain: Path, tmp_path: Path) -> None:
    state = load_file(plain / "diffusion_pytorch_model.safetensors")
    name = "double_stream_blocks.0.block.attn1.to_q.weight"
    (tmp_path / "config.json").write_text((plain / "config.json").read_text())
    save_file({key: value for key, value in state.items() if key != name}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="lacks 1 of the model's weights") as refusal:
        read(tmp_path, Nf4(KEPT))
    assert name in str(refusal.value)
    save_file(state | {"another.weight": torch.zeros(2)}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"no weight another\.weight"):
        read(tmp_path, Nf4(KEPT))


def test_a_weight_of_another_shape_and_half_a_packed_one_are_refused(plain: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((plain / "config.json").read_text())
    state = load_file(plain / "diffusion_pytorch_model.safetensors")
    kept = "caption_projection.0.linear.weight"
    save_file(state | {kept: torch.zeros(2, 3)}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"has shape \(2, 3\), not"):
        read(tmp_path, Nf4(KEPT))
    published = write_published(plain, tmp_path / "nf4", Nf4(KEPT))
    packed = load_file(published / "diffusion_pytorch_model.safetensors")
    layer = "double_stream_blocks.0.block.attn1.to_q"
    del packed[f"{layer}.weight"]
    save_file(packed, published / "diffusion_pytorch_model.safetensors")
    with pytest.raises(ValueError, match=f"holds only a part of {layer}'s nf4 weight"):
        read(published, Nf4(KEPT))
