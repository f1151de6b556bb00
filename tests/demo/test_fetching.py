"""Models that the operator's page downloads, from a hub on this machine."""

import threading
import time
from collections.abc import Iterator

import pytest

from hi_diffusers.demo import fetching, figures
from hi_diffusers.demo.fetching import Fetcher, Fetching
from hi_diffusers.demo.page import Page
from hi_diffusers.demo.studio import Studio
from hi_diffusers.request.placement import Placement
from hi_diffusers.service.loader import Loader
from hi_diffusers.service.offered import OfferedModel, offer_models
from hi_diffusers.service.requests import Limits
from hi_diffusers.weights.source import ModelSource
from tests.hub_server import Hub, served_here

REPO = "somebody/tiny"


@pytest.fixture
def hub(tmp_path, tiny_folder, monkeypatch) -> Iterator[Hub]:
    with served_here(monkeypatch, tmp_path / "cache") as server:
        server.repos[REPO] = tiny_folder
        yield server


def offered() -> dict[str, OfferedModel]:
    return dict(offer_models("nano", ModelSource(model_path=REPO), None))


def test_a_download_tells_how_far_it_is_and_the_model_is_there_then(hub, monkeypatch):
    model = offered()["nano"]
    assert REPO in model.missing and not [one for one in hub.asked if "/resolve/" in one]
    seen = list(Fetcher(look_seconds=0.001).fetch(model))
    assert seen and all(one.repo == REPO and 0 <= one.done <= one.whole for one in seen)
    assert [one.done for one in seen] == sorted(one.done for one in seen)
    assert not offered()["nano"].missing


def test_two_who_ask_for_the_same_model_watch_one_download(hub, monkeypatch):
    fetches, goes_on = [], threading.Event()
    real = fetching._fetch

    def slow(*args: object) -> None:
        fetches.append(args)
        goes_on.wait(30)
        real(*args)

    monkeypatch.setattr(fetching, "_fetch", slow)
    fetcher, model = Fetcher(look_seconds=0.001), offered()["nano"]
    watchers = [threading.Thread(target=lambda: list(fetcher.fetch(model))) for _ in range(2)]
    for watcher in watchers:
        watcher.start()
        time.sleep(0.2)
    goes_on.set()
    for watcher in watchers:
        watcher.join(60)
    assert len(fetches) == 1 and not offered()["nano"].missing


def test_a_failed_download_says_why_and_can_be_tried_again(hub):
    fetcher, model = Fetcher(look_seconds=0.001), offered()["nano"]
    hub.gated.add(REPO)
    for _ in range(2):
        with pytest.raises(ValueError, match=f"{REPO} is gated"):
            list(fetcher.fetch(model))
    hub.gated.clear()
    list(fetcher.fetch(model))


def test_the_page_offers_what_was_downloaded(hub, tmp_path):
    loader = Loader(Placement(device="cpu"), None)
    studio = Studio(loader)
    models = dict(offer_models("nano-dev", ModelSource(), None)) | {"nano": offered()["nano"]}
    page = Page(models, "nano-dev", studio, loader, Limits(), offer=offered)
    settings = page.parts.settings
    *progress, last = page.on_fetch("nano")
    assert "asking the hub" in progress[0][settings.fetched]
    assert "nano can be chosen now" in last[settings.fetched]
    assert "nano" in last[page.parts.fields["model"]]["choices"] and "nano" not in last[settings.wanted]["choices"]
    assert page.desk.check({"model": "nano", "prompt": "a"}).model.preset.name == "nano"
    for name in (None, "gone"):
        (refused,) = page.on_fetch(name)
        assert "Choose a model" in refused[settings.fetched]
    studio.close()


def test_only_an_operator_s_page_downloads(tmp_path):
    loader = Loader(Placement(device="cpu"), None)
    studio = Studio(loader)
    page = Page(offer_models("nano", ModelSource(), None), "nano", studio, loader, Limits())
    assert page.parts.settings.fetch is None
    assert page.on_fetch not in [one.fn for one in page.blocks.fns.values()]
    studio.close()


def test_how_far_a_download_is_stands_in_gigabytes():
    told = figures.fetching("full", Fetching("a/<b>", 1_500_000_000, 47_000_000_000))
    assert "a/&lt;b&gt;: 1.50 of 47.00 GB" in told and "value='1500000000'" in told
