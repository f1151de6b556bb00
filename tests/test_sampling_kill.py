"""Real processes, killed at any moment: nothing finished is lost, and the end is the same bit by bit."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from hi_diffusers.runs.manifest import read_manifests

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[1]
NUM_PROMPTS = 420
NUM_KILLS = 20


def command(folder: Path, prompts: Path, *more: Any) -> list[str]:
    flags = {"--prompt_file": prompts, "--output_dir": folder, "--num_steps": 12, "--batch_size": 3, "--threads": 1}
    parts = [part for flag in flags.items() for part in flag]
    return [sys.executable, str(ROOT / "sampling.py"), "--device", "cpu", *map(str, [*parts, *more])]


def lines(folder: Path) -> list[dict[str, Any]]:
    latest = {(line["index"], line["image"]): line for line in read_manifests(Path(folder))}
    timings = ("seconds", "time")
    return [{name: value for name, value in latest[key].items() if name not in timings} for key in sorted(latest)]


def pictures(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.png")}


def write_prompts(path: Path, count: int) -> Path:
    colours, shapes = ("red", "green", "blue", "yellow", "pink"), ("circle", "star", "tree", "fish")
    texts = (f"a {colours[i % 5]} {shapes[i % 4]} on a {colours[(i + 1) % 5]} background" for i in range(count))
    path.write_text("\n".join(texts), encoding="utf-8")
    return path


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(tmp_path / "cache")}


def start(argv: list[str], environment: dict[str, str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(argv, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def wait_for_drawing(process: subprocess.Popen[bytes]) -> None:
    """Until the progress bar is there, or the process has ended."""
    assert process.stderr is not None
    os.set_blocking(process.stderr.fileno(), False)
    while process.poll() is None and b"picture" not in (process.stderr.read() or b""):
        time.sleep(0.02)


def test_a_run_killed_at_twenty_moments_ends_as_if_it_had_not_been(tmp_path: Path, environment: dict[str, str]) -> None:
    prompts = write_prompts(tmp_path / "prompts.txt", NUM_PROMPTS)
    subprocess.run(command(tmp_path / "whole", prompts), env=environment, check=True, capture_output=True)
    moments, num_hit = random.Random(0), 0
    shards = [command(tmp_path / "killed", prompts, "--shard", f"{index}/2") for index in range(2)]
    for _ in range(NUM_KILLS // 2):
        running = [start(argv, environment) for argv in shards]
        wait_for_drawing(running[0])
        time.sleep(moments.uniform(0, 2.0))
        for process in running:
            num_hit += process.poll() is None
            process.send_signal(signal.SIGKILL)
            process.wait()
            time.sleep(moments.uniform(0, 0.3))
    assert num_hit >= NUM_KILLS - 4, "the run ended before it could be killed"
    assert 0 < len(pictures(tmp_path / "killed")) < NUM_PROMPTS
    for argv in shards:
        subprocess.run(argv, env=environment, check=True, capture_output=True)
    assert pictures(tmp_path / "killed") == pictures(tmp_path / "whole")
    assert lines(tmp_path / "killed") == lines(tmp_path / "whole")
    left = {path.name for path in (tmp_path / "killed").rglob("*") if path.suffix != ".png"}
    assert left == {"run.json", "manifest-0-of-2.jsonl", "manifest-1-of-2.jsonl"}


def test_two_runs_started_at_once_in_one_folder_do_not_disturb_each_other(
    tmp_path: Path, environment: dict[str, str]
) -> None:
    prompts = write_prompts(tmp_path / "prompts.txt", 12)
    both = [start(command(tmp_path / "out", prompts), environment) for _ in range(2)]
    errors = [process.communicate()[1].decode() for process in both]
    assert sorted(process.returncode for process in both) == [0, 2]
    refused = next(error for process, error in zip(both, errors, strict=True) if process.returncode == 2)
    assert "is in use" in refused.splitlines()[-1]
    assert len(pictures(tmp_path / "out")) == len(lines(tmp_path / "out")) == 12


def test_a_disk_that_is_really_full_ends_in_one_line(tmp_path: Path, environment: dict[str, str]) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", small], capture_output=True)
    if mounted.returncode:
        pytest.skip("needs the right to mount a tmpfs")
    try:
        prompts = write_prompts(tmp_path / "prompts.txt", 60)
        argv = command(small / "out", prompts)
        result = subprocess.run(argv, env=environment, capture_output=True, text=True)
        assert result.returncode == 1
        assert "No space left on device" in result.stderr.splitlines()[-1]
        kept = lines(small / "out")
        assert 0 < len(kept) < 60
        assert all((small / "out" / line["file"]).stat().st_size == line["bytes"] for line in kept)
        assert not list((small / "out").rglob(".*"))
        subprocess.run(["mount", "-o", "remount,size=8m", small], check=True)
        subprocess.run(argv, env=environment, check=True, capture_output=True)
        assert len(pictures(small / "out")) == 60
    finally:
        subprocess.run(["umount", small], check=True)
