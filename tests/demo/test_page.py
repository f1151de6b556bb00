"""What the page's handlers answer, without a server."""

import io
import re
from collections.abc import Iterator
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gradio as gr
import numpy as np
import pytest
from PIL import Image

from hi_diffusers.demo import figures, starts
from hi_diffusers.demo import history as history_module
from hi_diffusers.demo.controls import FREE_SIZE
from hi_diffusers.demo.layout import FIELDS, is_example
from hi_diffusers.demo.page import Page
from hi_diffusers.demo.studio import Studio
from hi_diffusers.pictures.inputs import InputPicture
from hi_diffusers.pictures.metadata import encode_picture
from hi_diffusers.request.placement import Placement
from hi_diffusers.service.loader import Loader
from hi_diffusers.service.offered import offer_models
from hi_diffusers.service.requests import Limits
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
    updates = list(page.drawings.draw("", [], "", None, *fields()))
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
        updates = list(page.drawings.draw("", [], "", None, *fields()))
        with pytest.raises(gr.Error, match=r"The drawing failed \(RuntimeError\)"):
            list(page.drawings.generate("a"))
    said = shown(page, page.parts.outcome.stage, updates)[-1]
    assert "The drawing failed (RuntimeError); the server keeps running" in said
    assert "/srv" not in said
    assert "Traceback" in caplog.text and "secret path /srv/weights" in caplog.text
    assert shown(page, page.parts.history, list(page.drawings.draw("", [], "", None, *fields())))


def test_a_bad_field_is_a_sentence_and_nothing_is_drawn(page):
    updates = list(page.drawings.draw("", [], "", None, *fields(num_steps=-4)))
    assert "num_steps must be a whole number" in shown(page, page.parts.outcome.stage, updates)[-1]
    assert not shown(page, page.parts.history, updates)


def test_comparing_needs_a_cache(page):
    updates = list(page.drawings.compare("", [], "", None, *fields(cache="off")))
    assert "the cache is off" in shown(page, page.parts.outcome.stage, updates)[-1]


def test_a_comparison_tells_seconds_and_distance(page):
    updates = list(page.drawings.compare("", [], "", None, *fields(num_images=3)))
    report = shown(page, page.parts.outcome.report, updates)[-1]
    assert "PSNR" in report and "of 4.00×" in report
    assert len(shown(page, page.parts.outcome.slider, updates)[-1]) == 2


def test_what_is_withheld_leaves_no_file_and_no_picture(page, tmp_path):
    page.drawings.studio = Studio(page.loader, lambda image: True)
    for updates in (
        list(page.drawings.draw("", [], "", None, *fields())),
        list(page.drawings.compare("", [], "", None, *fields())),
    ):
        assert "withheld" in shown(page, page.parts.outcome.stage, updates)[-1]
        assert not shown(page, page.parts.history, updates)
    with pytest.raises(gr.Error, match="withheld"):
        list(page.drawings.generate("a"))
    page.drawings.studio.close()
    assert list(tmp_path.rglob("*.png")) == []


def test_the_history_is_bounded_and_names_what_is_there(page, tmp_path):
    paths = [tmp_path / f"{number}.png" for number in range(history_module.MAX_HISTORY)]
    for path in paths[:-1]:
        path.touch()
    (drawn,) = shown(page, page.parts.history, list(page.drawings.draw("", [], "", None, *fields())))[-1]
    before = [replace(drawn, path=str(path)) for path in paths]
    after = shown(page, page.parts.history, list(page.drawings.draw("", before, "", None, *fields())))[-1]
    assert after[1:] == before[:-1], "what the sweep took is still listed, or something else is not"
    paths[-1].touch()
    after = shown(page, page.parts.history, list(page.drawings.draw("", before, "", None, *fields())))[-1]
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
    list(page.drawings.draw("", [], "", None, *fields()))
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
    assert filled[page.parts.fields["seed"]] == "9"
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
    ticket, *_ = page.drawings.begin("", None, None)
    with pytest.raises(gr.Error, match="still running"):
        page.drawings.begin(ticket, None, None)
    cleared, *_ = page.drawings.end(ticket)
    assert cleared == ""
    assert page.drawings.begin(ticket, None, None)[0] != ticket


