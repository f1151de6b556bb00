"""Where pipelines come from: a hub on this machine, named models, what fits a card."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from hi_diffusers.commands.inference import main
from hi_diffusers.stock.pipeline_class import PUBLISHED, TRAITS, PipelineClass
from hi_diffusers.stock.source import StockSource, choose_offload
from tests.hub_server import Hub, serve

REPO = "somebody/flux"
FLUX = ("--resolution", "64x64", "--num_steps", "8", "--full_steps", "3")


@pytest.fixture
def hub(folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub with one repository, and an empty cache."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with serve() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.address)
        template = server.address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        shutil.copytree(folders / "flux", tmp_path / "repo")
        server.repos[REPO] = tmp_path / "repo"
        (tmp_path / "repo" / "flux1.safetensors").write_bytes(b"a second copy of the weights")
        (tmp_path / "repo" / "transformer" / "model.fp16.safetensors").write_bytes(b"another")
        yield server


def fetched(hub: Hub) -> list[str]:
    return [line.rpartition("/")[2] for line in hub.asked if line.startswith("GET") and "/resolve/" in line]


def test_a_wrong_option_costs_a_few_small_files_and_no_weights(hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--pipeline", REPO, "--num_frames", "5", "a"]) == 2
    assert "--num_frames is not taken by FluxPipeline" in capsys.readouterr().err
    assert main(["--pipeline", REPO, "--step_mask", "0,60", "--num_steps", "8", "a"]) == 2
    assert "mask must hold steps below 8" in capsys.readouterr().err
    assert set(fetched(hub)) <= {"model_index.json", "scheduler_config.json", "config.json"}


def test_a_repository_is_downloaded_and_then_needs_no_network(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["--pipeline", REPO, *FLUX, "--seed", "1"]
    assert main([*command, "-o", str(tmp_path / "a.png"), "a star"]) == 0
    assert any(name.endswith(".safetensors") for name in fetched(hub))
    assert not {"flux1.safetensors", "model.fp16.safetensors"} & set(fetched(hub))
    hub.asked.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert main([*command, "-o", str(tmp_path / "b.png"), "a star"]) == 0
    assert hub.asked == []
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    folder = StockSource(REPO).folder
    local = [*command[2:], "-o", str(tmp_path / "c.png"), "a star"]
    assert main(["--pipeline", str(folder), *local]) == 0
    assert (tmp_path / "a.png").read_bytes()[-2000:] == (tmp_path / "c.png").read_bytes()[-2000:], "but for its name"


def test_a_repository_that_does_not_exist_is_one_line(hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--pipeline", "no/such", "a"]) == 2
    assert "no/such" in capsys.readouterr().err
    assert main(["--pipeline", "not a repository", "a"]) == 2
    assert "neither a folder nor a repository" in capsys.readouterr().err


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_named_model_brings_options_that_its_pipeline_takes(name: str) -> None:
    """The classes are those of the published model_index.json files."""
    kind = PipelineClass(CLASSES[name], {1: "tench"}, has_second_expert="2.2" in name)
    assert all(kind.takes(option) for option in PUBLISHED[name].options)
    assert kind.default("num_steps") or "num_steps" in PUBLISHED[name].options


CLASSES = {
    "flux-dev": "FluxPipeline",
    "flux-schnell": "FluxPipeline",
    "flux-kontext": "FluxKontextPipeline",
    "qwen-image": "QwenImagePipeline",
    "qwen-image-edit": "QwenImageEditPipeline",
    "wan2.1-t2v-1.3b": "WanPipeline",
    "wan2.1-t2v-14b": "WanPipeline",
    "wan2.2-t2v-a14b": "WanPipeline",
    "hunyuan-video": "HunyuanVideoPipeline",
    "hunyuan-video-1.5": "HunyuanVideo15Pipeline",
    "dit-xl": "DiTPipeline",
    "z-image": "ZImagePipeline",
    "sd3.5": "StableDiffusion3Pipeline",
}


@pytest.mark.parametrize("class_name", TRAITS)
def test_a_row_names_what_its_class_takes(class_name: str) -> None:
    kind, by = PipelineClass.of({"_class_name": class_name}), TRAITS[class_name].guided_by
    assert by in ("", "guider") or by in kind.signature
    assert kind.traits.needs_image <= kind.takes("images")


def test_what_fits_decides_how_a_pipeline_is_kept() -> None:
    sizes = [24, 10, 1]
    assert choose_offload(sizes, 44) == "none"
    assert choose_offload(sizes, 40) == "model"
    assert choose_offload(sizes, 24) == "sequential"
