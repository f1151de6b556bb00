"""LoRA files of every trainer add the same product; other kinds are refused, and nothing is left out unsaid."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hi_diffusers import load_pipeline
from hi_diffusers.commands import inference
from hi_diffusers.families.hidream.files import transformer_shapes
from hi_diffusers.weights.lora import check_lora, read_lora

PROMPT = "a red circle on a blue background"
LAYERS = ("double_stream_blocks.0.block.attn1.to_q", "single_stream_blocks.1.block.ff_i.experts.0.w1")
RANK = 3


@pytest.fixture(scope="module")
def wanted(nano_folder: Path) -> dict[str, tuple[int, ...]]:
    return transformer_shapes(nano_folder)


@pytest.fixture(scope="module")
def parts(wanted: dict[str, tuple[int, ...]]) -> dict[str, tuple[Tensor, Tensor]]:
    """Layer -> down and up."""
    torch.manual_seed(0)
    return {
        layer: (torch.randn(RANK, wanted[f"{layer}.weight"][1]), torch.randn(wanted[f"{layer}.weight"][0], RANK))
        for layer in LAYERS
    }


Names = Callable[[str], str]
LAYOUTS: dict[str, tuple[Names, str, str]] = {
    "diffusers": (lambda layer: f"transformer.{layer}", "lora_A.weight", "lora_B.weight"),
    "ComfyUI": (lambda layer: f"diffusion_model.{layer}", "lora_A.weight", "lora_B.weight"),
    "ai-toolkit": (lambda layer: f"model.diffusion_model.{layer}", "lora_down.weight", "lora_up.weight"),
    "PEFT": (lambda layer: f"base_model.model.{layer}", "lora_A.default.weight", "lora_B.default.weight"),
    "PEFT in diffusers": (lambda layer: f"base_model.model.transformer.{layer}", "lora_A.weight", "lora_B.weight"),
    "kohya": (lambda layer: f"lora_unet_{layer.replace('.', '_')}", "lora_down.weight", "lora_up.weight"),
    "LyCORIS": (lambda layer: f"lycoris_{layer.replace('.', '_')}", "lora_down.weight", "lora_up.weight"),
    "no prefix": (lambda layer: layer, "lora.down.weight", "lora.up.weight"),
}


def write(
    path: Path, parts: dict[str, tuple[Tensor, Tensor]], layout: str, alpha: float | None = None, **more: Tensor
) -> Path:
    named, down, up = LAYOUTS[layout]
    tensors = {
        f"{named(layer)}.{end}": part
        for layer, pair in parts.items()
        for end, part in zip((down, up), pair, strict=True)
    }
    if alpha is not None:
        tensors |= {f"{named(layer)}.alpha": torch.tensor(alpha) for layer in parts}
    save_file(tensors | more, path)
    return path


@pytest.mark.parametrize("alpha", [None, 1.5, float(RANK)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_the_same_product(
    layout: str,
    alpha: float | None,
    parts: dict[str, tuple[Tensor, Tensor]],
    wanted: dict[str, tuple[int, ...]],
    tmp_path: Path,
) -> None:
    path = write(tmp_path / "a.safetensors", parts, layout, alpha)
    names = check_lora(path, wanted)
    assert names.others == ()
    found = read_lora(path, names)
    for layer, (down, up) in parts.items():
        product = found[f"transformer.{layer}.lora_B.weight"] @ found[f"transformer.{layer}.lora_A.weight"]
        torch.testing.assert_close(product, (alpha or RANK) / RANK * up @ down)


def test_diffusers_record_of_peft_s_alpha_counts(
    parts: dict[str, tuple[Tensor, Tensor]], wanted: dict[str, tuple[int, ...]], tmp_path: Path
) -> None:
    path = write(tmp_path / "a.safetensors", parts, "diffusers")
    settings = {"transformer.r": RANK, "transformer.lora_alpha": 6, "transformer.alpha_pattern": {LAYERS[1]: 1.5}}
    save_file(load_file(path), path, {"lora_adapter_metadata": json.dumps(settings)})
    found = read_lora(path, check_lora(path, wanted))
    for layer, factor in zip(LAYERS, (2.0, 0.5), strict=True):
        torch.testing.assert_close(found[f"transformer.{layer}.lora_B.weight"], factor * parts[layer][1])


def test_what_is_added_is_what_is_read(
    parts: dict[str, tuple[Tensor, Tensor]], nano_folder: Path, tmp_path: Path
) -> None:
    plain = load_pipeline("nano", device="cpu", parts="drawing").transformer
    path = write(tmp_path / "a.safetensors", parts, "kohya", alpha=1.5)
    changed = load_pipeline("nano", device="cpu", parts="drawing", loras=[f"{path}:0.5"]).transformer
    for layer, (down, up) in parts.items():
        x = torch.randn(2, down.shape[1])
        difference = changed.get_submodule(layer)(x) - plain.get_submodule(layer)(x)
        torch.testing.assert_close(difference, 0.25 * x @ down.T @ up.T, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("diffusion_model.x.dora_scale", "DoRA"),
        ("transformer.x.lora_magnitude_vector.weight", "DoRA"),
        ("lycoris_x.lokr_w1", "LoKr"),
        ("lycoris_x.lokr_w2_a", "LoKr"),
        ("lycoris_x.hada_w1_a", "LoHa"),
        ("lycoris_x.oft_blocks", "OFT"),
    ],
)
def test_another_kind_of_file_is_refused_by_its_name(
    name: str,
    kind: str,
    parts: dict[str, tuple[Tensor, Tensor]],
    nano_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = write(tmp_path / "a.safetensors", parts, "ComfyUI", **{name: torch.ones(2)})
    assert inference.main([PROMPT, "--device", "cpu", "--lora", str(path), "-o", str(tmp_path / "a.png")]) == 2
    assert f"{path} is a {kind}, which is not supported" in capsys.readouterr().err


@pytest.mark.parametrize("missing", ["lora_A.weight", "lora_B.weight"])
def test_a_layer_with_one_part_is_refused(
    missing: str, parts: dict[str, tuple[Tensor, Tensor]], wanted: dict[str, tuple[int, ...]], tmp_path: Path
) -> None:
    path = write(tmp_path / "a.safetensors", parts, "diffusers")
    tensors = load_file(path)
    del tensors[f"transformer.{LAYERS[0]}.{missing}"]
    save_file(tensors, path)
    with pytest.raises(ValueError, match=rf"is incomplete: {LAYERS[0]} lacks its (up|down) part"):
        check_lora(path, wanted)


@pytest.mark.parametrize("name", ["lora_te1_text_model_x.lora_up.weight", "transformer.another.lora_A.weight", "steps"])
def test_tensors_that_are_not_the_transformer_s_are_counted(
    name: str,
    parts: dict[str, tuple[Tensor, Tensor]],
    nano_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = write(tmp_path / "a.safetensors", parts, "diffusers", **{name: torch.ones(2, 2)})
    argv = [PROMPT, "--device", "cpu", "--num_steps", "2", "--lora", str(path), "-o", str(tmp_path / "a.png")]
    assert inference.main(argv) == 0
    assert (
        f"1 of its 5 tensors do not belong to the transformer and are not used, such as {name}"
        in capsys.readouterr().err
    )


def test_numbers_that_are_none_are_refused(
    parts: dict[str, tuple[Tensor, Tensor]], wanted: dict[str, tuple[int, ...]], tmp_path: Path
) -> None:
    broken = parts | {LAYERS[0]: (parts[LAYERS[0]][0] / 0, parts[LAYERS[0]][1])}
    path = write(tmp_path / "a.safetensors", broken, "diffusers")
    with pytest.raises(ValueError, match="holds NaN or infinity"):
        read_lora(path, check_lora(path, wanted))