def test_a_whole_number_makes_the_same_file_from_a_form_and_from_a_flag(page):
    drawn = [
        shown(page, page.parts.history, list(page.drawings.draw("", [], "", None, *fields(guidance=g))))[-1]
        for g in (2, 2.0)
    ]
    assert len({one.path for (one,) in drawn}) == 1


def picture_file(folder: Path, size: tuple[int, int] = (96, 64), color: str = "blue") -> str:
    path = folder / f"{color}.png"
    Image.new("RGB", size, color).save(path)
    return str(path)


def painted(size: tuple[int, int], left: int = 0) -> Image.Image:
    """Paint from a column on, as `opacity_of` gives it."""
    paint = Image.new("L", size)
    paint.paste(255, (left, 0, *size))
    return paint


def start_from(page: Page, folder: Path) -> InputPicture:
    update = page.on_picture(picture_file(folder), "nano")
    assert update[page.parts.fields["size"]]["value"] == "72x48"
    image = update[page.parts.ask.start.image]
    assert isinstance(image, InputPicture)
    return image


def test_a_drawing_starts_from_a_picture_and_is_chosen_again_with_it(page, tmp_path):
    image = start_from(page, tmp_path)
    paint = painted((96, 64), 48)
    of_start = {"size": "72x48", "image": image, "strength": 0.5, "fit": "cover"}
    updates = list(page.drawings.draw("", [], "", paint, *fields(**of_start)))
    outcome = page.parts.outcome
    assert "1 full, 3 forecast" in shown(page, outcome.report, updates)[-1], "half of 8 steps is drawn"
    command = shown(page, outcome.command, updates)[-1]
    assert "--image blue.png --mask blue-mask.png --strength 0.5" in command
    (entry,) = shown(page, page.parts.history, updates)[-1]
    assert entry.metadata["options"]["image"] == image.sha256
    kept, drawn = np.asarray(Image.open(entry.start.fitted)), np.asarray(Image.open(entry.path))
    assert (kept[:, :35] == drawn[:, :35]).all() and (kept != drawn).any()
    mask = Image.open(shown(page, outcome.mask, updates)[-1])
    assert mask.size == (96, 64) and mask.getextrema() == (0, 255)
    again = page.visit.on_chosen([entry], None, SimpleNamespace(index=0))
    values = {name: again[page.parts.fields[name]] for name in ("image", "strength", "fit", "seed")}
    assert values == {"image": image, "strength": 0.5, "fit": "cover", "seed": "3"}
    assert again[outcome.command]["value"] == command and again[outcome.report] == figures.report(entry)
    layer = again[page.parts.ask.start.paint]["layers"][0]
    assert layer.getchannel("A").tobytes() == paint.tobytes()


def test_before_and_after_are_laid_over_each_other(page, tmp_path):
    of_start = {"size": "72x48", "image": start_from(page, tmp_path), "strength": 0.5, "fit": "cover"}
    (entry,) = shown(page, page.parts.history, list(page.drawings.draw("", [], "", None, *fields(**of_start))))[-1]
    picture, slider = page.visit.on_before(True, entry)
    assert not picture["visible"] and slider["value"] == (entry.start.fitted, entry.path)
    picture, slider = page.visit.on_before(False, entry)
    assert picture["visible"] and not slider["visible"]


def test_what_was_drawn_is_the_next_input(page, tmp_path):
    updates = list(page.drawings.draw("", [], "", None, *fields()))
    (entry,) = shown(page, page.parts.history, updates)[-1]
    update = page.on_use(entry, "nano")
    image = update[page.parts.ask.start.image]
    assert image.sha256 == sha256(Path(entry.path).read_bytes()).hexdigest(), "the file that a visitor downloads"
    with pytest.raises(gr.Error, match="no picture is shown"):
        page.on_use(None, "nano")


