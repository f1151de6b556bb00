"""The visit's pictures: laid beside each other, enlarged, packed, back after a reload; without a server."""

import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gradio as gr
import numpy as np
import pytest
from PIL import Image

from hi_diffusers.demo import figures, starts
from hi_diffusers.demo import history as history_module
from hi_diffusers.demo.history import Entry, restored
from hi_diffusers.demo.kept import NUM_PROMPTS, prompts_of
from hi_diffusers.demo.layout import FIELDS
from hi_diffusers.demo.page import KEPT_FIELDS, Page
from hi_diffusers.demo.studio import Studio
from hi_diffusers.pictures.metadata import encode_picture, read_metadata
from hi_diffusers.request.placement import Placement
from hi_diffusers.service.loader import Loader
from hi_diffusers.service.offered import LoraFolder, offer_models
from hi_diffusers.service.requests import Limits
from hi_diffusers.weights.source import ModelSource
from tests.lora_file import write_lora

LIMITS = Limits()


@pytest.fixture(scope="module")
def made(tiny_folder) -> Iterator[Page]:
    models = offer_models("nano", ModelSource(model_path=str(tiny_folder)), None)
    loader = Loader(Placement(device="cpu"), None)
    studio = Studio(loader, silence=0.01)
    yield Page(models, "nano", studio, loader, LIMITS)
    studio.close()


@pytest.fixture
def page(made, tiny_folder, tmp_path, monkeypatch) -> Page:
    """A page that keeps its files in tmp_path / "served", and has the LoRAs of tmp_path / "loras"."""
    for name in ("served", "loras"):
        (tmp_path / name).mkdir()
    write_lora(tiny_folder, tmp_path / "loras" / "style.safetensors")
    monkeypatch.setattr(starts, "get_upload_folder", lambda: str(tmp_path / "served"))
    monkeypatch.setattr(made.desk, "loras", LoraFolder(tmp_path / "loras"))
    monkeypatch.setattr(made.desk, "models", dict(made.desk.models))
    monkeypatch.setattr(made.visit, "max_pixels", LIMITS.upload_pixels)
    made.studio._pace.clear()
    made.studio._kept.clear()
    return made


def fields(**values: Any) -> dict[str, Any]:
    given = {"prompt": "a red circle", "size": "64x64", "seed": "3", "num_steps": 8, "cache": "taylorseer"}
    return dict.fromkeys(FIELDS) | {"guidance": 2.0, "num_images": 1} | given | values


def signed(path: Path) -> dict[str, str]:
    return {"signature": history_module._signature(str(path))}


def draw(page: Page, history: list[Entry], **values: Any) -> tuple[list[Entry], dict[Any, Any]]:
    """The history after a drawing, and everything that the page was set to."""
    shown: dict[Any, Any] = {}
    for update in page.drawings.draw("", history, "", None, *fields(**values).values()):
        shown |= update
    return shown[page.parts.history], shown


def test_several_pictures_are_a_grid_and_each_has_its_own_command(page):
    history, shown = draw(page, [], num_images=3)
    outcome = page.parts.outcome
    assert not shown[outcome.picture]["visible"] and shown[outcome.grid]["visible"]
    drawn = shown[page.parts.drawn]
    assert [one.path for one in drawn] == [path for path, _ in shown[outcome.grid]["value"]]
    assert [one.path for one in reversed(drawn)] == [one.path for one in history]
    for number, seed in enumerate((3, 4, 5)):
        one = page.visit.on_one_of_grid(drawn, None, SimpleNamespace(index=number))
        assert f"--seed {seed} " in one[outcome.command]["value"]
        assert read_metadata(one[outcome.download]["value"])["options"]["seed"] == seed
        assert one[outcome.picture]["visible"] and outcome.grid not in one, "the grid stays for the next choice"
    _, alone = draw(page, history)
    assert alone[page.parts.drawn] == [] and alone[outcome.picture]["visible"] and not alone[outcome.grid]["visible"]


