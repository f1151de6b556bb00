"""A picture's settings as a command line, and back from its metadata."""

import shlex

import pytest
from PIL import Image

from hi_diffusers.commands import inference
from hi_diffusers.demo.settings import command_line, values_of
from hi_diffusers.pictures.inputs import InputPicture
from hi_diffusers.service.offered import LoraFolder, offer_models
from hi_diffusers.service.requests import Limits, check
from hi_diffusers.weights.source import ModelSource

LIMITS = Limits()
ASKED = [
    {},
    {"cache": "off"},
    {"cache": "taylorseer"},
    {"cache": "hicache", "full_steps": 10, "schedule": "cosine"},
    {"cache": "best", "full_steps": 8},
    {"cache": "best", "target": "velocity"},
    {"cache": "taylorseer", "target": "x0", "basis": "newton", "fresh_threshold": 5, "max_order": 2},
    {"model": "nano-fast", "seed": str(2**63 - 1)},
    {"prompt": "-- a 'quoted' \"prompt\"; $(rm)", "negative_prompt": "--no"},
    {"width": 80, "height": 48, "num_steps": 20, "guidance": 4.5},
    {"scheduler": "euler", "shift": 2.0, "max_sequence_length": 16},
]


@pytest.fixture(scope="module")
def models():
    return offer_models("nano", ModelSource(), None)


@pytest.mark.parametrize("values", ASKED, ids=str)
def test_the_command_draws_the_same_picture(models, values, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    request = check({"prompt": "a red circle"} | values, LIMITS, models)
    words = shlex.split(command_line(request, LoraFolder()))
    assert words[:2] == ["python", "inference.py"]
    job = inference.plan(inference.build_parser().parse_args(words[2:]))
    assert job.drawings[0].options.settings() == request.options.settings()
    assert job.drawings[0].cache.settings() == request.cache.settings()
    assert job.drawings[0].preset == request.model.preset


@pytest.mark.parametrize("values", ASKED, ids=str)
def test_a_pictures_metadata_loads_as_the_settings_that_draw_it_again(models, values):
    request = check({"prompt": "a red circle"} | values, LIMITS, models)
    cache = {"target": "off"} if request.cache.is_off else request.cache.settings()
    metadata = {
        "version": 1,
        "model": {"model_type": request.model.preset.name},
        "options": request.options.settings(),
        "cache": cache,
    }
    loaded, note = values_of(metadata, LIMITS, models)
    again = check(loaded, LIMITS, models)
    assert not note
    assert again.options == request.options
    assert again.cache.settings() == request.cache.settings()


def test_what_the_page_has_no_field_for_is_said(models):
    cache = {"target": "x0", "basis": "newton", "abscissa": "log_snr", "schedule": "power", "full_steps": 9}
    metadata = {"model": {"model_type": "nano"}, "options": {"prompt": "a", "seed": 3}, "cache": cache}
    values, note = values_of(metadata, LIMITS, models)
    assert "no fields for" in note
    assert values["seed"] == 3


@pytest.mark.parametrize(
    ("model", "options"),
    [
        ("full", {"prompt": "a"}),
        (["nano"], {"prompt": "a"}),
        ("nano", {"prompt": ["a"]}),
        ("nano", {"prompt": "a", "num_steps": 1000}),
        ("nano", {"prompt": "a", "width": 10**30}),
        ("nano", {"prompt": "x" * 5000}),
        ("nano", {"prompt": "a", "seed": {"path": "/etc/passwd"}}),
    ],
    ids=str,
)
def test_hostile_metadata_is_refused_in_a_short_line(models, model, options):
    with pytest.raises(ValueError, match=r"must be|not on this server") as refusal:
        values_of({"model": {"model_type": model}, "options": options}, LIMITS, models)
    assert len(str(refusal.value)) < 400


@pytest.mark.parametrize("metadata", [{}, {"options": {"prompt": "a", "model_path": "/etc"}, "cache": {"mask": "x"}}])
def test_what_metadata_lacks_is_the_models_own_and_what_is_unknown_is_not_read(models, metadata):
    values, _ = values_of(metadata, LIMITS, models)
    assert check(values, LIMITS, models).options.num_steps == 50


def test_a_calibration_that_metadata_names_is_never_opened(models, monkeypatch, tmp_path):
    """The cache of a picture may name a calibration by a path: a stranger's picture would open the server's files."""
    opened = []
    monkeypatch.setattr("cache_functions.calibration.CalibrationShelf.open", lambda self, name: opened.append(name))
    cache = {"target": "x0", "basis": "learned", "schedule": "mask", "calibration": "/etc/passwd", "mask": [0, 4]}
    metadata = {"model": {"model_type": "nano"}, "options": {"prompt": "a", "seed": 3}, "cache": cache}
    values_of(metadata, LIMITS, models)
    assert opened == []


def test_a_command_names_none_of_the_servers_files(tiny_folder):
    models = offer_models("nano", ModelSource(model_path=str(tiny_folder)), None)
    request = check({"prompt": "a"}, LIMITS, models)
    assert str(tiny_folder) not in command_line(request, LoraFolder())
    assert "--model_path ..." in command_line(request, LoraFolder())


def test_a_picture_that_was_drawn_from_another_cannot_be_loaded(models):
    options = {"prompt": "a", "seed": 3, "image": "0" * 64, "strength": 0.6, "fit": "cover"}
    with pytest.raises(ValueError, match="it was drawn from another picture"):
        values_of({"model": {"model_type": "nano"}, "options": options}, LIMITS, models)


@pytest.mark.parametrize("fit", ["cover", "pad"])
@pytest.mark.parametrize("size", [{}, {"width": 64, "height": 64}], ids=["its shape", "square"])
@pytest.mark.parametrize("masked", [False, True])
def test_the_command_starts_from_the_same_pictures(models, monkeypatch, tmp_path, fit, size, masked):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (96, 64), "red").save("-in.png")  # a name that looks like a flag
    Image.new("L", (96, 64), 200).save("mask.png")
    values = {"image": InputPicture.of(tmp_path / "-in.png"), "strength": 0.3512345678, "fit": fit} | size
    if masked:
        values["mask_image"] = InputPicture.of(tmp_path / "mask.png", "mask_image")
    request = check({"prompt": "a red circle"} | values, LIMITS, models)
    words = shlex.split(command_line(request, LoraFolder()))
    job = inference.plan(inference.build_parser().parse_args(words[2:]))
    assert job.drawings[0].options.settings() == request.options.settings()
    assert job.drawings[0].cache.settings() == request.cache.settings()
    metadata = {"model": {"model_type": "nano"}, "options": request.options.settings()}
    metadata["cache"] = request.cache.settings()
    pictures = {"image": values["image"], "mask": values.get("mask_image")}
    loaded, note = values_of(metadata, LIMITS, models, **pictures)
    assert not note and check(loaded, LIMITS, models).options.settings() == request.options.settings()
    for missing in [name for name, one in pictures.items() if one is not None]:
        with pytest.raises(ValueError, match=pictures[missing].sha256):
            values_of(metadata, LIMITS, models, **(pictures | {missing: None}))
