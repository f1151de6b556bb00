"""What the page's handlers answer, without a server."""

import io
import re
from collections.abc import Iterator
from typing import Any

import gradio as gr
import pytest
from PIL import Image

from hi_diffusers.demo import history as history_module
from hi_diffusers.demo import starts
from hi_diffusers.demo.history import Entry
from hi_diffusers.demo.layout import FIELDS, FREE_SIZE, is_example
from hi_diffusers.demo.loader import Loader
from hi_diffusers.demo.models import offer_models
from hi_diffusers.demo.page import Page
from hi_diffusers.demo.requests import Limits
from hi_diffusers.demo.studio import Studio
from hi_diffusers.pictures.metadata import encode_picture
from hi_diffusers.request.placement import Placement
from hi_diffusers.weights.source import ModelSource

LIMITS = Limits()


@pytest.fixture
def page(tiny_folder, tmp_path, monkeypatch) -> Iterator[Page]:
    monkeypatch.setattr(starts, "get_upload_folder", lambda: str(tmp_path))
    models = offer_models("nano", ModelSource(model_path=str(tiny_folder)), None)
    loader = Loader(Placement(device="cpu"), None)
    studio = Studio(loader, silence=0.01)
    yield Page(models, "nano", studio, loader, LIMITS)
    studio.close()


def fields(**values: Any) -> list[Any]:
    given = {"prompt": "a red circle", "size": "64x64", "seed": "3", "num_steps": 8, "cache": "taylorseer"} | values
    return [given.get(name) for name in FIELDS]


def shown(page: Page, part: Any, updates: list[dict[Any, Any]]) -> list[Any]:
    """What a part of the page was set to, in order. Gradio refuses an update of nothing."""
    assert all(updates)
    found = [update[part] for update in updates if part in update]
    return [one["value"] if isinstance(one, dict) and "value" in one else one for one in found]


def test_a_drawing_ends_with_its_picture_seed_command_and_history(page):
    updates = list(page.draw("", [], "", None, *fields()))
    assert "2 full, 6 forecast" in shown(page, page.parts.outcome.report, updates)[-1]
    assert "--seed 3" in shown(page, page.parts.outcome.command, updates)[-1]
    (entry,) = shown(page, page.parts.history, updates)[-1]
    assert entry.metadata["options"]["seed"] == 3
    assert Image.open(entry.path).size == (64, 64)


def test_a_failure_is_one_sentence_on_the_page_and_a_traceback_in_the_log(page, monkeypatch, caplog):
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("secret path /srv/weights")

    with monkeypatch.context() as broken:
        broken.setattr("hi_diffusers.demo.studio.draw_batch", fail)
        updates = list(page.draw("", [], "", None, *fields()))
        with pytest.raises(gr.Error, match=r"The drawing failed \(RuntimeError\)"):
            list(page.generate("a"))
    said = shown(page, page.parts.outcome.stage, updates)[-1]
    assert "The drawing failed (RuntimeError); the server keeps running" in said
    assert "/srv" not in said
    assert "Traceback" in caplog.text and "secret path /srv/weights" in caplog.text
    assert shown(page, page.parts.history, list(page.draw("", [], "", None, *fields())))


def test_a_bad_field_is_a_sentence_and_nothing_is_drawn(page):
    updates = list(page.draw("", [], "", None, *fields(num_steps=-4)))
    assert "num_steps must be a whole number" in shown(page, page.parts.outcome.stage, updates)[-1]
    assert not shown(page, page.parts.history, updates)


def test_comparing_needs_a_cache(page):
    updates = list(page.compare("", [], "", None, *fields(cache="off")))
    assert "the cache is off" in shown(page, page.parts.outcome.stage, updates)[-1]


def test_a_comparison_tells_seconds_and_distance(page):
    updates = list(page.compare("", [], "", None, *fields(num_images=3)))
    report = shown(page, page.parts.outcome.report, updates)[-1]
    assert "PSNR" in report and "of 4.00×" in report
    assert len(shown(page, page.parts.outcome.slider, updates)[-1]) == 2


