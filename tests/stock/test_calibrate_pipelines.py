"""calibrate.py --pipeline: a calibration is made, found again, and fits only what it was made for."""

import json
from pathlib import Path
from typing import Any

import pytest

from cache_functions import Calibration
from hi_diffusers.commands.calibrate import main
from hi_diffusers.commands.inference import main as inference
from hi_diffusers.pictures.metadata import read_metadata
from hi_diffusers.stock.drawing import StockModel

FLUX = ("--resolution", "64x64", "--num_steps", 12)
FEW = ("--num_prompts", 5, "--num_held_out", 2)


def run(*argv: object) -> int:
    return main([str(one) for one in argv])


def draw(*argv: object) -> int:
    return inference([str(one) for one in argv])


@pytest.fixture(scope="module")
def calibrated(folders: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("calibration")
    assert run("--pipeline", folders / "flux", *FLUX, *FEW, "--full_steps", "4,3", "--calibration_dir", out) == 0
    return out


def test_a_file_for_each_target_holds_its_levels_and_choices(calibrated: Path) -> None:
    files = sorted(calibrated.iterdir())
    assert [path.name.rpartition("-")[2] for path in files] == ["velocity.json", "x0.json"], "no work is left"
    for path in files:
        found = Calibration.read(path)
        assert found.key.scheduler == "euler" and found.key.num_steps == 12 and "guidance=3.5" in found.key.model
        assert sorted(found.choices) == [3, 4] and len(found.choices[4].full_steps) == 4
        assert found.sigmas[0] == pytest.approx(1.0) and found.sigmas[-1] == 0.0
        assert found.made_of["pipeline"] == "FluxPipeline"


def test_it_is_found_and_used_and_its_hash_recorded(
    folders: Path, calibrated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.png"
    flags = ("--calibration_dir", calibrated, "--seed", 1, "-o", path, "a fish")
    assert draw("--pipeline", folders / "flux", *FLUX, "--full_steps", 4, *flags) == 0
    assert "no calibration" not in capsys.readouterr().err
    cache = read_metadata(path)["cache"]
    assert cache["basis"] == "learned" and cache["calibration"].startswith("sha256:")


@pytest.mark.parametrize(
    "changed", [("--resolution", "128x128"), ("--num_steps", 13), ("--guidance", 4), ("--true_cfg", 2)]
)
def test_what_it_was_not_made_for_is_drawn_without_it_and_that_is_said(
    folders: Path, calibrated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], changed: tuple[Any, ...]
) -> None:
    """Another size has other noise levels, since FLUX shifts them by the number of tokens."""
    path = tmp_path / "a.png"
    flags = ("--calibration_dir", calibrated, "--seed", 1, "-o", path, "--negative_prompt", "a", "a fish")
    assert draw("--pipeline", folders / "flux", *FLUX, "--full_steps", 4, *changed, *flags) == 0
    assert "no calibration" in capsys.readouterr().err
    assert read_metadata(path)["cache"]["basis"] == "taylor"


def test_classes_and_videos_are_calibrated(folders: Path, tmp_path: Path) -> None:
    flags = (*FEW, "--num_steps", 8, "--full_steps", 3, "--calibration_dir", tmp_path)
    assert run("--pipeline", folders / "dit", *flags) == 0
    video = ("--resolution", "32x32", "--num_frames", 5, "--target", "velocity")
    assert run("--pipeline", folders / "wan", *flags, *video) == 0
    names = sorted(path.name.partition("-")[0] + path.name.rpartition("-")[2] for path in tmp_path.iterdir())
    assert names == ["ditx0.json", "wanvelocity.json"], "predicted noise has no velocity to calibrate"


def test_a_stopped_calibration_goes_on(
    folders: Path, calibrated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[int] = []
    draw_batch = StockModel.draw

    def stopping(self: StockModel, requests: Any, *args: Any, **kwargs: Any) -> Any:
        if len(drawn) == 7:
            raise KeyboardInterrupt
        drawn.append(1)
        return draw_batch(self, requests, *args, **kwargs)

    command = ("--pipeline", folders / "flux", *FLUX, *FEW, "--full_steps", "4,3", "--calibration_dir", tmp_path)
    monkeypatch.setattr(StockModel, "draw", stopping)
    assert run(*command) == 130
    monkeypatch.setattr(StockModel, "draw", draw_batch)
    assert run(*command) == 0
    for path in calibrated.iterdir():
        assert json.loads(path.read_text()) == json.loads((tmp_path / path.name).read_text())


def test_what_cannot_be_calibrated_is_refused(
    folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cases: list[tuple[tuple[Any, ...], str]] = [
        ((folders / "dit", "--target", "velocity"), "--target must be x0 with DDIMScheduler"),
        ((folders / "dit", "--width", 64), "--width is not taken by DiTPipeline"),
        ((folders / "flux", "--lora", "x"), "--lora cannot be calibrated"),
        ((folders / "flux", "--num_steps", 200), "--num_steps must be at most 128"),
    ]
    for (folder, *flags), message in cases:
        assert run("--pipeline", folder, *flags, "--calibration_dir", tmp_path) == 2
        assert message in capsys.readouterr().err
    assert run("--resolution", "64x64") == 2
    assert "no effect without --pipeline" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
