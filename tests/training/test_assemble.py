"""The assembled folder is an ordinary diffusers model: theirs and ours load it, and draw from it."""

import json
from pathlib import Path

import diffusers
import pytest
import torch

from hi_diffusers import load_pipeline
from training.assemble import PARTS, main


def flags(folder: Path, output: Path) -> list[str]:
    parts = {"vae": folder / "vae", "text": folder, "transformer": folder / "transformer", "output": output}
    return [argument for name, path in parts.items() for argument in (f"--{name}", str(path))]


@pytest.fixture(scope="module")
def assembled(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("assets") / "model"
    assert main(flags(tiny_folder, output)) == 0
    return output


def test_the_index_names_the_class_of_every_part(assembled: Path) -> None:
    index = json.loads((assembled / "model_index.json").read_text())
    assert index["_class_name"] == "HiDreamImagePipeline"
    assert {name for name in index if not name.startswith("_")} == {*PARTS, "scheduler"}
    assert index["transformer"] == ["diffusers", "HiDreamImageTransformer2DModel"]
    assert {path.name for path in assembled.iterdir()} == {*PARTS, "scheduler", "model_index.json"}


def test_stock_diffusers_loads_it_with_the_sampler_of_hidream_full(assembled: Path, tiny_folder: Path) -> None:
    pipe = diffusers.HiDreamImagePipeline.from_pretrained(assembled)
    scheduler = pipe.scheduler
    assert isinstance(scheduler, diffusers.UniPCMultistepScheduler)
    assert scheduler.config.flow_shift == 3.0 and scheduler.config.use_flow_sigmas
    assert scheduler.config.prediction_type == "flow_prediction"
    source = diffusers.HiDreamImageTransformer2DModel.from_pretrained(tiny_folder / "transformer").state_dict()
    for name, value in pipe.transformer.state_dict().items():
        assert torch.equal(value, source[name]), name


def test_our_pipeline_loads_it_as_nano(assembled: Path, tiny_folder: Path) -> None:
    pipe = load_pipeline("nano", device="cpu", model_path=assembled)
    theirs = load_pipeline("nano", device="cpu", model_path=tiny_folder)
    assert pipe.identity == theirs.identity
    one, other = (each.encode(["a red star on a blue background"], 24) for each in (pipe, theirs))
    assert torch.equal(one.t5, other.t5) and torch.equal(one.pooled, other.pooled)


def test_assembling_again_replaces_the_parts_and_keeps_what_else_lies_there(tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("the card")
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "stale.bin").touch()
    assert main(flags(tiny_folder, tmp_path)) == 0
    assert (tmp_path / "README.md").read_text() == "the card"
    assert not (tmp_path / "vae" / "stale.bin").exists()


def test_a_missing_part_is_refused_before_anything_is_replaced(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "model"
    assert main([*flags(tiny_folder, output), "--transformer", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert "--transformer must be a folder that training wrote" in err and "config.json" in err
    assert err.count("\n") == 1 and not output.exists()
