"""fp8: rounded once where it is a weight, and row by row where it is a token."""

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks.architecture import meta_components
from hi_diffusers import CacheConfig, SamplingOptions, generate, load_pipeline
from hi_diffusers.commands import inference
from hi_diffusers.families.hidream.shapes import takes_fp8
from hi_diffusers.families.table import PRESETS
from hi_diffusers.memory.plan import Demand, plan_memory
from hi_diffusers.pictures.metadata import read_metadata
from hi_diffusers.pictures.metrics import psnr
from hi_diffusers.request.drawing import Drawing
from hi_diffusers.request.options import SamplingOptions as Options
from hi_diffusers.weights.fp8 import Fp8Linear, fp8_bytes, multiplies_fp8, round_rows
from hi_diffusers.weights.layers import Layer

EPSILON = 2**-4  # half of e4m3's step between neighbouring numbers, relative


def test_a_row_is_rounded_to_its_own_largest_number():
    torch.manual_seed(0)
    rows = torch.randn(50, 64) * torch.logspace(-8, 8, 50)[:, None]
    packed, scale = round_rows(rows)
    assert packed.dtype == torch.float8_e4m3fn and scale.shape == (50, 1)
    near = packed.float() * scale
    large = rows.abs() > rows.abs().amax(1, keepdim=True) / 1000
    assert ((near - rows).abs() <= EPSILON * rows.abs())[large].all()
    torch.testing.assert_close(near.abs().amax(1), rows.abs().amax(1))


def test_a_row_of_zeros_stays_one():
    packed, scale = round_rows(torch.zeros(2, 16))
    assert torch.equal(packed.float() * scale, torch.zeros(2, 16))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_product_is_that_of_the_rounded_factors(dtype, bias):
    torch.manual_seed(0)
    linear = nn.Linear(48, 32, bias=bias).to(dtype)
    x = torch.randn(3, 5, 48).to(dtype)
    layer = Fp8Linear(linear)
    (rows, scale), weight = round_rows(x.flatten(0, 1)), layer.weight.float() * layer.scale
    expected = ((rows.float() * scale) @ weight.T + (linear.bias.float() if bias else 0)).unflatten(0, (3, 5))
    assert layer(x).dtype == dtype
    torch.testing.assert_close(layer(x).float(), expected, rtol=1e-2, atol=1e-2)
    error = (layer(x).float() - linear(x).float()).norm() / linear(x).float().norm()
    assert 1e-3 < error < 0.1, "nothing was rounded, or too much"


def test_blocks_are_taken_and_their_modulation_and_all_ends_are_not():
    transformer = meta_components(PRESETS["full"])["transformer"]
    taken = {name for name, module in transformer.named_modules() if isinstance(module, nn.Linear) and takes_fp8(name)}
    assert all(name.startswith(("double_stream_blocks", "single_stream_blocks")) for name in taken)
    assert not any("adaLN" in name for name in taken)
    assert any(name.endswith("attn1.to_q") for name in taken) and any(".experts.3.w2" in name for name in taken)


def test_nano_draws_nearly_the_same_and_says_so_in_its_metadata(nano_folder):
    options = SamplingOptions("a red circle on a blue background", seed=2, num_steps=20)
    plain = generate(load_pipeline("nano", device="cpu"), options, CacheConfig.off())
    rounded = generate(load_pipeline("nano", device="cpu", fp8=True), options, CacheConfig.off())
    assert rounded.metadata["model"]["fp8"] is True and "fp8" not in plain.metadata["model"]
    assert 25 < psnr(plain.pixels, rounded.pixels) < 60
    assert not np.array_equal(plain.pixels, rounded.pixels)


def test_the_memory_plan_counts_what_is_kept(nano_folder):
    pipe = load_pipeline("nano", device="cpu", fp8=True)
    layers = [module for module in pipe.transformer.modules() if isinstance(module, Fp8Linear)]

    def kept(layer):
        return fp8_bytes(Layer("", ((layer.out_features, layer.in_features),), is_linear=True))

    for layer in layers:
        assert kept(layer) == layer.weight.nbytes + layer.scale.nbytes
    own = sum(kept(layer) for layer in layers) + sum(p.nbytes for p in pipe.transformer.parameters())
    preset = PRESETS["nano"]
    drawing = Drawing(preset, Options("").resolve(preset), CacheConfig.off())
    assert plan_memory(Demand(drawing, dtype=torch.float32, fp8=True)).weights["transformer"] == own


def test_like_takes_fp8_from_the_picture(nano_folder, tmp_path, capsys):
    first, second = tmp_path / "a.png", tmp_path / "b.png"
    flags = ["a red circle", "--seed", "3", "--num_steps", "4", "--device", "cpu"]
    assert inference.main([*flags, "--fp8", "--output", str(first)]) == 0
    assert "fp8 is emulated on this cpu" in capsys.readouterr().err
    assert inference.main(["--like", str(first), "--device", "cpu", "--output", str(second)]) == 0
    assert read_metadata(second)["model"]["fp8"] is True
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize("more", [{"quantization": "nf4"}, {"loras": ("a.safetensors",)}, {"transformer": "a.gguf"}])
def test_weights_that_are_not_plain_are_refused(more, tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "hi_diffusers.families.hidream.family.locate", lambda *_, **__: pytest.fail("files were looked for first")
    )
    with pytest.raises(ValueError, match="fp8 needs plain weights"):
        load_pipeline("nano", device="cpu", model_path=tiny_folder, fp8=True, **more)


def test_a_change_of_dtype_leaves_what_is_rounded():
    """Float8 is floating point to torch: `.to(bf16)` once turned the weights and their scales into something else."""
    layer = Fp8Linear(nn.Linear(16, 16))
    weight, scale = layer.weight.clone(), layer.scale.clone()
    layer.to(torch.bfloat16)
    assert layer.weight.dtype == torch.float8_e4m3fn and layer.bias.dtype == torch.bfloat16
    assert torch.equal(layer.weight.float(), weight.float()) and torch.equal(layer.scale, scale)


def test_compiling_it_is_refused_before_weights_are_read(capsys):
    assert inference.main(["a", "--fp8", "--compile", "--device", "cpu"]) == 2
    assert "fp8 cannot be combined with compile" in capsys.readouterr().err


@pytest.mark.gpu
def test_a_card_multiplies_what_the_emulation_does():
    device = torch.device("cuda")
    if not multiplies_fp8(device):
        pytest.skip("this card has no fp8 products")
    torch.manual_seed(0)
    for dtype in (torch.bfloat16, torch.float32):
        layer, x = Fp8Linear(nn.Linear(256, 128).to(dtype)), torch.randn(2, 40, 256).to(dtype)
        torch.testing.assert_close(layer.to(device)(x.to(device)).cpu(), layer.cpu()(x), rtol=2e-2, atol=2e-2)
