"""The engine without a web: batches, turns, cancelled and failed pictures, memory, draining."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from cache_functions import StepRecord
from hi_diffusers.denoising.steps import Interrupted
from hi_diffusers.pictures.metrics import psnr
from hi_diffusers.request.placement import Placement
from hi_diffusers.service import engine as engine_module
from hi_diffusers.service.engine import Engine
from hi_diffusers.service.loader import Loader
from hi_diffusers.service.offered import offer_models
from hi_diffusers.service.queueing import Draining, Drawn, Failed, Full, Preview, Ticket
from hi_diffusers.service.requests import Limits, Request, check
from hi_diffusers.weights.source import ModelSource

LIMITS = Limits(num_images=16)


@pytest.fixture(scope="module")
def models():
    return offer_models("nano", ModelSource(), None)


class Client:
    """Keeps what it is told."""

    def __init__(self, request: Request, key: str = "a", num_previews: int = 0):
        self.ticket = Ticket(request, key, self._tell, num_previews)
        self.told: list[Any] = []
        self._changed = threading.Condition()

    def _tell(self, event: Any) -> None:
        with self._changed:
            self.told.append(event)
            self._changed.notify_all()

    def wait_for(self, kind: type = Drawn, number: int = 1, seconds: float = 20) -> list[Any]:
        def found() -> list[Any]:
            return [one for one in self.told if isinstance(one, kind)]

        with self._changed:
            assert self._changed.wait_for(lambda: len(found()) >= number, seconds), self.told
        return found()


class Stage:
    """Stands for `draw_batch`: records its batches, and draws nothing."""

    def __init__(self, steps: int = 4):
        self.batches: list[list[str]] = []
        self.most, self.bad, self.steps = 99, "", steps
        self.gate = threading.Event()
        self.gate.set()

    def __call__(self, model: Any, drawings: Sequence[Any], *, embeds: Any, on_step: Callable[..., bool]) -> list[Any]:
        self.batches.append([one.options.prompt for one in drawings])
        if len(drawings) > self.most:
            raise torch.OutOfMemoryError("out of memory")
        for index in range(self.steps):
            assert self.gate.wait(30)
            if not on_step(StepRecord(index, "full", 0.0, 2), lambda number=0: None):
                raise Interrupted("stopped")
        if self.bad in self.batches[-1]:
            raise RuntimeError("NaN")
        seconds = SimpleNamespace(whole=0.01)
        return [SimpleNamespace(image=None, seconds=seconds, prompt=one.options.prompt) for one in drawings]


class FakeLoader:
    """Opens sessions that load nothing."""

    def __init__(self) -> None:
        self.opened, self.fails = 0, False

    def placement(self, request: Request) -> Placement:
        return Placement(device="cpu")

    def open(self, request: Request) -> tuple[Any, list[str]]:
        self.opened += 1
        if self.fails:
            raise ValueError("the files are gone")
        session = SimpleNamespace(
            placement=Placement(device="cpu"),
            model=SimpleNamespace(notices=()),
            encode=lambda drawings: ([], None),
            dropped=0,
        )
        session.drop_encoders = lambda: setattr(session, "dropped", session.dropped + 1)
        self.session = session
        return session, []

    def explained(self, request: Request) -> Any:
        return nullcontext()


@pytest.fixture
def stage(monkeypatch) -> Stage:
    made = Stage()
    monkeypatch.setattr(engine_module, "draw_batch", made)
    monkeypatch.setattr(engine_module, "warm_up", lambda *_: None)
    return made


@pytest.fixture
def make(models) -> Iterator[Callable[..., Engine]]:
    made: list[Engine] = []

    def of(loader: Any = None, **settings: Any) -> Engine:
        request = check({"prompt": "a"}, LIMITS, models)
        made.append(Engine(loader or FakeLoader(), request, say=lambda _: None, **settings))
        deadline = time.monotonic() + 60
        while not made[-1].is_ready and time.monotonic() < deadline:
            time.sleep(0.005)
        return made[-1]

    yield of
    for engine in made:
        engine.drain(0)


@pytest.fixture
def ask(models) -> Callable[..., Client]:
    def asked(prompt: str, key: str = "a", num_previews: int = 0, **values: Any) -> Client:
        request = check({"prompt": prompt, "seed": 1, "num_steps": 8} | values, LIMITS, models)
        return Client(request, key, num_previews)

    return asked


def test_equal_settings_that_wait_together_are_one_batch_and_others_are_not(stage, make, ask):
    engine = make(max_batch=3, batch_wait=0.0)
    stage.gate.clear()
    first = ask("first")
    engine.admit(first.ticket)
    while not stage.batches:
        time.sleep(0.001)
    clients = [ask(f"{n}", seed=n) for n in range(5)] + [ask("other", guidance=7.0), ask("cached", cache="taylorseer")]
    for client in clients:
        engine.admit(client.ticket)
    assert engine.num_waiting == 7
    stage.gate.set()
    for client in [first, *clients]:
        (drawn,) = client.wait_for()
        assert drawn.picture.prompt == client.ticket.request.options.prompt
    assert stage.batches == [["first"], ["0", "1", "2"], ["3", "4"], ["other"], ["cached"]]


def test_a_picture_waits_a_moment_for_others(stage, make, ask):
    engine = make(max_batch=2, batch_wait=5.0)
    clients = [ask("a"), ask("b", key="b")]
    engine.admit(clients[0].ticket)
    time.sleep(0.05)
    assert stage.batches == []
    engine.admit(clients[1].ticket)
    for client in clients:
        assert client.wait_for()[0].batch == 2
    assert stage.batches == [["a", "b"]]


def test_the_pictures_of_a_request_follow_each_other(stage, make, ask):
    engine = make(max_batch=2, batch_wait=0.0)
    client = ask("a", num_images=3)
    engine.admit(client.ticket)
    assert sorted(one.number for one in client.wait_for(number=3)) == [0, 1, 2]


def test_keys_take_turns(stage, make, ask):
    engine = make(max_batch=1, batch_wait=0.0)
    stage.gate.clear()
    engine.admit(ask("first").ticket)
    while not stage.batches:
        time.sleep(0.001)
    clients = [ask(f"greedy{n}", key="greedy") for n in range(4)] + [ask("modest", key="modest")]
    for client in clients:
        engine.admit(client.ticket)
    stage.gate.set()
    for client in clients:
        client.wait_for()
    assert [one for (one,) in stage.batches].index("modest") <= 2


def test_who_goes_away_frees_the_place_and_the_others_of_the_batch_go_on(stage, make, ask):
    engine = make(max_batch=2, batch_wait=1.0)
    stage.gate.clear()
    gone, stays, waits = ask("gone"), ask("stays"), ask("waits", guidance=9.0)
    for client in (gone, stays, waits):
        engine.admit(client.ticket)
    while not stage.batches:
        time.sleep(0.001)
    engine.cancel(gone.ticket)
    engine.cancel(waits.ticket)
    assert engine.num_waiting == 0
    stage.gate.set()
    stays.wait_for()
    assert gone.told == waits.told == [] and stage.batches == [["gone", "stays"]]


def test_a_batch_that_nobody_wants_ends_within_a_step(stage, make, ask):
    engine = make(max_batch=2, batch_wait=0.0)
    stage.steps = 10**9
    gone, after = ask("gone"), ask("after", guidance=9.0)
    engine.admit(gone.ticket)
    while not stage.batches:
        time.sleep(0.001)
    stage.steps = 2
    engine.admit(after.ticket)
    engine.cancel(gone.ticket)
    after.wait_for()


def test_a_failed_drawing_is_its_own_request_s_alone(stage, make, ask):
    engine = make(max_batch=3, batch_wait=0.2)
    stage.bad = "bad"
    good, bad, fine = ask("good"), ask("bad"), ask("fine")
    for client in (good, bad, fine):
        engine.admit(client.ticket)
    for client in (good, fine):
        assert client.wait_for()[0].batch == 1
    assert str(bad.wait_for(Failed)[0].error) == "NaN"


def test_out_of_memory_makes_the_batches_smaller_and_loses_nothing(stage, make, ask):
    engine = make(max_batch=8, batch_wait=0.2)
    stage.most = 2
    client = ask("a", num_images=8)
    engine.admit(client.ticket)
    client.wait_for(number=8)
    assert engine.max_batch == 2 and [len(one) for one in stage.batches] == [8, 4, 2, 2, 4, 2, 2]
    stage.most = 0
    alone = ask("alone")
    engine.admit(alone.ticket)
    assert isinstance(alone.wait_for(Failed)[0].error, torch.OutOfMemoryError)


def test_a_full_queue_says_when_to_come_again(stage, make, ask):
    engine = make(max_batch=1, batch_wait=0.0, max_queue=3)
    stage.gate.clear()
    engine.admit(ask("drawing").ticket)
    while not stage.batches:
        time.sleep(0.001)
    engine.admit(ask("two", num_images=2).ticket)
    with pytest.raises(Full) as refused:
        engine.admit(ask("two more", num_images=2).ticket)
    assert refused.value.seconds >= 1
    engine.admit(ask("one more").ticket)
    stage.gate.set()


def test_draining_finishes_what_was_admitted_and_admits_nothing_more(stage, make, ask):
    engine = make(max_batch=1, batch_wait=0.0)
    clients = [ask(f"{n}") for n in range(5)]
    for client in clients:
        engine.admit(client.ticket)
    assert engine.drain(30)
    assert all(client.wait_for() for client in clients)
    assert not engine.is_ready
    with pytest.raises(Draining):
        engine.admit(ask("late").ticket)


def test_what_is_not_drained_in_time_is_returned(stage, make, ask):
    engine = make(max_batch=1, batch_wait=0.0)
    stage.gate.clear()
    clients = [ask("drawing"), ask("waiting", num_images=2)]
    for client in clients:
        engine.admit(client.ticket)
    assert not engine.drain(0.2)
    stage.gate.set()
    assert [len(client.wait_for(Failed)) for client in clients] == [1, 1], "one answer for each request"
    assert all(isinstance(client.told[0].error, Draining) for client in clients)


def test_previews_are_spread_over_the_full_steps(stage, make, ask):
    engine = make(max_batch=1, batch_wait=0.0)
    stage.steps = 8
    client = ask("a", num_previews=3)
    engine.admit(client.ticket)
    client.wait_for()
    assert [one.index for one in client.told if isinstance(one, Preview)] == [0, 1, 2]
    judged = make(is_withheld=lambda image: True)
    client = ask("a", num_previews=3)
    judged.admit(client.ticket)
    assert client.wait_for()[0].withheld and len(client.told) == 1, "a judge sees no previews"


def test_the_model_is_loaded_again_between_two_batches(stage, make, ask):
    loader = FakeLoader()
    engine = make(loader)
    engine.reload()
    engine.admit((client := ask("a")).ticket)
    client.wait_for()
    assert loader.opened == 2
    loader.fails = True
    engine.reload()
    engine.admit((client := ask("a")).ticket)
    assert "the files are gone" in str(client.wait_for(Failed)[0].error)
    loader.fails = False
    engine.admit((client := ask("a")).ticket)
    client.wait_for()
    assert engine.is_ready


def test_idle_encoders_leave(stage, make, ask):
    loader = FakeLoader()
    engine = make(loader, idle_encoders=0.1)
    deadline = time.monotonic() + 10
    while not loader.session.dropped and time.monotonic() < deadline:
        time.sleep(0.01)
    assert loader.session.dropped
    engine.admit((client := ask("a")).ticket)
    client.wait_for()


def test_pictures_of_a_batch_are_those_that_were_drawn_alone(make, ask):
    """The real model: a batch rounds elsewhere, and nothing else."""
    engine = make(Loader(Placement(device="cpu"), None), max_batch=4, batch_wait=2.0)
    prompts = ["a red circle on a blue background", "a green tree on a pink background", "two yellow stars", "a"]
    clients = [ask(prompt, key=prompt, seed=n, num_steps=50) for n, prompt in enumerate(prompts)]
    for client in clients:
        engine.admit(client.ticket)
    together = [client.wait_for()[0] for client in clients]
    assert {one.batch for one in together} == {4}
    worst = 200.0
    for client, one in zip(clients, together, strict=True):
        alone = Client(replace(client.ticket.request))
        engine.admit(alone.ticket)
        worst = min(worst, psnr(alone.wait_for()[0].picture.pixels, one.picture.pixels))
        difference = np.abs(alone.told[0].picture.pixels - one.picture.pixels)
        assert difference.max() < 1e-2
    print(f"a batch of four against each alone: at least {worst:.1f} dB")
    assert worst >= 60
