"""One model from differently published files: the pictures are the same, or as near as its weights are."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hi_diffusers import CacheConfig, HiDreamImagePipeline, SamplingOptions, generate, load_pipeline
from hi_diffusers.families.hidream.files import LLAMA, locate
from hi_diffusers.families.hidream.load import save_quantized
from hi_diffusers.families.table import PRESETS
from hi_diffusers.pictures.metrics import psnr
from hi_diffusers.weights.gptq import GPTQLinear
from hi_diffusers.weights.source import ModelSource
from tests.gptq_folder import QUANTIZATION, write_gptq

PROMPT = "a large yellow circle on a blue background"


def draw(**source: Any) -> np.ndarray:
    """nano's picture from these files, uncached."""
    return pixels(load_pipeline("nano", device="cpu", **source))


def pixels(pipe: HiDreamImagePipeline) -> np.ndarray:
    return generate(pipe, SamplingOptions(PROMPT, seed=3, num_steps=20), CacheConfig.off()).pixels


@pytest.fixture(scope="module")
def plain(nano_folder: Path) -> np.ndarray:
    return draw()


@pytest.fixture(scope="module")
def apart(nano_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The official layout: the pipeline without a Llama, and the Llama in a folder of its own with its tokenizer."""
    root = tmp_path_factory.mktemp("apart")
    folder = shutil.copytree(nano_folder, root / "pipeline", ignore=shutil.ignore_patterns(*LLAMA, "calibration"))
    llama = shutil.copytree(nano_folder / LLAMA[0], root / "llama")
    for path in (nano_folder / LLAMA[1]).iterdir():
        shutil.copy(path, llama)
    return folder, llama


@pytest.fixture(scope="module")
def gptq(apart: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """nano's Llama in GPTQ-INT4."""
    folder = tmp_path_factory.mktemp("gptq")
    write_gptq(load_pipeline("nano", device="cpu").text_encoder_4, folder)
    for path in apart[1].glob("*token*"):
        shutil.copy(path, folder)
    return folder


def test_a_llama_of_its_own_draws_the_same_picture(plain: np.ndarray, apart: tuple[Path, Path]) -> None:
    folder, llama = apart
    assert np.array_equal(draw(model_path=folder, llama=llama), plain)


def test_a_llama_in_gptq_draws_nearly_the_same_picture(plain: np.ndarray, apart: tuple[Path, Path], gptq: Path) -> None:
    pipe = load_pipeline("nano", device="cpu", model_path=apart[0], llama=gptq)
    assert any(isinstance(module, GPTQLinear) for module in pipe.text_encoder_4.modules())
    assert psnr(pixels(pipe), plain) > 25


def test_a_model_in_nf4_draws_nearly_the_same_picture_and_is_saved_and_read_back(
    plain: np.ndarray, nano_folder: Path, tmp_path: Path
) -> None:
    pipe = load_pipeline("nano", device="cpu", quantization="nf4")
    save_quantized(pipe, tmp_path / "nf4")
    in_nf4 = pixels(pipe)
    if torch.cpu._is_avx512_bf16_supported():  # elsewhere nothing is repacked
        with pytest.raises(ValueError, match="must be saved before it has drawn"):
            save_quantized(pipe, tmp_path / "late")
    index = json.loads((tmp_path / "nf4" / "model_index.json").read_text())
    assert index["transformer"] == ["diffusers", "HiDreamImageTransformer2DModel"]
    assert 20 < psnr(in_nf4, plain) < 80
    assert not any((tmp_path / "nf4" / name).exists() for name in LLAMA)
    whole = {path.name: path.stat().st_size for path in (nano_folder / "transformer").glob("*.safetensors")}
    small = {path.name: path.stat().st_size for path in (tmp_path / "nf4" / "transformer").glob("*.safetensors")}
    assert sum(small.values()) < 0.6 * sum(whole.values())
    llama = tmp_path / "llama"
    shutil.copytree(nano_folder / LLAMA[0], llama)
    shutil.copytree(nano_folder / LLAMA[1], llama, dirs_exist_ok=True)
    again = draw(model_path=tmp_path / "nf4", llama=llama, quantization="nf4")
    assert np.array_equal(again, in_nf4)


def test_an_nf4_model_caches_like_any_other(plain: np.ndarray) -> None:
    pipe = load_pipeline("nano", device="cpu", quantization="nf4")
    options = SamplingOptions(PROMPT, seed=3, num_steps=20)
    uncached = generate(pipe, options, CacheConfig.off())
    cached = generate(pipe, options, CacheConfig.taylorseer(2))
    assert psnr(cached.pixels, uncached.pixels) > 30


# Refusals, before weights are read.


@pytest.fixture
def refused(apart: tuple[Path, Path]) -> Callable[..., str]:
    def ask(**source: Any) -> str:
        settings = {"model_path": str(apart[0]), "llama": str(apart[1])} | source
        with pytest.raises(ValueError) as refusal:
            locate(PRESETS["nano"], ModelSource(**settings))
        assert "\n" not in str(refusal.value)
        return str(refusal.value)

    return ask


def test_a_folder_without_a_llama_names_the_flag(refused: Callable[..., str], apart: tuple[Path, Path]) -> None:
    assert refused(llama=None) == (
        f"{apart[0] / 'text_encoder_4'} is missing: the model's folder is incomplete; give another Llama with --llama"
    )


def test_another_model_in_llama_s_place_is_refused(refused: Callable[..., str], nano_folder: Path) -> None:
    line = refused(llama=str(nano_folder / "text_encoder_3"))
    assert "holds a model of type t5, not a Llama" in line


def test_a_llama_without_tokenizer_is_refused(refused: Callable[..., str], nano_folder: Path) -> None:
    assert "holds no tokenizer.json" in refused(llama=str(nano_folder / LLAMA[0]))


def test_a_llama_with_too_few_layers_is_refused(
    refused: Callable[..., str], apart: tuple[Path, Path], tmp_path: Path
) -> None:
    llama = shutil.copytree(apart[1], tmp_path / "llama")
    config = json.loads((llama / "config.json").read_text())
    (llama / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2}))
    assert "has 2 layers, but the transformer reads layer 3" in refused(llama=str(llama))