def test_two_pictures_of_the_visit_are_laid_over_each_other(page):
    history, _ = draw(page, [])
    history, _ = draw(page, history, seed="4", cache="off")
    parts, outcome = page.parts, page.parts.outcome
    pinned, button = page.visit.on_beside(history[0], None)
    assert pinned is history[0] and "choose the other one" in button["value"]
    beside = page.visit.on_one_of_grid(history, pinned, SimpleNamespace(index=1))
    assert beside[outcome.slider]["visible"] and not beside[outcome.picture]["visible"]
    laid = page.visit.on_chosen(history, pinned, SimpleNamespace(index=1))
    assert laid[outcome.slider]["value"] == (history[0].path, history[1].path)
    assert laid[parts.pinned] is None and parts.fields["seed"] not in laid, "settings are not loaded on the way"
    told = laid[outcome.report]
    assert "PSNR" in told and "<th scope='row'>seed</th><td>4</td><td>3</td>" in told
    assert "<th scope='row'>cache target</th><td>off</td>" in told and "<th scope='row'>prompt" not in told
    assert page.visit.on_beside(history[0], history[1])[0] is None, "pressed again, it lets go"
    history, _ = draw(page, history, size="80x48")
    other = page.visit.on_chosen(history, history[1], SimpleNamespace(index=0))[outcome.report]
    assert "PSNR" not in other and "differ in size" in other
    Path(history[0].path).unlink()
    for pinned in (history[1], None):
        with pytest.raises(gr.Error, match="no longer on the server"):
            page.visit.on_chosen(history, pinned, SimpleNamespace(index=0))
        with pytest.raises(gr.Error, match="no longer on the server"):
            page.visit.on_one_of_grid(history, pinned, SimpleNamespace(index=0))


def test_an_enlarged_picture_carries_its_settings_and_how_it_was_enlarged(page, monkeypatch):
    warned: list[str] = []
    monkeypatch.setattr("gradio.Warning", warned.append)
    (entry,), _ = draw(page, [])
    _, picture, download = page.visit.on_enlarge(4, entry)
    assert picture["value"] == download["value"]
    with Image.open(picture["value"]) as enlarged:
        assert enlarged.size == (256, 256)
    metadata = read_metadata(picture["value"])
    assert metadata.pop("enlarged") == {"factor": 4, "method": "Lanczos"} and metadata == entry.metadata
    assert page.visit.on_enlarge(1, entry)[1]["value"] == entry.path
    page.visit.max_pixels = 128 * 128
    assert page.visit.on_enlarge(4, entry)[0] == 1, "what is shown is as drawn"
    assert "would have 256x256 pixels; 16384 are allowed" in warned.pop()
    Path(entry.path).unlink()
    for factor in (1, 2):
        assert page.visit.on_enlarge(factor, entry)[0] == 1 and "no longer on the server" in warned.pop()


def test_all_pictures_are_packed_in_the_order_in_which_they_were_drawn(page, monkeypatch):
    history, _ = draw(page, [], num_images=3)
    Path(history[1].path).unlink()
    packed = page.visit.on_pack(history)["value"]
    assert page.visit.on_pack(history)["value"] == packed, "another file for the same pictures"
    with zipfile.ZipFile(packed) as archive:
        assert archive.namelist() == ["01-hidream-3.png", "02-hidream-5.png"]
        assert archive.read("02-hidream-5.png") == Path(history[0].path).read_bytes()
    with pytest.raises(gr.Error, match="no picture of this visit"):
        page.visit.on_pack(history[1:2])
    monkeypatch.setattr("hi_diffusers.demo.history.MAX_ARCHIVE_BYTES", 1000)
    with pytest.raises(gr.Error, match="download them one by one"):
        page.visit.on_pack(history)


