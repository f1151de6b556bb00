"""One drawing at a time, told step by step."""

import gc
import threading
import time
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from cache_functions import CacheConfig
from hi_diffusers import SamplingOptions, generate
from hi_diffusers.demo.studio import Finished, Progress, Studio, Waiting
from hi_diffusers.denoising.steps import Interrupted
from hi_diffusers.request.placement import Placement
from hi_diffusers.service.loader import Loader
from hi_diffusers.service.offered import OfferedModel, TokenCounter, offer_models
from hi_diffusers.service.requests import Limits, Request, check
from hi_diffusers.weights.source import ModelSource


@pytest.fixture(scope="module")
def models(tiny_folder) -> dict[str, OfferedModel]:
    """Random weights draw in no time; nano-dev has its own."""
    offered = dict(offer_models("nano", ModelSource(model_path=str(tiny_folder)), None))
    return offered | {"nano-dev": offer_models("nano-dev", ModelSource(model_path=str(tiny_folder)), None)["nano-dev"]}


@pytest.fixture
def loader() -> Loader:
    return Loader(Placement(device="cpu"), None)


@pytest.fixture
def studio(loader) -> Iterator[Studio]:
    made = Studio(loader)
    yield made
    made.close()


def ask(models: dict[str, OfferedModel], **values: Any) -> Request:
    settings = {"prompt": "a red circle", "seed": 3, "num_steps": 10, "cache": "taylorseer"}
    return check(settings | values, Limits(num_steps=1000), models)


def finished(events: Iterator[Any]) -> list[Finished]:
    return [event for event in events if isinstance(event, Finished)]


def test_a_drawing_is_told_step_by_step_and_is_what_generate_draws(studio, models, tiny_pipe):
    events = list(studio.draw(ask(models)))
    steps = [event for event in events if isinstance(event, Progress)]
    assert [len(step.records) for step in steps] == list(range(1, 11))
    assert [record.kind for record in steps[-1].records].count("full") == 3
    expected = generate(tiny_pipe, SamplingOptions(prompt="a red circle", seed=3, num_steps=10), CacheConfig())
    assert np.array_equal(finished(iter(events))[0].picture.pixels, expected.pixels)


def test_each_picture_of_a_request_has_its_own_seed(studio, models):
    pictures = finished(studio.draw(ask(models, num_images=3)))
    assert [one.number for one in pictures] == [0, 1, 2]
    assert [one.picture.metadata["options"]["seed"] for one in pictures] == [3, 4, 5]


def test_closing_the_iterator_stops_the_drawing_within_a_step(studio, models):
    """Gradio closes it where a client is gone, in the thread that serves all others: it must not wait."""
    events = studio.draw(ask(models, num_steps=1000, cache="off"))
    next(event for event in events if isinstance(event, Progress))
    began = time.monotonic()
    events.close()
    assert time.monotonic() - began < 0.1
    assert finished(studio.draw(ask(models))), "the next drawing waits for nothing but a step"
    assert time.monotonic() - began < 5, "the drawing went on after its watcher had gone"


def test_stop_ends_a_drawing_with_interrupted(studio, models):
    ticket = studio.open_ticket()
    events = studio.draw(ask(models, num_steps=1000, cache="off"), ticket)
    next(event for event in events if isinstance(event, Progress))
    studio.stop(ticket)
    with pytest.raises(Interrupted):
        list(events)


def test_stop_reaches_a_drawing_that_has_not_begun_and_all_of_its_ticket(studio, models):
    ticket, other = studio.open_ticket(), studio.open_ticket()
    studio.stop(ticket)
    for _ in range(2):  # a comparison draws twice with one ticket
        with pytest.raises(Interrupted):
            list(studio.draw(ask(models), ticket))
    assert finished(studio.draw(ask(models), other))


def test_a_ticket_is_held_until_it_is_closed(studio):
    ticket = studio.open_ticket()
    assert studio.holds(ticket)
    studio.close_ticket(ticket)
    assert not studio.holds(ticket) and not studio.holds("")
    studio.stop("nobody's")
    assert not studio.holds("nobody's")


def test_closing_the_studio_ends_a_drawing_of_nobody(loader, models):
    studio = Studio(loader)
    events = studio.draw(ask(models, num_steps=1000, cache="off"))
    next(event for event in events if isinstance(event, Progress))
    began = time.monotonic()
    studio.close()
    assert time.monotonic() - began < 5


def test_a_watcher_hears_that_a_slow_step_is_on_its_way(loader, models):
    """Steps of the real model take longer than a watcher may be left without a word."""
    studio = Studio(loader, silence=0.001)
    assert any(isinstance(event, Waiting) for event in studio.draw(ask(models)))
    studio.close()


def test_a_failure_reaches_its_own_visitor_and_the_next_picture_is_right(studio, models, monkeypatch):
    right = finished(studio.draw(ask(models)))[0].picture.pixels

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("the card fell out")

    with monkeypatch.context() as broken:
        broken.setattr("hi_diffusers.demo.studio.draw_batch", fail)
        with pytest.raises(RuntimeError, match="the card fell out"):
            list(studio.draw(ask(models)))
    assert np.array_equal(finished(studio.draw(ask(models)))[0].picture.pixels, right)


def test_drawings_asked_for_at_once_do_not_mix(studio, models):
    found: dict[int, int] = {}

    def draw(seed: int) -> None:
        found[seed] = finished(studio.draw(ask(models, seed=seed)))[0].picture.metadata["options"]["seed"]

    threads = [threading.Thread(target=draw, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {seed: seed for seed in range(6)}


def test_a_picture_that_was_drawn_before_is_drawn_again_only_if_asked(studio, models):
    first = finished(studio.draw(ask(models)))[0].picture
    assert finished(studio.draw(ask(models), reuse=True))[0].picture is first
    assert finished(studio.draw(ask(models)))[0].picture is not first
    other = finished(studio.draw(ask(models, full_steps=5, schedule="cosine"), reuse=True))[0].picture
    assert other.metadata["cache"] != first.metadata["cache"]


def test_another_model_frees_the_one_before(studio, models):
    list(studio.draw(ask(models)))
    old = weakref.ref(studio._session.model.transformer)
    seen_while_loading = []
    open_session = studio._loader.open
    studio._loader.open = lambda *args: seen_while_loading.append(old()) or open_session(*args)
    list(studio.draw(ask(models, model="nano-dev", num_steps=4)))
    gc.collect()
    assert seen_while_loading == [None], "both models were in memory at once"


def test_what_the_filter_flags_is_withheld_and_has_no_previews(loader, models):
    judged = []
    studio = Studio(loader, lambda image: judged.append(image) or True)
    events = list(studio.draw(ask(models, num_steps=60, cache="off")))
    studio.close()
    assert finished(iter(events))[0].withheld
    assert len(judged) == 1
    assert not any(event.preview for event in events if isinstance(event, Progress))


def test_previews_come_now_and_then(studio, models):
    events = list(studio.draw(ask(models, num_steps=300, cache="off")))
    previews = [event.preview for event in events if isinstance(event, Progress) and event.preview]
    assert previews and len(previews) < 100
    assert previews[0].size == finished(iter(events))[0].picture.image.size


def test_tokens_are_counted_without_the_model(models):
    request = check({"prompt": "a red circle on a blue background, and a zeppelin " * 4}, Limits(), models)
    count = TokenCounter().count(request.model, request.options)
    assert count.limit == 32 < count.tokens
    assert count.lost.endswith("zeppelin")
