"""One picture drawn by several processes (gloo, one thread each) is the picture that one process draws."""

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from hi_diffusers.commands import inference
from hi_diffusers.denoising.ranks import join
from tests.parallel.worker import DRAWN

ROOT = Path(__file__).resolve().parents[2]


def torchrun(count: int, *command: Any, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", count, "--master_port", port, *command]
    variables = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(list(map(str, words)), cwd=cwd, env=variables, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("alone") / "drawn.pt"
    done = torchrun(1, "-m", "tests.parallel.worker", path, 1, 0)
    assert done.returncode == 0, done.stderr
    return torch.load(path, weights_only=True)


@pytest.mark.slow
@pytest.mark.parametrize(("ulysses", "guidance"), [(2, False), (1, True), (4, False), (2, True)], ids=str)
def test_ranks_draw_what_one_process_draws(alone, tmp_path, ulysses, guidance):
    count = ulysses * (2 if guidance else 1)
    done = torchrun(count, "-m", "tests.parallel.worker", tmp_path / "drawn.pt", ulysses, int(guidance))
    assert done.returncode == 0, done.stderr
    drawn = torch.load(tmp_path / "drawn.pt", weights_only=True)
    assert len(drawn) == len(alone) == len(DRAWN) + 3
    for name in drawn:
        (pixels, kinds, kept), (expected, of_one, whole) = drawn[name], alone[name]
        assert kinds == of_one, f"{name}: the ranks decided differently"
        assert (pixels - expected).abs().max() < 1e-5, name
        if name in ("module", "residual", "padded", "adaptive", "from a picture", "LoRA", "nf4", "batch"):
            assert kept * count == whole, f"{name}: every rank keeps its share"


@pytest.mark.slow
def test_torchrun_draws_the_same_file_and_one_rank_speaks(tmp_path):
    assert inference.main(["--seed", "7", "--device", "cpu", "-o", str(tmp_path / "one.png")]) == 0
    for count, flags in ((2, ["--ulysses", 2]), (2, ["--guidance_parallel"])):
        done = torchrun(
            count, ROOT / "inference.py", "--seed", 7, "--device", "cpu", *flags, "-o", "a.png", cwd=tmp_path
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("a.png") == 1 and done.stderr.count("loading nano") == 1
        assert (tmp_path / "a.png").read_bytes() == (tmp_path / "one.png").read_bytes()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--ulysses", "0"], "--ulysses must be at least 1, got 0"),
        (["--ulysses", "3"], "--ulysses must divide the 32 tokens of a prompt"),
        (["--ulysses", "2"], "need 2 processes: torchrun --nproc_per_node 2"),
        (["--ulysses", "2", "--guidance_parallel"], "need 4 processes"),
        (["--guidance_parallel", "-m", "nano-fast"], "--guidance_parallel has no effect without guidance"),
    ],
    ids=str,
)
def test_what_cannot_be_shared_is_refused(flags, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert inference.main(["--device", "cpu", *flags]) == 2
    assert said in capsys.readouterr().err


def test_without_torchrun_nobody_joins():
    with pytest.raises(ValueError, match="need 2 processes"):
        join(2, False, "cpu", environment={})