def test_what_the_browser_kept_comes_back_after_a_reload(page):
    values = fields(seed=str(2**63 - 1), num_images=2, model="nano-fast", size="80x48", quality="", max_order="2")
    history, shown = draw(page, [], num_images=2)
    kept = json.loads(json.dumps(shown[page.parts.browser.pictures]))
    settings = {name: values[name] for name in KEPT_FIELDS}
    back = page.on_return(json.loads(json.dumps(settings)), ["a", "b"], kept)
    parts = page.parts
    assert back[parts.fields["seed"]] == str(2**63 - 1) and back[parts.fields["max_order"]] == "2"
    assert back[parts.fields["model"]]["value"] == "nano-fast" and back[parts.fields["size"]]["value"] == "80x48"
    assert back[parts.ask.earlier]["samples"] == [["a"], ["b"]]
    assert [one.path for one in back[parts.history]] == [one.path for one in history]
    again, before = back[parts.history][0], history[0]
    assert (again.command, again.caption) == (before.command, before.caption)
    assert figures.report(again) == figures.report(before)
    chosen = page.visit.on_chosen(back[parts.history], None, SimpleNamespace(index=0))
    assert chosen[parts.fields["seed"]] == "4" and chosen[parts.outcome.picture]["value"] == before.path


def test_a_first_visit_has_nothing_to_bring_back(page):
    back = page.on_return(None, [], [])
    assert back[page.parts.history] == [] and not back[page.parts.outcome.gallery]["visible"]
    assert not back[page.parts.ask.earlier]["visible"] and page.parts.fields["seed"] not in back


@pytest.mark.parametrize(
    "settings",
    [
        {"model": "gone"},
        {"seed": ["x"]},
        {"lora": "gone"},
        {"lora": ["style"]},
        {"lora": "style", "lora_scale": 1e9},
        {"prompt": {"a": 1}},
        {"num_images": 10**9},
        {"quality": "best"},
        {"cache": {"a": []}},
        {"width": "abc"},
        {"width": [1, 2]},
        {"height": 1e308},
        {"height": True},
        {"negative_prompt": "half a pair \ud800"},
        {"guidance": float("nan")},
    ],
    ids=ascii,
)
def test_a_setting_that_no_longer_holds_is_told_and_the_others_are_set(page, settings, monkeypatch):
    warned: list[str] = []
    monkeypatch.setattr("gradio.Warning", warned.append)
    kept = {name: fields(prompt="my own words", num_steps=9)[name] for name in KEPT_FIELDS} | settings
    back = page.on_return(kept, [], [])
    (name,) = [one for one in settings if one != "lora_scale" or len(settings) == 1]
    assert len(warned) == 1 and f"cannot be used here: {name}" in warned[0].replace("lora, lora_scale", "lora")
    assert page.parts.fields[name] not in back or name in ("lora", "model")
    assert name == "prompt" or back[page.parts.fields["prompt"]] == "my own words"
    assert back[page.parts.fields["num_steps"]] == 9


@pytest.mark.parametrize("settings", ["none", ["a"], 7])
def test_what_are_no_settings_is_passed_over(page, settings):
    assert page.parts.fields["seed"] not in page.on_return(settings, [], [])


def test_a_size_that_is_not_offered_any_more_is_replaced(page):
    settings = {name: fields(size="100x100")[name] for name in KEPT_FIELDS}
    assert page.on_return(settings, [], [])[page.parts.fields["size"]]["value"] == "64x64"


