"""A transformer in one file as ComfyUI and its friends write it: prefixes, and fp8 weights with a scale."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hi_diffusers import HiDreamImageTransformer2DModel, load_pipeline
from tests.tiny import TINY

Weights = dict[str, Tensor]
LAYER = "double_stream_blocks.0.block.attn1.to_q"


@pytest.fixture(scope="module")
def plain(tiny_folder: Path) -> Weights:
    return load_file(next((tiny_folder / "transformer").glob("*.safetensors")))


def is_matrix(name: str, weight: Tensor) -> bool:
    return weight.ndim == 2 and "attn1.to_" in name


def scaled(
    weights: Weights, dtype: torch.dtype, names: tuple[str, str], by_row: bool = False
) -> tuple[Weights, Weights]:
    """What a file holds, and the weights that it means."""
    held, meant = dict(weights), {name: weight.float() for name, weight in weights.items()}
    scale_name, input_name = names
    for name, weight in weights.items():
        if not is_matrix(name, weight):
            continue
        largest = weight.float().abs().amax(dim=1, keepdim=True) if by_row else weight.float().abs().max()
        scale = largest / torch.finfo(dtype).max
        held[name] = (weight.float() / scale).to(dtype)
        stem = name.removesuffix(".weight")
        held[f"{stem}.{scale_name}"], held[f"{stem}.{input_name}"] = scale, torch.tensor(3.0)
        meant[name] = held[name].float() * scale
    return held, meant


def read(path: Path, folder: Path) -> Weights:
    return dict(HiDreamImageTransformer2DModel.from_single_file(path, config=folder / "transformer").named_parameters())


def mark(text: str) -> Tensor:
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


@pytest.mark.parametrize("by_row", [False, True])
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "diffusion_model.", "transformer."])
@pytest.mark.parametrize(
    ("dtype", "names"),
    [
        (torch.float8_e4m3fn, ("scale_weight", "scale_input")),
        (torch.float8_e5m2, ("weight_scale", "input_scale")),
    ],
)
def test_scales_are_multiplied_in(
    dtype: torch.dtype,
    names: tuple[str, str],
    prefix: str,
    by_row: bool,
    plain: Weights,
    tiny_folder: Path,
    tmp_path: Path,
) -> None:
    held, meant = scaled(plain, dtype, names, by_row)
    held["scaled_fp8"] = torch.zeros(0, dtype=dtype)
    held[f"{LAYER}.comfy_quant"] = mark('{"format": "float8_e4m3fn", "full_precision_matrix_mult": true}')
    path = tmp_path / "shared.safetensors"
    listed = {"layers": {LAYER: {"format": "float8_e4m3fn"}}}
    save_file({prefix + k: v for k, v in held.items()}, path, {"_quantization_metadata": json.dumps(listed)})
    found = read(path, tiny_folder)
    assert set(found) == set(meant)
    assert all(torch.equal(found[name], meant[name]) for name in meant)


def test_fp8_without_scales_is_as_it_stands(plain: Weights, tiny_folder: Path, tmp_path: Path) -> None:
    held = {name: weight.to(torch.float8_e4m3fn) for name, weight in plain.items()}
    save_file(held, tmp_path / "shared.safetensors")
    found = read(tmp_path / "shared.safetensors", tiny_folder)
    assert all(torch.equal(found[name], weight.float()) for name, weight in held.items())


def drop(name: str) -> Callable[[Weights], object]:
    return lambda held: held.pop(name)


def put(name: str, tensor: Tensor) -> Callable[[Weights], object]:
    return lambda held: held.update({name: tensor})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop(f"{LAYER}.scale_weight"), f"lacks the scale of {LAYER}.weight"),
        (drop(f"{LAYER}.weight"), f"lacks the weight {LAYER}.weight, whose scale it has"),
        (put(f"{LAYER}.scale_weight", torch.ones(3)), "has shape [3]: not one per row"),
        (put(f"{LAYER}.scale_weight", torch.tensor(float("nan"))), "is not a finite number"),
        (put(f"{LAYER}.comfy_quant", mark('{"format": "nvfp4"}')), "has the format nvfp4: only"),
        (put(f"{LAYER}.comfy_quant", mark('{"format": "float8_e4m3fn", "convrot": true}')), "has the format"),
        (put(f"{LAYER}.comfy_quant", mark("{")), "does not say legibly"),
        (put(f"{LAYER}.comfy_quant", mark("[" * 100_000)), "does not say legibly"),
        (put(f"{LAYER}.comfy_quant", mark('{"format": ["x"]}')), "has the format"),
        (put(f"{LAYER}.weight", torch.zeros(2, 2, dtype=torch.int8)), "only floating-point ones can be read"),
        (put(f"transformer.{LAYER}.bias", torch.zeros(TINY["num_attention_heads"])), "two tensors for the same weight"),
    ],
)
def test_what_does_not_fit_is_refused(
    change: Callable[[Weights], object], message: str, plain: Weights, tiny_folder: Path, tmp_path: Path
) -> None:
    held, _ = scaled(plain, torch.float8_e4m3fn, ("scale_weight", "scale_input"))
    change(held)
    path = tmp_path / "shared.safetensors"
    save_file(held, path)
    with pytest.raises(ValueError, match=re.escape(message)):
        load_pipeline("nano", model_path=tiny_folder, transformer=path, device="cpu")
