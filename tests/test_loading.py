import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hi_diffusers import HiDreamImagePipeline, load_pipeline
from hi_diffusers.engine.loading import resolve_device, resolve_dtype
from hi_diffusers.families.hidream.files import locate
from hi_diffusers.families.table import PRESETS
from hi_diffusers.weights.identity import fingerprint
from hi_diffusers.weights.source import ModelSource
from tests.tiny_folder import COMPONENTS

NANO = PRESETS["nano"]
WITH_WEIGHTS = [name for name in COMPONENTS if not name.startswith(("tokenizer", "scheduler"))]


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "model"))


@pytest.fixture
def refusal(monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Load, expect a ValueError before any weight is read, and return its message."""

    def load(*args: Any, **kwargs: Any) -> str:
        with pytest.raises(ValueError) as refused:
            load_pipeline(*args, **({"device": "cpu"} | kwargs))
        assert "\n" not in str(refused.value)
        return str(refused.value)

    def read(*_: Any, **__: Any) -> None:
        raise AssertionError("weights were read before the refusal")

    monkeypatch.setattr(HiDreamImagePipeline, "from_pretrained", read)
    return load


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def weights_of(folder: Path, name: str) -> Path:
    (path,) = (folder / name).glob("*.safetensors")
    return path


def test_a_loaded_model_knows_its_preset_and_what_it_is(tiny_folder: Path) -> None:
    pipe = load_pipeline("nano-fast", device="cpu", model_path=str(tiny_folder))
    assert pipe.preset is PRESETS["nano-fast"]
    assert pipe.identity.model_type == "nano-fast"
    assert pipe.identity.fingerprint == fingerprint(tiny_folder / "transformer")


def test_a_loaded_model_is_ready_to_draw_and_not_to_train(tiny_pipe) -> None:
    for module in (tiny_pipe.transformer, tiny_pipe.vae, tiny_pipe.text_encoder_3, tiny_pipe.text_encoder_4):
        assert not module.training


@pytest.mark.parametrize(
    ("name", "dtype"), [("auto", torch.float32), ("fp32", torch.float32), ("bf16", torch.bfloat16)]
)
def test_every_component_gets_the_dtype(tiny_folder: Path, name: str, dtype: torch.dtype) -> None:
    pipe = load_pipeline("nano", device="cpu", dtype=name, model_path=tiny_folder)
    modules = {key: part for key, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    assert {key: part.dtype for key, part in modules.items()} == dict.fromkeys(WITH_WEIGHTS, dtype)


def test_the_bundled_model_passes_its_own_checks(nano_folder: Path) -> None:
    for name in ("nano", "nano-dev", "nano-fast"):
        assert locate(PRESETS[name], ModelSource()).folder == nano_folder


def test_the_bundled_model_has_the_announced_shape(nano_folder: Path) -> None:
    config = json.loads((nano_folder / "transformer" / "config.json").read_text())
    assert (config["num_layers"], config["num_single_layers"]) == (2, 4)
    assert config["attention_head_dim"] * config["num_attention_heads"] == 128
    assert (config["in_channels"], config["max_resolution"]) == (4, [16, 16])


def test_the_bundled_model_names_no_folder_of_the_machine_that_made_it(nano_folder: Path) -> None:
    for path in nano_folder.rglob("*.json"):
        assert '"/' not in path.read_text(encoding="utf-8"), path.relative_to(nano_folder)


# Refusals: all of them before weights are read.


@pytest.mark.parametrize("name", ["giant", "", "nano "])
def test_an_unknown_model_is_refused(refusal, name: str) -> None:
    assert refusal(name) == f"model_type must be one of nano, nano-dev, nano-fast, full, dev, fast, got {name!r}"


@pytest.mark.parametrize("name", ["tpu", "", "cpu:x", "cuda:999", "meta", "vulkan", "gpu"])
def test_a_device_that_is_not_there_is_refused(refusal, tiny_folder: Path, name: str) -> None:
    message = refusal("nano", device=name, model_path=tiny_folder)
    assert message.startswith("device must be ") and repr(name) in message


@pytest.mark.parametrize("name", ["fp8", "float32", "", "FP32"])
def test_an_unknown_dtype_is_refused(refusal, tiny_folder: Path, name: str) -> None:
    message = refusal("nano", dtype=name, model_path=tiny_folder)
    assert message == f"dtype must be one of auto, fp32, bf16, fp16, got {name!r}"


def test_auto_is_bf16_on_cuda_and_fp32_elsewhere() -> None:
    dtypes = {kind: resolve_dtype("auto", torch.device(kind)) for kind in ("cuda", "cpu", "mps")}
    assert dtypes == {"cuda": torch.bfloat16, "cpu": torch.float32, "mps": torch.float32}


@pytest.mark.parametrize(
    ("cuda", "mps", "expected"), [(True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")]
)
def test_auto_takes_cuda_then_mps_then_the_cpu(
    monkeypatch: pytest.MonkeyPatch, cuda: bool, mps: bool, expected: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: int(cuda))
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert resolve_device("auto").type == expected


@pytest.mark.parametrize(
    ("quantization", "repo"), [("none", "HiDream-ai/HiDream-I1-Dev"), ("nf4", "azaneko/HiDream-I1-Dev-nf4")]
)
def test_a_hidream_model_without_its_files_and_without_network_is_named(refusal, quantization: str, repo: str) -> None:
    message = refusal("dev", quantization=quantization)
    assert message == f"{repo} is not on this disk, and HF_HUB_OFFLINE is set: unset it, or give a local folder"


def test_a_missing_folder_is_refused(refusal, tmp_path: Path) -> None:
    message = refusal("nano", model_path=tmp_path / "none")
    assert message.startswith("model_path must be ") and str(tmp_path / "none") in message


def test_a_file_in_place_of_the_folder_is_refused(refusal, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert str(tmp_path / "file") in refusal("nano", model_path=tmp_path / "file")


def test_a_folder_that_is_no_model_is_refused(refusal, tmp_path: Path) -> None:
    assert str(tmp_path / "model_index.json") in refusal("nano", model_path=tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", "\x80"])
def test_an_index_that_is_no_json_object_is_refused(refusal, folder: Path, text: str) -> None:
    (folder / "model_index.json").write_bytes(text.encode("latin-1"))
    assert str(folder / "model_index.json") in refusal("nano", model_path=folder)


def test_another_pipeline_is_refused(refusal, folder: Path) -> None:
    edit(folder / "model_index.json", _class_name="FluxPipeline")
    message = refusal("nano", model_path=folder)
    assert "FluxPipeline" in message and "HiDreamImagePipeline" in message and str(folder) in message


def test_another_transformer_is_refused(refusal, folder: Path) -> None:
    edit(folder / "transformer" / "config.json", _class_name="FluxTransformer2DModel")
    message = refusal("nano", model_path=folder)
    assert "FluxTransformer2DModel" in message and "HiDreamImageTransformer2DModel" in message
    assert str(folder / "transformer") in message


@pytest.mark.parametrize("resolution", [[24, 24], [128, 128], [], [16], [0, 0], "16x16", None])
def test_a_transformer_of_another_size_is_refused(refusal, folder: Path, resolution: Any) -> None:
    edit(folder / "transformer" / "config.json", max_resolution=resolution)
    assert "max_resolution" in refusal("nano", model_path=folder)


def test_a_small_model_under_a_large_model_s_name_is_refused(refusal, tiny_folder: Path) -> None:
    """Its latents of 16x16 divide the large picture as well, but its VAE draws 64x64 pixels from them."""
    message = refusal("full", model_path=tiny_folder)
    assert "full" in message and str(tiny_folder) in message


@pytest.mark.parametrize("name", COMPONENTS)
def test_a_missing_component_is_refused(refusal, folder: Path, name: str) -> None:
    shutil.rmtree(folder / name)
    assert f"{folder / name} is missing" in refusal("nano", model_path=folder)


@pytest.mark.parametrize("name", COMPONENTS)
def test_a_component_without_its_files_is_refused(refusal, folder: Path, name: str) -> None:
    for path in (folder / name).glob("*.json"):
        path.unlink()
    assert str(folder / name) in refusal("nano", model_path=folder)


@pytest.mark.parametrize("name", WITH_WEIGHTS)
def test_pickled_weights_are_refused(refusal, folder: Path, name: str) -> None:
    path = weights_of(folder, name)
    path.rename(path.with_suffix(".bin"))
    message = refusal("nano", model_path=folder)
    assert str(folder / name) in message and ".safetensors" in message


@pytest.mark.parametrize("name", WITH_WEIGHTS)
def test_weights_that_were_cut_off_are_refused_with_their_path(refusal, folder: Path, name: str) -> None:
    path = weights_of(folder, name)
    path.write_bytes(path.read_bytes()[:-1])
    assert f"{path} is not a complete safetensors file" in refusal("nano", model_path=folder)


@pytest.mark.parametrize("size", [0, 4, 8, 100, -5000])
def test_weights_cut_off_anywhere_are_refused(refusal, folder: Path, size: int) -> None:
    path = weights_of(folder, "vae")
    path.write_bytes(path.read_bytes()[:size])
    assert str(path) in refusal("nano", model_path=folder)


@pytest.mark.parametrize(
    "content",
    [
        b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
        b"\x02\0\0\0\0\0\0\0{}",
        b"\x02\0\0\0\0\0\0\0[]",
        b"\x09\0\0\0\0\0\0\0" + b'{"a": []}',
        b"\xff" * 64,
    ],
)
def test_what_is_no_safetensors_file_is_refused(refusal, folder: Path, content: bytes) -> None:
    path = weights_of(folder, "transformer")
    path.write_bytes(content)
    assert str(path) in refusal("nano", model_path=folder)


def test_a_shard_that_is_missing_is_refused(refusal, tiny_pipe, folder: Path) -> None:
    """An interrupted download leaves whole files and an index that names more of them."""
    shutil.rmtree(folder / "transformer")
    tiny_pipe.transformer.save_pretrained(folder / "transformer", max_shard_size="1MB")
    first, *rest = sorted((folder / "transformer").glob("*.safetensors"))
    assert rest
    first.unlink()
    assert first.name in refusal("nano", model_path=folder)


def test_a_sharded_model_loads(tiny_pipe, folder: Path) -> None:
    shutil.rmtree(folder / "transformer")
    tiny_pipe.transformer.save_pretrained(folder / "transformer", max_shard_size="1MB")
    state = load_pipeline("nano", device="cpu", model_path=folder).transformer.state_dict()
    for key, value in tiny_pipe.transformer.state_dict().items():
        assert torch.equal(state[key], value), key


# The fingerprint.


def test_the_fingerprint_does_not_depend_on_the_folder_s_place(tiny_folder: Path, folder: Path) -> None:
    assert fingerprint(folder / "transformer") == fingerprint(tiny_folder / "transformer")


def test_the_fingerprint_stays_when_the_model_is_saved_again(tiny_pipe, tiny_folder: Path, tmp_path: Path) -> None:
    """diffusers writes into the configuration where the model was loaded from."""
    tiny_pipe.transformer.save_pretrained(tmp_path / "transformer")
    assert fingerprint(tmp_path / "transformer") == fingerprint(tiny_folder / "transformer")


def test_the_fingerprint_is_16_hexadecimal_digits(tiny_folder: Path) -> None:
    digits = fingerprint(tiny_folder / "transformer")
    assert len(digits) == 16 and int(digits, 16) >= 0


@pytest.mark.parametrize("place", [-1, 4000, -(2**20) + 1])
def test_other_weights_have_another_fingerprint(tiny_folder: Path, folder: Path, place: int) -> None:
    path = weights_of(folder, "transformer")
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)
    assert fingerprint(folder / "transformer") != fingerprint(tiny_folder / "transformer")


def test_another_configuration_has_another_fingerprint(tiny_folder: Path, folder: Path) -> None:
    edit(folder / "transformer" / "config.json", llama_layers=[0, 1, 2])
    assert fingerprint(folder / "transformer") != fingerprint(tiny_folder / "transformer")


def test_a_file_that_is_longer_in_the_middle_has_another_fingerprint(tmp_path: Path) -> None:
    """Only the ends of large files are read; the size tells what lies between."""
    digits = set()
    for size in (3 * 2**20, 3 * 2**20 + 1):
        (tmp_path / "config.json").write_text("{}")
        (tmp_path / "model.safetensors").write_bytes(bytes(size))
        digits.add(fingerprint(tmp_path))
    assert len(digits) == 2