def test_only_the_servers_own_pictures_come_back(page, tmp_path):
    (entry,), _ = draw(page, [])
    whole = entry.kept()
    assert restored(whole, LIMITS.upload_pixels).metadata == entry.metadata
    outside = tmp_path / "outside.png"
    outside.write_bytes(Path(entry.path).read_bytes())
    plain = tmp_path / "served" / "plain.png"
    Image.new("RGB", (8, 8)).save(plain)
    hostile = tmp_path / "served" / "hostile.png"
    metadata = {"version": 1, "model": {}, "options": {"seed": "<img src=x>"}, "cache": {}}
    hostile.write_bytes(encode_picture(Image.new("RGB", (8, 8)), metadata, "PNG"))
    uploaded = tmp_path / "served" / "uploaded.png"
    uploaded.write_bytes(Path(entry.path).read_bytes())
    with pytest.raises(ValueError, match="no picture that this server drew"):
        restored(whole | {"path": str(uploaded)}, LIMITS.upload_pixels)
    assert restored(whole | {"path": str(uploaded)} | signed(uploaded), LIMITS.upload_pixels)
    for change in (
        {"path": str(plain)} | signed(plain),
        {"path": str(hostile)} | signed(hostile),
        {"path": str(outside)} | signed(outside),
        {"signature": "\u00e9"},
        {"path": str(outside)},
        {"path": "/etc/passwd"},
        {"path": str(plain)},
        {"path": str(hostile)},
        {"path": ["a"]},
        {"path": "a\0b"},
        {"steps": []},
        {"steps": [["full", -1, 2]]},
        {"steps": [["<b>", 1, 2]]},
        {"steps": [["full", 1]]},
        {"steps": [["full", 1, 10**400]]},
        {"command": "half a pair \ud800"},
        {"steps": 3},
        {"encode": "x"},
        {"decode": 10**400},
        {"encode": float("nan")},
        {"command": 3},
        {"command": "x" * 100_000},
    ):
        with pytest.raises(ValueError):
            restored(whole | change, LIMITS.upload_pixels)
        (back,) = page.visit.on_return([whole | change, whole, whole])[page.parts.history]
        assert back.path == entry.path
    for kept in ({"path": whole["path"]}, [], "x", None):
        with pytest.raises(ValueError):
            restored(kept, LIMITS.upload_pixels)


def test_texts_of_a_picture_that_comes_back_are_escaped(page, tmp_path):
    (entry,), _ = draw(page, [])
    metadata = json.loads(json.dumps(entry.metadata))
    metadata["options"]["seed"] = metadata["options"]["prompt"] = "<img src=x onerror=alert(1)>"
    forged = tmp_path / "served" / "forged.png"
    forged.write_bytes(encode_picture(entry.image(), metadata, "PNG"))
    back = restored(entry.kept() | {"path": str(forged)} | signed(forged), LIMITS.upload_pixels)
    assert "<img" not in figures.report(back) + figures.side_by_side(entry, back)


def test_prompts_of_a_browser_are_texts_of_bounded_length():
    assert prompts_of(["a", 3, "", "b" * 11, {"c": 1}, "d"], 10) == ["a", "d"]
    assert len(prompts_of([str(number) for number in range(99)], 10)) == NUM_PROMPTS
    assert prompts_of({"a": 1}, 10) == prompts_of(None, 10) == []


def test_a_picture_whose_start_is_gone_is_shown_without_its_settings(page, tmp_path, monkeypatch):
    warned: list[str] = []
    monkeypatch.setattr("gradio.Warning", warned.append)
    Image.new("RGB", (64, 64), "blue").save(tmp_path / "served" / "in.png")
    image = page.on_picture(str(tmp_path / "served" / "in.png"), "nano")[page.parts.ask.start.image]
    (entry,), _ = draw(page, [], image=image, strength=0.5, fit="cover")
    back = restored(entry.kept(), LIMITS.upload_pixels)
    shown = page.visit.on_chosen([back], None, SimpleNamespace(index=0))
    assert shown[page.parts.outcome.picture]["value"] == entry.path and page.parts.fields["seed"] not in shown
    assert "no longer at hand" in warned[0]