@pytest.mark.parametrize(
    ("change", "found"),
    [({"bits": 8}, "'bits': 8"), ({"checkpoint_format": "gptq_v2"}, "gptq_v2"), ({"quant_method": "awq"}, "awq")],
)
def test_another_quantization_of_llama_is_refused(
    refused: Callable[..., str], apart: tuple[Path, Path], tmp_path: Path, change: dict[str, Any], found: str
) -> None:
    llama = shutil.copytree(apart[1], tmp_path / "llama")
    config = json.loads((llama / "config.json").read_text()) | {"quantization_config": QUANTIZATION | change}
    (llama / "config.json").write_text(json.dumps(config))
    line = refused(llama=str(llama))
    assert "must hold GPTQ weights of 4 bits in format v1, or nf4, or plain ones" in line and found in line


@pytest.mark.parametrize("part", ["transformer", "text_encoder_3"])
def test_another_quantization_of_a_component_is_refused(
    refused: Callable[..., str], apart: tuple[Path, Path], tmp_path: Path, part: str
) -> None:
    folder = shutil.copytree(apart[0], tmp_path / "model")
    config = json.loads((folder / part / "config.json").read_text())
    quantization = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    (folder / part / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    assert f"{folder / part} must hold plain or nf4 weights" in refused(model_path=str(folder))


def test_a_llama_of_another_width_is_refused(
    refused: Callable[..., str], apart: tuple[Path, Path], tmp_path: Path
) -> None:
    llama = shutil.copytree(apart[1], tmp_path / "llama")
    config = json.loads((llama / "config.json").read_text())
    (llama / "config.json").write_text(json.dumps(config | {"hidden_size": 128}))
    assert "is 128 wide, but the transformer reads states of 64 channels" in refused(llama=str(llama))


def test_a_name_that_is_no_folder_and_no_repository_is_refused(refused: Callable[..., str]) -> None:
    assert refused(llama="no such/folder/here").startswith("llama must be a folder or a hub repository's owner/name")


def test_a_revision_of_a_folder_is_refused(refused: Callable[..., str]) -> None:
    assert refused(revision="main").startswith("revision main has no effect")


def test_an_unknown_quantization_is_refused() -> None:
    with pytest.raises(ValueError, match="quantization must be one of none, nf4, got 'int8'"):
        ModelSource(quantization="int8")


def test_the_dtype_of_what_is_not_quantized_is_the_one_asked_for() -> None:
    pipe = load_pipeline("nano", device="cpu", dtype="bf16", quantization="nf4")
    found = {value.dtype for value in pipe.transformer.parameters()}
    assert found == {torch.bfloat16, torch.uint8}