def test_only_pictures_that_were_uploaded_are_started_from(page, tmp_path, monkeypatch):
    inside = tmp_path / "inside"
    inside.mkdir()
    monkeypatch.setattr(starts, "get_upload_folder", lambda: str(inside))
    warned = []
    monkeypatch.setattr("gradio.Warning", warned.append)
    for path in (picture_file(tmp_path), str(inside / "none.png"), "/etc/passwd"):
        assert page.on_picture(path, "nano")[page.parts.ask.start.image] is None
        with pytest.raises(gr.Error, match="image must be uploaded first"):
            list(page.drawings.generate("a", image={"path": path}))
    (inside / "text.png").write_text("no picture")
    Image.new("1", (8192, 4096)).save(inside / "large.png")
    Image.new("1", (2000, 1)).save(inside / "thin.png")
    for name, said in (("text.png", "must be a PNG"), ("large.png", "16777216 are allowed"), ("thin.png", "2000x1")):
        assert page.on_picture(str(inside / name), "nano")[page.parts.ask.start.image] is None
        assert said in warned[-1] and str(inside) not in warned[-1]
    with pytest.raises(gr.Error, match="handle_file"):
        list(page.drawings.generate("a", image="/etc/passwd"))


def test_a_picture_that_the_sweep_took_is_missed_with_a_sentence(page, tmp_path):
    image = start_from(page, tmp_path)
    Path(image.file).unlink()
    updates = list(page.drawings.draw("", [], "", None, *fields(image=image, strength=0.5, fit="cover")))
    assert "no longer on the server" in shown(page, page.parts.outcome.stage, updates)[-1]


def test_files_of_the_visit_that_the_sweep_took_are_missed_with_a_sentence(page, tmp_path):
    of_start = {"size": "72x48", "image": start_from(page, tmp_path), "strength": 0.5, "fit": "cover"}
    paint = painted((96, 64), 48)
    (entry,) = shown(page, page.parts.history, list(page.drawings.draw("", [], "", paint, *fields(**of_start))))[-1]
    for file in (entry.start.mask.file, entry.start.fitted, entry.path):
        kept = Path(file).read_bytes()
        Path(file).unlink()
        uses = [
            lambda: page.visit.on_chosen([entry], None, SimpleNamespace(index=0)),
            lambda: page.visit.on_before(True, entry),
        ]
        missed = uses[file == entry.start.fitted :] if file != entry.start.mask.file else uses[:1]
        for use in [*missed, *([lambda: page.on_use(entry, "nano")] if file == entry.path else [])]:
            with pytest.raises(gr.Error, match="no longer on the server") as told:
                use()
            assert str(tmp_path) not in str(told.value)
        Path(file).write_bytes(kept)


def test_a_shape_that_another_model_cannot_draw_is_a_sentence(page):
    thin = InputPicture("0", "image", 100_000, 16)
    with pytest.raises(gr.Error, match="a side would become 0 pixels"):
        page.on_model("nano-fast", "", thin)


def test_settings_of_a_picture_that_started_from_another_need_that_one(page, tmp_path):
    image = start_from(page, tmp_path)
    of_start = {"size": "72x48", "image": image, "strength": 0.5, "fit": "pad"}
    (entry,) = shown(page, page.parts.history, list(page.drawings.draw("", [], "", None, *fields(**of_start))))[-1]
    with pytest.raises(gr.Error, match=f"give that one under Start from a picture first .SHA-256 {image.sha256}"):
        page.on_upload(Path(entry.path).read_bytes(), None)
    loaded = page.on_upload(Path(entry.path).read_bytes(), image)
    assert loaded[page.parts.fields["image"]] == image and loaded[page.parts.fields["fit"]] == "pad"
    plain = shown(page, page.parts.history, list(page.drawings.draw("", [], "", None, *fields())))[-1][0]
    assert page.on_upload(Path(plain.path).read_bytes(), image)[page.parts.fields["image"]] is None


def test_a_program_gives_pictures(page, tmp_path):
    image, mask = tmp_path / "in.png", tmp_path / "mask.png"
    Image.new("RGB", (64, 64), "blue").save(image)
    painted((64, 64), 32).save(mask)
    files = {"image": {"path": str(image)}, "mask_image": {"path": str(mask)}}
    file, settings = list(page.drawings.generate("a", num_steps=4, strength=0.75, **files))[-1]
    assert settings["options"]["strength"] == 0.75
    assert (np.asarray(Image.open(file["path"]))[:, :30] == (0, 0, 255)).all()
    with pytest.raises(gr.Error, match="strength has no effect without an image"):
        list(page.drawings.generate("a", strength=0.5))


