"""Replicas on a Ray cluster: no request is lost or drawn twice, whatever happens to a replica."""

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from PIL import Image

from hi_diffusers import SamplingOptions, generate, load_pipeline
from hi_diffusers.commands import serve as serve_script
from hi_diffusers.pictures.inputs import InputPicture
from hi_diffusers.request.placement import Placement
from hi_diffusers.service.offered import offer_models
from hi_diffusers.service.queueing import Drawn, Failed, Preview, Ticket
from hi_diffusers.service.requests import Limits, Request, check
from hi_diffusers.weights.source import ModelSource
from tests.parallel.test_ranks import free_port, wait_for

ROOT = Path(__file__).resolve().parents[2]
MODELS = offer_models("nano", ModelSource(), None)
NUM_REQUESTS = 200


def asked(seed: int, **more: Any) -> Request:
    return check({"prompt": "a red circle", "seed": seed, "num_steps": 20, **more}, Limits(), MODELS)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--replicas", "2"], "--replicas has no effect without --engine ray"),
        (["--ray_address", "a:1"], "--ray_address has no effect without --engine ray"),
        (["--engine", "ray", "--replicas", "3-1"], "argument --replicas: must be from 1 to 1000, the smaller one"),
        (["--engine", "ray", "--replicas", "many"], "argument --replicas: must be N or MIN-MAX such as 1-4"),
        (
            ["--engine", "ray", "--unload_encoders_after", "9"],
            "--unload_encoders_after has no effect with --engine ray",
        ),
        (["--engine", "ray", "--guidance_parallel"], "--guidance_parallel has no effect with --engine ray"),
        (["--engine", "ray", "--ulysses", "2"], "--ulysses has no effect with --engine ray: a replica draws alone"),
    ],
    ids=str,
)
def test_what_has_no_effect_is_refused(flags, said, capsys, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert serve_script.main(flags) == 2
    assert said in capsys.readouterr().err


@pytest.fixture(scope="module")
def engine() -> Iterator[Any]:
    pytest.importorskip("ray.serve", reason="Ray Serve is not installed")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("RAY_USAGE_STATS_ENABLED", "0"), ("PYTHONPATH", f"{ROOT}:{os.environ.get('PYTHONPATH')}")):
            patch.setenv(name, value)
        from hi_diffusers.service.ray_engine import RayEngine, Recipe, Replicas

        recipe = Recipe(Placement(device="cpu"), None, 1, asked(1), threads=1)
        engine = RayEngine(recipe, Replicas(least=2, most=2), max_queue=1000)
        until = time.monotonic() + 120
        while not engine.is_ready:
            assert time.monotonic() < until
            time.sleep(0.2)
        yield engine
        assert engine.drain(60)


def replicas() -> list[int]:
    """Process ids of this process's replicas."""
    below = psutil.Process().children(recursive=True)
    return [one.pid for one in below if one.cmdline() and one.cmdline()[0].startswith("ray::ServeReplica")]


def wait_until(is_so: Any, seconds: float = 240) -> None:
    until = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < until
        time.sleep(0.1)


@pytest.mark.slow
def test_a_killed_replica_loses_no_request_and_a_new_model_none_either(engine):
    told: list[tuple[int, Any]] = []
    for seed in range(NUM_REQUESTS):
        ticket = Ticket(asked(seed), f"client {seed % 3}", lambda event, seed=seed: told.append((seed, event)))
        engine.admit(ticket)
    wait_until(lambda: len(told) > 20)
    os.kill(replicas()[0], signal.SIGKILL)
    wait_until(lambda: len(told) > 80)
    engine.reload()  # one replica after another, while the others draw
    wait_until(lambda: len(told) >= NUM_REQUESTS)
    time.sleep(1)  # in which nothing may come twice
    assert Counter(seed for seed, _ in told) == dict.fromkeys(range(NUM_REQUESTS), 1)
    assert all(isinstance(event, Drawn) for _, event in told)
    pipe = load_pipeline("nano", device="cpu")
    for seed, event in told[::67]:
        alone = generate(pipe, SamplingOptions("a red circle", seed=seed, num_steps=20))
        assert event.picture.image.tobytes() == alone.image.tobytes()


@pytest.mark.slow
def test_a_picture_to_start_from_is_sent_with_the_request(engine, tmp_path):
    Image.new("RGB", (64, 64), "teal").save(tmp_path / "start.png")
    told: list[Any] = []
    request = asked(5, image=InputPicture.of(tmp_path / "start.png"))
    engine.admit(Ticket(request, "a", told.append))
    wait_until(lambda: told)
    assert isinstance(told[0], Drawn)
    assert told[0].picture.metadata["options"]["image"] == request.options.settings()["image"]


@pytest.mark.slow
def test_previews_arrive_and_what_nobody_waits_for_ends(engine):
    told: list[Any] = []
    engine.admit(Ticket(asked(5), "a", told.append, num_previews=2))
    wait_until(lambda: any(isinstance(event, Drawn) for event in told))
    assert [type(event) for event in told] == [Preview, Preview, Drawn]
    long: list[Any] = []
    tickets = [Ticket(asked(seed, num_steps=100, cache="off"), "a", long.append) for seed in range(4)]
    for ticket in tickets:
        engine.admit(ticket)
    time.sleep(1)
    for ticket in tickets:
        engine.cancel(ticket)
    began, told = time.monotonic(), []
    engine.admit(Ticket(asked(6), "a", told.append))
    wait_until(lambda: told)
    assert time.monotonic() < began + 5 and long == []


@pytest.mark.slow
def test_a_failed_drawing_is_told(engine):
    told: list[Any] = []
    request = asked(7)
    drawing = request.drawings[0]
    unknown = replace(drawing, options=replace(drawing.options, scheduler="unknown"))
    engine.admit(Ticket(Request(request.model, (unknown,), request.asked), "a", told.append))
    wait_until(lambda: told)
    assert isinstance(told[0], Failed) and "unknown" in str(told[0].error)


@pytest.mark.slow
def test_the_server_draws_by_replicas(tmp_path):
    pytest.importorskip("ray.serve", reason="Ray Serve is not installed")
    openai = pytest.importorskip("openai", reason="openai is not installed")
    port = free_port()
    command = [sys.executable, ROOT / "serve.py", "--device", "cpu", "--engine", "ray", "--replicas", 1, "--port", port]
    variables = os.environ | {
        "RAY_USAGE_STATS_ENABLED": "0",
        "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH')}",
        "HF_HUB_OFFLINE": "1",
    }
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(list(map(str, command)), cwd=tmp_path, env=variables, stdout=log, stderr=log)
    try:
        wait_for("nano is loaded", tmp_path / "log")
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none")
        first, again = (
            client.images.generate(prompt="a red circle", extra_body={"seed": 7}).data[0].b64_json for _ in range(2)
        )
        assert first == again
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
