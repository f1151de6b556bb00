"""A model folder that is not whole is refused before weights load, with its file named; nothing is drawn from it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from hi_diffusers.commands import inference
from hi_diffusers.console import REFUSED

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n"


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes), encoding="utf-8")


def truncate_vocabulary(folder: Path) -> None:
    path = folder / "tokenizer_2" / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    content["model"]["vocab"] = dict(list(content["model"]["vocab"].items())[:2])
    path.write_text(json.dumps(content), encoding="utf-8")


def deepen(path: Path) -> None:
    path.write_text("[" * 100_000 + "]" * 100_000, encoding="utf-8")


def shard_without_index(folder: Path) -> None:
    (path,) = (folder / "transformer").glob("*.safetensors")
    path.rename(path.with_name("diffusion_pytorch_model-00001-of-00002.safetensors"))


def weights_of(folder: Path, part: str) -> Path:
    (path,) = (folder / part).glob("*.safetensors")
    return path


def header_with(**entry: object) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        header = json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} | entry}).encode()
        weights_of(folder, "text_encoder").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))

    return write


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    # a tokenizer that lost its vocabulary: transformers makes one of two tokens
    "clip's vocabulary": (lambda f: (f / "tokenizer" / "tokenizer.json").unlink(), "tokenizer lacks its vocabulary"),
    "t5's vocabulary": (lambda f: (f / "tokenizer_3" / "tokenizer.json").unlink(), "tokenizer_3 lacks its vocabulary"),
    "llama's vocabulary": (lambda f: (f / "tokenizer_4" / "tokenizer.json").unlink(), "tokenizer_4 lacks its voc"),
    "a vocabulary cut off": (truncate_vocabulary, "has a vocabulary of 2 tokens, but its text encoder embeds"),
    "an empty vocabulary": (lambda f: (f / "tokenizer" / "tokenizer.json").write_text("{}"), "an empty vocabulary"),
    # pointers instead of files
    "a tokenizer's pointer": (
        lambda f: (f / "tokenizer" / "tokenizer.json").write_bytes(POINTER),
        "pointer of Git LFS",
    ),
    "a weight's pointer": (lambda f: weights_of(f, "vae").write_bytes(POINTER), "is a pointer of Git LFS"),
    "a configuration's pointer": (lambda f: (f / "vae" / "config.json").write_bytes(POINTER), "pointer of Git LFS"),
    # weights
    "shards without an index": (shard_without_index, "is one of several"),
    "weights cut off": (lambda f: weights_of(f, "vae").write_bytes(bytes(100)), "not a complete safetensors file"),
    "a shape of text": (header_with(shape="1"), "its header cannot be read"),
    "a negative side": (header_with(shape=[-1]), "its header cannot be read"),
    "offsets of text": (header_with(data_offsets=["0", "4"]), "its header cannot be read"),
    "no dtype": (header_with(dtype=None), "its header cannot be read"),
    # configurations
    "a deep configuration": (lambda f: deepen(f / "text_encoder" / "config.json"), "cannot be read as JSON"),
    "a deep index": (lambda f: deepen(f / "model_index.json"), "cannot be read as JSON"),
    "a picture of nothing": (lambda f: edit(f / "vae" / "config.json", scaling_factor=0), "scaling_factor 0"),
    "a picture of NaN": (lambda f: edit(f / "vae" / "config.json", scaling_factor=float("nan")), "scaling_factor nan"),
    "an infinite shift": (lambda f: edit(f / "vae" / "config.json", shift_factor=float("inf")), "shift_factor inf"),
    "a hub's kernel": (
        lambda f: edit(f / "text_encoder_3" / "config.json", attn_implementation="someone/kernel"),
        "to code from a hub",
    ),
    "a hub's kernel in Llama": (
        lambda f: edit(f / "text_encoder_4" / "config.json", _attn_implementation="someone/kernel:f"),
        "to code from a hub",
    ),
    "10^5 layers": (lambda f: edit(f / "transformer" / "config.json", num_layers=10**5), "too large for such a model"),
    "10^9 channels": (lambda f: edit(f / "text_encoder_3" / "config.json", d_ff=10**9), "too large for such a model"),
    "a list as quantization": (
        lambda f: edit(f / "text_encoder_4" / "config.json", quantization_config=[]),
        "must name its quantization",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_is_refused_by_the_file_s_name(
    damage: str, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "model"))
    break_it, message = DAMAGES[damage]
    break_it(folder)
    argv = ["a prompt", "-m", "nano", "--model_path", str(folder), "--device", "cpu", "-o", str(tmp_path / "a.png")]
    assert inference.main(argv) == REFUSED
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line and str(folder) in line
    assert not (tmp_path / "a.png").exists()


def test_the_whole_folder_draws(tiny_folder: Path, tmp_path: Path) -> None:
    argv = ["a prompt", "-m", "nano", "--model_path", str(tiny_folder), "--device", "cpu", "--num_steps", "2"]
    assert inference.main([*argv, "-o", str(tmp_path / "a.png")]) == 0


@pytest.mark.parametrize("kept", [("vocab.json", "merges.txt"), ("spiece.model",), ("tokenizer.model",)])
def test_the_other_layouts_of_a_vocabulary_are_whole(kept: tuple[str, ...], tmp_path: Path) -> None:
    from hi_diffusers.weights.whole import check_tokenizer

    for name in kept:
        (tmp_path / name).write_text('{"a": 0, "b": 1}', encoding="utf-8")
    check_tokenizer(tmp_path, num_embedded=2)
    (tmp_path / kept[0]).unlink()
    with pytest.raises(ValueError, match="lacks its vocabulary"):
        check_tokenizer(tmp_path)