def test_only_what_the_editor_can_have_painted_is_read(tmp_path):
    def sent(path: Path) -> Any:
        return SimpleNamespace(layers=[SimpleNamespace(path=str(path))])

    assert starts.opacity_of(None) is None and starts.opacity_of(SimpleNamespace(layers=[])) is None
    layer = Image.new("RGBA", (4, 4))
    layer.putpixel((1, 2), (255, 0, 0, 200))
    layer.save(tmp_path / "paint.png")
    assert starts.opacity_of(sent(tmp_path / "paint.png")).getpixel((1, 2)) == 200
    Image.new("1", (30000, 30000)).save(tmp_path / "bomb.png")
    (tmp_path / "text.png").write_text("x")
    for name in ("bomb.png", "text.png", "none.png"):
        with pytest.raises(gr.Error, match="cannot be read"):
            starts.opacity_of(sent(tmp_path / name))


def test_the_painter_stays_the_bounded_one(page):
    """Gradio makes another component for `gr.update`, which would decode whatever it is sent."""
    paint = page.parts.ask.start.paint
    assert paint.preprocess is starts.opacity_of
    handlers = [one.fn for one in page.blocks.fns.values() if paint in one.outputs]
    assert {one.__name__ for one in handlers} <= {"on_picture", "on_use", "on_upload", "on_chosen", "<lambda>"}
    assert not isinstance(page._start_from(None)[paint], dict)


def test_a_drawing_starts_from_what_was_shown_when_it_was_asked_for(page, tmp_path):
    """A state is read when the drawing's turn comes, and another picture may have been chosen by then."""
    image = start_from(page, tmp_path)
    assert page.drawings.begin("", image.file, image)[1] == image
    for file, state in ((str(image.file), None), (picture_file(tmp_path, color="red"), image)):
        lost = page.drawings.begin("", file, state)[1]
        updates = list(page.drawings.draw("", [], "", None, *fields(image=lost, strength=0.5, fit="cover")))
        assert "is not there (yet)" in shown(page, page.parts.outcome.stage, updates)[-1]
    assert page.drawings.begin("", None, image)[1] is None
    drawing = next(one for one in page.blocks.fns.values() if one.fn is not None and one.fn.__name__ == "draw")
    assert page.parts.begun in drawing.inputs and page.parts.ask.start.image not in drawing.inputs


def test_paint_that_is_not_over_the_picture_is_refused(page, tmp_path):
    """ "Clear canvas" of gradio's editor leaves an empty square to paint on."""
    image = start_from(page, tmp_path)
    of_start = {"size": "72x48", "image": image, "strength": 0.5, "fit": "cover"}
    updates = list(page.drawings.draw("", [], "", painted((800, 800), 5), *fields(**of_start)))
    assert "is not over the picture" in shown(page, page.parts.outcome.stage, updates)[-1]
    for size in ((1600, 1200), (1023, 768), (1024, 768), (2048, 1536)):
        Image.new("RGB", (4000, 3000)).save(tmp_path / "large.png")
        assert starts.mask_of(painted(size), InputPicture.of(tmp_path / "large.png")).size == (4000, 3000)


def test_a_refused_use_keeps_the_picture_and_every_chosen_one_can_be_used(page, tmp_path):
    (entry,) = shown(page, page.parts.history, list(page.drawings.draw("", [], "", None, *fields())))[-1]
    again, outcome = page.visit.on_chosen([entry], None, SimpleNamespace(index=0)), page.parts.outcome
    assert again[outcome.use]["visible"] and not again[outcome.stage]["visible"]
    Path(entry.path).write_text("no picture any more")
    with pytest.raises(gr.Error, match="must be a PNG"):
        page.on_use(entry, "nano")


def test_a_path_that_is_no_file_name_is_refused_in_a_line(page, tmp_path, caplog):
    for path in (str(tmp_path / ("a" * 300)), "a\0b", ""):
        with pytest.raises(gr.Error, match="image must be uploaded first"):
            list(page.drawings.generate("a", image={"path": path}))
    assert "Traceback" not in caplog.text
