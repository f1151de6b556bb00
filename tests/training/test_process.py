"""What the trainings share: whole files, checkpoints that say whose they are, a log without repetitions."""

import json
import subprocess
import sys
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from training.checkpoint import load_checkpoint, save_checkpoint
from training.process import ALLOCATOR, require_files, written_whole
from training.progress import Progress
from training.recipe import average_decay, require_positive, require_seed, require_share, warmup_and_decay


@dataclass(frozen=True)
class Recipe:
    steps: int = 4
    widths: tuple[int, ...] = (8, 16)


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), written_whole(path) as partial:
        partial.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    with written_whole(path) as partial:
        partial.write_text("new")
    assert path.read_text() == "new"
    assert [left.name for left in tmp_path.iterdir()] == ["file"]


def test_a_folder_takes_the_place_of_the_old_one_with_all_its_files(tmp_path: Path) -> None:
    for name in ("first", "second"):
        with written_whole(tmp_path / "folder") as partial:
            partial.mkdir()
            (partial / name).touch()
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["second"]


def test_a_missing_folder_or_file_is_named_with_its_flag(tmp_path: Path) -> None:
    (tmp_path / "config.json").touch()
    require_files("--vae", tmp_path, ["config.json"])
    with pytest.raises(ValueError, match=r"--vae .* no weights\.bin"):
        require_files("--vae", tmp_path, ["config.json", "weights.bin"])
    with pytest.raises(ValueError, match=r"--vae .*nowhere: there is no such folder"):
        require_files("--vae", tmp_path / "nowhere", [])


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's settings")
def test_a_program_starts_anew_with_the_allocator_and_its_own_arguments() -> None:
    program = (
        "import os, sys; from training.process import ensure_allocator; ensure_allocator();"
        "print(os.environ['MALLOC_TOP_PAD_'], sys.argv[1:])"
    )
    command = [sys.executable, "-c", program, "--steps", "5"]
    root = Path(__file__).parents[2]
    result = subprocess.run(command, capture_output=True, text=True, cwd=root, env={}, check=True)
    assert result.stdout.split(maxsplit=1) == [ALLOCATOR["MALLOC_TOP_PAD_"], "['--steps', '5']\n"]


def test_a_checkpoint_comes_back_with_its_values(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    assert load_checkpoint(path, Recipe()) is None
    save_checkpoint(path, Recipe(), {"step": 3, "weights": {"a": torch.arange(4)}})
    state = load_checkpoint(path, Recipe())
    assert state["step"] == 3 and state["weights"]["a"].tolist() == [0, 1, 2, 3]


def test_a_checkpoint_of_another_recipe_is_refused_with_the_difference(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, Recipe(steps=4), {})
    with pytest.raises(ValueError, match=r"checkpoint.pt is of another recipe: steps is 4 there and 5 here;"):
        load_checkpoint(path, Recipe(steps=5))


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 cut off"])
def test_a_file_that_is_no_checkpoint_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"checkpoint.pt is not a checkpoint"):
        load_checkpoint(path, Recipe())


def test_saving_that_fails_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, Recipe(), {"step": 1})
    with pytest.raises(Exception, match="pickle"):
        save_checkpoint(path, Recipe(), {"step": 2, "lambda": lambda: None})
    assert load_checkpoint(path, Recipe())["step"] == 1


def steps_in(log: Path) -> list[int]:
    return [json.loads(line)["step"] for line in log.read_text().splitlines()]


def test_what_a_killed_run_logged_after_its_checkpoint_is_dropped_and_comes_again(tmp_path: Path) -> None:
    """Once a log held the steps between the checkpoint and the kill twice, so its curve ran backwards."""
    log = tmp_path / "log.jsonl"
    killed = Progress(log, 0, 40)
    for step in (10, 20, 30):
        killed.record(step, loss=1.0)
    with log.open("a") as file:
        file.write('{"step": 40, "lo')
    resumed = Progress(log, 20, 40)
    assert steps_in(log) == [10, 20]
    for step in (30, 40):
        resumed.record(step, loss=1.0)
    assert steps_in(log) == [10, 20, 30, 40]


def test_a_finished_run_that_is_started_again_repeats_no_line(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    for first in (0, 40):
        Progress(log, first, 40).record(40, psnr=32.1)
    assert steps_in(log) == [40]


def test_progress_says_figures_and_the_time_left_on_stderr(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Progress(tmp_path / "log.jsonl", 0, 40).report(10, loss=0.5)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("step 10 of 40: loss 0.5; ") and captured.err.endswith(" min left\n")


def test_the_learning_rate_rises_stays_and_falls_to_zero() -> None:
    shares = [warmup_and_decay(step, 100, 10, 0.3) for step in range(101)]
    assert shares[0] == pytest.approx(0.1) and shares[9:71] == [1.0] * 62
    assert all(before < after for before, after in pairwise(shares[:10]))
    assert shares[85] == pytest.approx(0.5) and shares[99] > 0 and shares[100] == 0


def test_the_average_moves_fast_at_first_and_at_its_limit_later() -> None:
    decays = [average_decay(step, 0.998) for step in (1, 10, 100, 10_000)]
    assert decays == sorted(decays)
    assert decays[0] < 0.2 and decays[-1] == 0.998


def test_settings_that_make_no_sense_are_named() -> None:
    @dataclass
    class Settings:
        steps: int = 0
        share: float = 1.0
        seed: int = -1

    for check, name in ((require_positive, "steps"), (require_share, "share")):
        with pytest.raises(ValueError, match=f"{name} must be"):
            check(Settings(), name)
    with pytest.raises(ValueError, match="seed must be at least 0, got -1"):
        require_seed(Settings())
