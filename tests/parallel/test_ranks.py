"""One picture drawn by several processes (gloo, one thread each) is the picture that one process draws."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from PIL import Image

from hi_diffusers.commands import inference
from hi_diffusers.denoising.ranks import Split, join
from hi_diffusers.pictures.metrics import psnr
from tests.parallel.worker import DRAWN

ROOT = Path(__file__).resolve().parents[2]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return port


def torchrun_command(count: int, *command: Any) -> tuple[list[str], dict[str, str]]:
    words = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", count, "--master_port", free_port()]
    variables = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    return list(map(str, [*words, *command])), variables


def torchrun(count: int, *command: Any, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    words, variables = torchrun_command(count, *command)
    return subprocess.run(words, cwd=cwd, env=variables, capture_output=True, text=True, timeout=300)


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
    assert set(drawn) == set(alone) == {*DRAWN, "batch", "LoRA", "nf4"}
    for name in drawn:
        (pixels, kinds, kept), (expected, of_one, whole) = drawn[name], alone[name]
        assert kinds == of_one, f"{name}: the ranks decided differently"
        # products of 4-bit weights are rounded to bf16, and so depend on how many rows are multiplied at once
        assert (pixels - expected).abs().max() < (5e-2 if name == "nf4" else 1e-5), name
        if name in ("module", "residual", "padded", "adaptive", "from a picture", "batch", "LoRA", "nf4"):
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


@pytest.mark.slow
def test_what_is_refused_is_said_once(tmp_path):
    done = torchrun(2, ROOT / "inference.py", "--ulysses", 2, "--num_steps", 0, cwd=tmp_path)
    assert done.returncode and done.stderr.count("inference.py: error:") == 1
    done = torchrun(3, ROOT / "inference.py", "--ulysses", 2, "--device", "cpu", cwd=tmp_path)
    assert "--ulysses 2 needs 2 processes or a multiple, got 3" in done.stderr


@pytest.mark.slow
def test_groups_of_ranks_are_shards_of_one_run(tmp_path):
    (tmp_path / "prompts.txt").write_text("\n".join(f"a small red star number {n}" for n in range(6)))
    fixed = ["--prompt_file", "prompts.txt", "--num_steps", 8, "--device", "cpu", "--threads", 1]
    one = torchrun(1, ROOT / "sampling.py", *fixed, "--output_dir", "one", cwd=tmp_path)
    assert one.returncode == 0, one.stderr
    four = torchrun(4, ROOT / "sampling.py", *fixed, "--output_dir", "four", "--ulysses", 2, cwd=tmp_path)
    assert four.returncode == 0, four.stderr
    assert sorted(path.name for path in (tmp_path / "four").glob("manifest*")) != ["manifest.jsonl"]
    names = sorted(path.name for path in (tmp_path / "one").glob("*.png"))
    assert len(names) == 6 and names == sorted(path.name for path in (tmp_path / "four").glob("*.png"))
    for name in names:
        assert psnr(Image.open(tmp_path / "one" / name), Image.open(tmp_path / "four" / name)) >= 60


@contextmanager
def started(count: int, *command: Any, cwd: Path) -> Iterator[subprocess.Popen[str]]:
    words, variables = torchrun_command(count, *command)
    with open(cwd / "log", "w") as log:
        process = subprocess.Popen(words, cwd=cwd, env=variables, stdout=log, stderr=log, text=True)
        try:
            yield process
        finally:
            process.kill()
            process.wait()


def wait_for(said: str, log: Path) -> None:
    until = time.monotonic() + 120
    while said not in log.read_text():
        assert time.monotonic() < until, log.read_text()
        time.sleep(0.1)


def ranks_of(process: subprocess.Popen[str]) -> dict[int, psutil.Process]:
    return {int(one.environ()["RANK"]): one for one in psutil.Process(process.pid).children()}


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_a_rank_that_is_killed_ends_the_others(tmp_path, killed):
    long = ["--num_steps", 1000, "--cache", "off", "--device", "cpu", "-o", "a.png"]
    with started(2, ROOT / "inference.py", "--ulysses", 2, *long, cwd=tmp_path) as process:
        wait_for("step/s", tmp_path / "log")
        ranks = ranks_of(process)
        ranks[killed].kill()
        assert process.wait(60) != 0
        assert not any(one.is_running() and one.status() != "zombie" for one in ranks.values())
    assert not (tmp_path / "a.png").exists()


@pytest.mark.slow
def test_ctrl_c_ends_all(tmp_path):
    long = ["--num_steps", 1000, "--cache", "off", "--device", "cpu", "-o", "a.png"]
    with started(2, ROOT / "inference.py", "--ulysses", 2, *long, cwd=tmp_path) as process:
        wait_for("step/s", tmp_path / "log")
        ranks = ranks_of(process)
        for one in (*ranks.values(), process):  # as a terminal does
            one.send_signal(signal.SIGINT)
        process.wait(60)
        assert not any(one.is_running() and one.status() != "zombie" for one in ranks.values())
    said = (tmp_path / "log").read_text()
    assert said.count("inference.py: interrupted") == 1 and "failed" not in said


@pytest.mark.slow
def test_a_server_draws_with_its_ranks_and_ends_with_them(tmp_path):
    openai = pytest.importorskip("openai", reason="openai is not installed")
    port = free_port()
    command = [ROOT / "serve.py", "--ulysses", 2, "--device", "cpu", "--port", port]
    with started(2, *command, cwd=tmp_path) as process:
        wait_for("nano is loaded", tmp_path / "log")
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none")
        asked = {"prompt": "a red circle", "extra_body": {"seed": 7}}
        first, again = (client.images.generate(**asked).data[0].b64_json for _ in range(2))
        assert first == again
        with pytest.raises(openai.APITimeoutError):  # a client that goes away stops both ranks
            client.with_options(timeout=1, max_retries=0).images.generate(
                prompt="a red circle", extra_body={"steps": 100, "cache": "off", "full_steps": None}, n=4
            )
        assert client.images.generate(**asked).data[0].b64_json == first
        ranks = ranks_of(process)
        for one in ranks.values():
            one.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    assert '"finished": true' in (tmp_path / "log").read_text()


@pytest.mark.slow
def test_the_page_draws_with_its_ranks(tmp_path):
    gradio_client = pytest.importorskip("gradio_client", reason="gradio_client is not installed")
    port = free_port()
    command = [ROOT / "gradio_demo.py", "--ulysses", 2, "--device", "cpu", "--port", port]
    with started(2, *command, cwd=tmp_path) as process:
        wait_for("serving at", tmp_path / "log")
        client = gradio_client.Client(
            f"http://127.0.0.1:{port}", verbose=False, download_files=str(tmp_path / "downloads")
        )
        path, _ = client.predict("a red circle", seed=7, api_name="/generate")
        left = client.submit("a red circle", num_steps=100, cache="off", api_name="/generate")
        time.sleep(1)
        left.cancel()
        again, _ = client.predict("a red circle", seed=7, cache="best", api_name="/generate")
        assert Path(path).read_bytes() == Path(again).read_bytes()
        for one in ranks_of(process).values():
            one.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0


@pytest.mark.slow
def test_ctrl_c_while_the_model_is_loaded_ends_all(tmp_path):
    with started(2, ROOT / "inference.py", "--ulysses", 2, "--device", "cpu", "-o", "a.png", cwd=tmp_path) as process:
        wait_for("loading nano", tmp_path / "log")
        ranks = ranks_of(process)
        for one in (*ranks.values(), process):
            one.send_signal(signal.SIGINT)
        process.wait(60)
        assert not any(one.is_running() and one.status() != "zombie" for one in ranks.values())
    assert "failed" not in (tmp_path / "log").read_text() and not (tmp_path / "a.png").exists()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--ulysses", "0"], "--ulysses must be at least 1, got 0"),
        (["--ulysses", "3"], "--ulysses must divide the 4 heads, got 3"),
        (["--ulysses", "4", "--max_sequence_length", "30"], "--ulysses must divide the 30 tokens of a prompt"),
        (["--ulysses", "2"], "needs 2 processes: start it by torchrun --nproc_per_node 2"),
        (["--ulysses", "2", "--guidance_parallel"], "needs 4 processes"),
        (["--guidance_parallel", "-m", "nano-fast"], "--guidance_parallel has no effect without guidance"),
        (["--ulysses", "2", "--quantization", "nf4", "--save_quantized", "q"], "have no effect with --save_quantized"),
    ],
    ids=str,
)
def test_what_cannot_be_shared_is_refused(flags, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert inference.main(["--device", "cpu", *flags]) == 2
    assert said in capsys.readouterr().err


def test_tokens_must_be_divisible():
    with pytest.raises(ValueError, match="ulysses must divide the 4225 tokens of the picture, got 2"):
        Split(2).check(True, heads=20, tokens_of_the_picture=65 * 65)


def test_without_torchrun_nobody_joins():
    with pytest.raises(ValueError, match="needs 2 processes"):
        join(Split(2), "cpu", environment={})


@pytest.mark.slow
def test_the_benchmark_s_bytes_are_those_that_attention_sends():
    done = torchrun(2, "-m", "tests.parallel.bytes_worker")
    assert done.returncode == 0, done.stderr
    assert "851968 bytes a step" in done.stdout