def test_every_quality_says_what_it_takes_and_brings(page, monkeypatch):
    models = offer_models("nano", ModelSource(), None)
    monkeypatch.setattr(page.desk, "models", dict(models))
    _, grades, *_ = page.on_change(*fields(num_steps=50, cache="best").values())
    labels = {value: label for label, value in grades["choices"]}
    assert list(labels) == ["", "high", "medium", "draft"]
    assert all(f"{steps} of 50 steps, " in labels[name] for name, steps in (("", 13), ("high", 17), ("draft", 8)))
    assert all(" dB" in label and " s" not in label.replace(" steps", "") for label in labels.values())
    list(page.drawings.draw("", [], "", None, *fields(num_steps=50, cache="best").values()))
    _, timed, *_ = page.on_change(*fields(num_steps=50, cache="best", full_steps="9").values())
    labels = {value: label for label, value in timed["choices"]}
    assert labels[""].startswith("Standard: 9 of 50") and labels["high"].startswith("High: 17 of 50")
    assert all(label.endswith(" s") for label in labels.values())
    _, unknown, *_ = page.on_change(*fields(num_steps=47, cache="best").values())
    assert [label for label, _ in unknown["choices"]][1:] == ["High", "Medium", "Draft"]


def test_a_lora_changes_the_picture_and_is_named_in_the_command(page, tmp_path):
    (plain,), _ = draw(page, [])
    (styled,), _ = draw(page, [], lora="style", lora_scale=1.5)
    assert not np.array_equal(np.asarray(plain.image()), np.asarray(styled.image()))
    assert "--lora style.safetensors:1.5" in styled.command and "--lora" not in plain.command
    assert len(styled.metadata["model"]["loras"]) == 1
    (again,), _ = draw(page, [])
    assert again.path == plain.path, "the LoRA stayed on the model"
    filled = page.on_upload(Path(styled.path).read_bytes(), None)
    assert filled[page.parts.fields["lora"]] == "style" and filled[page.parts.fields["lora_scale"]] == 1.5
    assert page.on_upload(Path(plain.path).read_bytes(), None)[page.parts.fields["lora"]] == ""


def test_a_comparison_does_not_take_a_picture_of_another_lora(page):
    draw(page, [], cache="taylorseer")
    for name in ("style", ""):
        *_, last = page.drawings.compare("", [], "", None, *fields(lora=name).values())
        (entry,) = last[page.parts.history]
        assert bool(entry.metadata["model"]["loras"]) == bool(name)


def test_a_lora_that_is_not_there_or_does_not_fit_is_a_sentence_without_paths(page, tmp_path, tiny_folder):
    (tmp_path / "loras" / "broken.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}      ")
    page.desk.loras = LoraFolder(tmp_path / "loras")
    for values, said in (
        ({"lora": "none"}, "lora must be one of broken, style"),
        ({"lora": "../style"}, "lora must be one of"),
        ({"lora": "style", "lora_scale": float("nan")}, "lora_scale must be a number from -2 to 2"),
        ({"lora": "broken"}, "broken is not a complete safetensors file"),
    ):
        *_, last = page.drawings.draw("", [], "", None, *fields(**values).values())
        stage = last[page.parts.outcome.stage]["value"]
        assert said in stage and str(tmp_path) not in stage


def test_a_picture_with_an_unknown_lora_or_a_sampler_without_field_says_so(page, monkeypatch):
    warned: list[str] = []
    monkeypatch.setattr("gradio.Warning", warned.append)
    (styled,), _ = draw(page, [], lora="style")
    page.desk.loras = LoraFolder()
    page.on_upload(Path(styled.path).read_bytes(), None)
    assert "a LoRA that is not on this server" in warned.pop()
    metadata = json.loads(json.dumps(styled.metadata))
    metadata["model"]["loras"] = []
    metadata["options"] |= {"scheduler": "euler", "shift": 2.0}
    data = encode_picture(styled.image(), metadata, "PNG")
    page.on_upload(data, None)
    assert "no field for scheduler euler, shift 2.0" in warned.pop() and warned == []


def test_a_folder_of_loras_must_hold_some(tmp_path):
    with pytest.raises(ValueError, match="must be a folder"):
        LoraFolder(tmp_path / "none")
    with pytest.raises(ValueError, match="it holds none"):
        LoraFolder(tmp_path)
