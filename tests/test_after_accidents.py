"""What an accident, another process or a stranger left in a folder is mended, named or left alone."""

import json
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hi_diffusers import SamplingOptions
from hi_diffusers.calibrating.trials import psnr_of, read_lines
from hi_diffusers.calibrating.work import WorkFolder
from hi_diffusers.commands import compare, inference, sampling
from hi_diffusers.families.table import PRESETS
from hi_diffusers.pictures.metadata import read_metadata

PROMPT = "a red circle on a blue background"
FLAGS = ["--device", "cpu", "--num_steps", "2", "--cache", "off"]


# The folder of a calibration.


def test_a_torn_last_line_of_the_trials_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "trials.jsonl"
    whole = json.dumps({"candidate": ["x0", 1], "psnr": [40.0]}) + "\n"
    for torn in (
        '{"candidate": ["x0"',
        '{"psnr": [1]}\n',
        "\0\0\0\n",
        '{"candidate": 1, "psnr": "x"}\n',
        whole.rstrip("\n"),
    ):
        path.write_text(whole + torn, encoding="utf-8")
        assert read_lines(path, psnr_of) == {'["x0", 1]': [40.0]}
        assert path.read_text(encoding="utf-8") == whole


@pytest.mark.parametrize("torn", ["", '{"key": ', "\0"])
def test_torn_settings_begin_the_work_anew(torn: str, tmp_path: Path) -> None:
    folder = WorkFolder(tmp_path / "work")
    (folder.path / "settings.json").write_text(torn, encoding="utf-8")
    (folder.path / "picture-0001.pt").touch()
    (notice,) = folder.claim({"a": 1})
    assert "is damaged" in notice and not (folder.path / "picture-0001.pt").exists()
    assert folder.claim({"a": 1}) == []
    with pytest.raises(ValueError, match="unfinished work of a run with other settings"):
        folder.claim({"a": 2})


def test_two_calibrations_do_not_share_a_folder(tmp_path: Path) -> None:
    first, second = (WorkFolder(tmp_path / "work") for _ in range(2))
    with first.locked(), pytest.raises(ValueError, match="is in use"), second.locked():
        pass
    with second.locked():
        pass


def test_only_its_own_files_are_removed(tmp_path: Path) -> None:
    folder = WorkFolder(tmp_path / "work")
    (tmp_path / "precious").write_text("mine", encoding="utf-8")
    (folder.path / "notes.txt").touch()
    (folder.path / "picture-0000.pt").symlink_to(tmp_path / "precious")
    (folder.path / "trials.jsonl").touch()
    folder.remove()
    assert [path.name for path in folder.path.iterdir()] == ["notes.txt"]
    assert (tmp_path / "precious").read_text(encoding="utf-8") == "mine"


def test_a_folder_that_is_a_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "work").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="is a symbolic link"):
        WorkFolder(tmp_path / "work")


# The folder of a run.


@pytest.fixture
def run(nano_folder: Path, tmp_path: Path) -> list[str]:
    (tmp_path / "p.txt").write_text("a red star\na blue ring\n", encoding="utf-8")
    return ["--prompt_file", str(tmp_path / "p.txt"), "--output_dir", str(tmp_path / "out"), *FLAGS]


def test_a_manifest_that_is_a_link_is_refused_and_its_target_kept(
    run: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sampling.main([*run, "--limit", "1"]) == 0
    manifest = tmp_path / "out" / "manifest.jsonl"
    manifest.unlink()
    (tmp_path / "mine.txt").write_text("no line of a manifest", encoding="utf-8")
    manifest.symlink_to(tmp_path / "mine.txt")
    assert sampling.main(run) == 2
    assert "is a symbolic link" in capsys.readouterr().err
    assert (tmp_path / "mine.txt").read_text(encoding="utf-8") == "no line of a manifest"


def test_a_line_of_a_clock_that_lies_ahead_is_not_drawn_for_ever(
    run: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sampling.main(run) == 0
    manifest = tmp_path / "out" / "manifest.jsonl"
    first, second = (json.loads(line) for line in manifest.read_text(encoding="utf-8").splitlines())
    ahead = first | {"time": time.time() + 10**6, "bytes": first["bytes"] + 1}
    manifest.write_text("".join(json.dumps(line) + "\n" for line in (ahead, second)), encoding="utf-8")
    assert sampling.main(run) == 0
    assert "2 of 2 pictures are finished" in capsys.readouterr().out


# Pictures of a comparison.


def test_a_picture_that_is_too_large_does_not_end_the_comparison(
    run: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sampling.main(run) == 0
    assert sampling.main([*run[:2], "--output_dir", str(tmp_path / "b"), *FLAGS]) == 0
    Image.fromarray(np.zeros((1, 20_000_000), np.uint8)).save(tmp_path / "b" / "00000_00.png")
    report = tmp_path / "report.html"
    assert compare.main([str(tmp_path / "out"), str(tmp_path / "b"), "--report", str(report)]) == 0
    assert "20000000x1 pixels" in report.read_text(encoding="utf-8")


def test_half_a_character_and_an_endless_prompt_do_not_end_the_report(run: list[str], tmp_path: Path) -> None:
    assert sampling.main(run) == 0
    for name in ("out", "b"):
        if name == "b":
            assert sampling.main([*run[:2], "--output_dir", str(tmp_path / "b"), *FLAGS, "--limit", "2"]) == 0
        manifest = tmp_path / name / "manifest.jsonl"
        lines = [json.loads(line) for line in manifest.read_text(encoding="utf-8").splitlines()]
        lines[0]["prompt"] = "\ud800" + "x" * 200_000
        manifest.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="ascii")
    report = tmp_path / "report.html"
    assert compare.main([str(tmp_path / "out"), str(tmp_path / "b"), "--report", str(report)]) == 0
    assert "\\ud800" in report.read_text(encoding="utf-8") and report.stat().st_size < 100_000


# Seeds that other software writes.


@pytest.mark.parametrize("seed", [2**63, 2**64 - 1])
def test_a_seed_of_64_bits_draws_and_is_noted(seed: int, nano_folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "a.png"
    assert inference.main([PROMPT, *FLAGS, "--seed", str(seed), "-o", str(output)]) == 0
    first = output.read_bytes()
    assert read_metadata(output)["options"]["seed"] == seed
    assert inference.main(["--like", str(output), "--device", "cpu", "-o", str(output)]) == 0
    assert output.read_bytes() == first


def test_a_seed_of_minus_one_is_drawn_by_chance() -> None:
    seeds = {SamplingOptions(PROMPT, seed=-1).resolve(PRESETS["nano"]).seed for _ in range(4)}
    assert len(seeds) > 1 and min(seeds) >= 0