def test_what_is_withheld_leaves_no_file_and_no_picture(page, tmp_path):
    page.studio = Studio(page.loader, lambda image: True)
    for updates in (list(page.draw("", [], "", None, *fields())), list(page.compare("", [], "", None, *fields()))):
        assert "withheld" in shown(page, page.parts.outcome.stage, updates)[-1]
        assert not shown(page, page.parts.history, updates)
    with pytest.raises(gr.Error, match="withheld"):
        list(page.generate("a"))
    page.studio.close()
    assert list(tmp_path.rglob("*.png")) == []


def test_the_history_is_bounded_and_names_what_is_there(page, tmp_path):
    paths = [tmp_path / f"{number}.png" for number in range(history_module.MAX_HISTORY)]
    for path in paths[:-1]:
        path.touch()
    before = [Entry(str(path), "", {}, None) for path in paths]
    after = shown(page, page.parts.history, list(page.draw("", before, "", None, *fields())))[-1]
    assert after[1:] == before[:-1], "what the sweep took is still listed, or something else is not"
    paths[-1].touch()
    after = shown(page, page.parts.history, list(page.draw("", before, "", None, *fields())))[-1]
    assert len(after) == history_module.MAX_HISTORY


def test_expected_steps_speed_and_memory_are_told_before_drawing(page):
    line, *_ = page.on_change(*fields(num_steps=50, fresh_threshold=5))
    assert "<b>10</b> of 50 steps full, at most <b>5.00×</b>" in line
    off, *_ = page.on_change(*fields(cache="off"))
    assert "All <b>8</b> steps are computed" in off
    adaptive, *_ = page.on_change(*fields(cache="taylorseer", schedule="adaptive", target="x0"))
    assert "decided during the drawing" in adaptive


def test_expected_seconds_are_told_once_a_picture_of_that_size_was_drawn(page):
    before, *_ = page.on_change(*fields())
    assert "about <b>" not in before
    list(page.draw("", [], "", None, *fields()))
    after, *_ = page.on_change(*fields())
    assert re.search(r"about <b>[\d.e-]+ s</b>", after)
    other, *_ = page.on_change(*fields(size=FREE_SIZE, width=96, height=48))
    assert "about <b>" not in other


def test_a_free_size_is_refused_in_place(page):
    line, *_ = page.on_change(*fields(size=FREE_SIZE, width=16384, height=1))
    assert "a side would become 0 pixels" in line


def test_an_uploaded_picture_is_bounded_in_pixels(page, tiny_pipe):
    from hi_diffusers import SamplingOptions, generate

    drawn = generate(tiny_pipe, SamplingOptions("a", seed=9, num_steps=4))
    filled = page.on_upload(encode_picture(drawn.image, drawn.metadata, "PNG"), None)
    assert filled[FIELDS.index("seed")] == "9"
    large = encode_picture(Image.new("RGB", (8192, 4096)), drawn.metadata, "PNG")
    with pytest.raises(gr.Error, match="8192x4096 pixels"):
        page.on_upload(large, None)
    plain = io.BytesIO()
    Image.new("RGB", (8, 8)).save(plain, "PNG")
    with pytest.raises(gr.Error, match="carries no hi-diffusers metadata"):
        page.on_upload(plain.getvalue(), None)


def test_another_models_settings_and_examples_come_with_it(page):
    sizes, steps, guidance, prompt, *_ = page.on_model("nano-fast", "my own words", None)
    assert (steps, guidance, prompt) == (16, 0.0, "my own words")
    assert is_example(page.on_model("nano-fast", "", None)[3])
    assert sizes["value"] == "64x64"


def test_a_second_drawing_of_a_visitor_waits_for_the_first(page):
    """Enter while a drawing runs once gave it another ticket, and Stop stopped nothing."""
    ticket, *_ = page.begin("")
    with pytest.raises(gr.Error, match="still running"):
        page.begin(ticket)
    cleared, *_ = page.end(ticket)
    assert cleared == ""
    assert page.begin(ticket)[0] != ticket


def test_a_whole_number_makes_the_same_file_from_a_form_and_from_a_flag(page):
    drawn = [shown(page, page.parts.history, list(page.draw("", [], "", None, *fields(guidance=g))))[-1] for g in (2, 2.0)]
    assert len({one.path for (one,) in drawn}) == 1
