"""Ray draws what one process draws, and survives the loss of a worker."""

import os
import subprocess
import threading
import time
from pathlib import Path

import pytest

from tests.test_sampling_kill import command, lines, pictures, write_prompts

pytest.importorskip("ray", reason="Ray is not installed")
pytestmark = pytest.mark.slow


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    ray = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_DATA_DISABLE_PROGRESS_BARS": "1"}
    return os.environ | ray | {"OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(tmp_path / "cache")}


def workers() -> list[int]:
    """Process ids of Ray's actors."""
    found = subprocess.run(["pgrep", "-f", r"ray::.*RayWorker"], capture_output=True, text=True)
    return [int(one) for one in found.stdout.split()]


def test_two_workers_draw_what_one_process_draws_and_a_lost_one_is_replaced(
    tmp_path: Path, environment: dict[str, str]
) -> None:
    prompts = write_prompts(tmp_path / "prompts.txt", 60)
    subprocess.run(command(tmp_path / "whole", prompts), env=environment, check=True, capture_output=True)
    ray = command(tmp_path / "ray", prompts, "--engine", "ray", "--ray_workers", 2)
    process = subprocess.Popen(ray, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    killed: list[int] = []

    def kill_one() -> None:
        while process.poll() is None and not killed:
            manifest = tmp_path / "ray" / "manifest.jsonl"
            if manifest.exists() and manifest.stat().st_size and (found := workers()):
                os.kill(found[0], 9)
                killed.append(found[0])
            time.sleep(0.05)

    thread = threading.Thread(target=kill_one)
    thread.start()
    _, errors = process.communicate(timeout=500)
    thread.join()
    assert process.returncode == 0, errors
    assert killed, "no worker was there to be killed"
    assert pictures(tmp_path / "ray") == pictures(tmp_path / "whole")
    assert lines(tmp_path / "ray") == lines(tmp_path / "whole")


def test_a_cluster_that_is_not_there_is_named(tmp_path: Path, environment: dict[str, str]) -> None:
    prompts = write_prompts(tmp_path / "prompts.txt", 2)
    argv = command(tmp_path / "out", prompts, "--engine", "ray", "--ray_address", "127.0.0.1:1")
    result = subprocess.run(argv, env=environment, capture_output=True, text=True)
    assert result.returncode != 0
    assert "ray_address must be a running cluster's" in result.stderr.splitlines()[-1], result.stderr
