"""Whatever comes from the network is checked before anything is drawn."""

from typing import Any

import pytest

from hi_diffusers.families.table import PRESETS
from hi_diffusers.service.offered import OfferedModel, offer_models
from hi_diffusers.service.requests import Limits, Request, check
from hi_diffusers.weights.source import ModelSource

LIMITS = Limits()


@pytest.fixture(scope="module")
def models() -> dict[str, OfferedModel]:
    return dict(offer_models("nano", ModelSource(), None))


def ask(models: dict[str, OfferedModel], **values: Any) -> Request:
    return check({"prompt": "a red circle"} | values, LIMITS, models)


def test_what_is_left_open_is_the_models_own(models):
    request = ask(models, model="nano", width=None, negative_prompt="")
    assert (request.options.width, request.options.num_steps, request.options.guidance) == (64, 50, 2.0)
    assert request.cache.target == "solver"
    assert request.drawings[0].options.seed is not None, "a seed that is not given is drawn once, and kept"


def test_a_form_sends_whole_numbers_as_floats_and_seeds_as_text(models):
    request = ask(models, num_steps=13.0, seed=str(2**63 - 1), num_images=2.0)
    assert request.options.num_steps == 13
    assert [one.options.seed for one in request.drawings] == [2**63 - 1, 0]


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"prompt": "x" * 100_000}, "prompt"),
        ({"prompt": ["a"]}, "prompt"),
        ({"prompt": {"path": "/etc/passwd"}}, "prompt"),
        ({"prompt": "half a \ud800 character"}, "prompt"),
        ({"negative_prompt": "x" * 2001}, "negative_prompt"),
        ({"num_steps": -3}, "num_steps"),
        ({"num_steps": 101}, "num_steps"),
        ({"num_steps": 2.5}, "num_steps"),
        ({"num_steps": True}, "num_steps"),
        ({"num_steps": float("nan")}, "num_steps"),
        ({"num_steps": float("inf")}, "num_steps"),
        ({"num_images": 5}, "num_images"),
        ({"width": 10**9}, "width"),
        ({"width": 16384, "height": 1}, "width"),
        ({"seed": -1}, "seed"),
        ({"seed": "1e3"}, "seed"),
        ({"seed": "9" * 5000}, "seed"),
        ({"guidance": "high"}, "guidance"),
        ({"guidance": float("nan")}, "guidance"),
        ({"scheduler": "ddim"}, "scheduler"),
        ({"scheduler": ["euler"]}, "scheduler"),
        ({"model": "../../etc"}, "model"),
        ({"model": ["nano"]}, "model"),
        ({"model": "full"}, "model"),
        ({"quality": "best"}, "quality"),
        ({"quality": "high", "full_steps": 5}, "quality"),
        ({"quality": "high", "cache": "taylorseer"}, "quality"),
        ({"quality": ["high"]}, "quality"),
        ({"cache": "fastest"}, "cache"),
        ({"cache": ["best"]}, "cache"),
        ({"cache": "best", "basis": "taylor"}, "basis"),
        ({"basis": ["taylor"]}, "basis"),
        ({"target": {"a": 1}}, "target"),
        ({"cache": "taylorseer", "full_steps": 60}, "full_steps"),
        ({"max_order": 99}, "max_order"),
        ({"calibration": "/etc/passwd"}, "calibration"),
        ({"model_path": "/etc"}, "model_path"),
        ({"lora": "owner/name"}, "lora"),
    ],
)
def test_a_bad_value_is_refused_by_name_in_a_short_line(models, values, named):
    with pytest.raises(ValueError, match=named) as refusal:
        ask(models, **values)
    assert len(str(refusal.value)) < 400


def test_no_field_of_a_request_can_name_a_file(models):
    """Calibrations, weights and LoRAs are files: whoever runs the server chooses them."""
    for name in ("calibration", "model_path", "llama", "transformer", "lora", "revision", "mask"):
        with pytest.raises(ValueError, match="is not a setting of a picture"):
            ask(models, **{name: "x"})


def test_a_model_whose_files_are_absent_says_what_is_missing(models):
    assert "HiDream-ai/HiDream-I1-Full is not on this disk" in models["full"].missing
    with pytest.raises(ValueError, match="model full is not on this server; available are nano, nano-dev, nano-fast"):
        ask(models, model="full")


def test_offering_models_downloads_nothing(monkeypatch):
    def fetch(*_: Any, **__: Any) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr("hi_diffusers.families.hidream.files.download", fetch)
    offered = offer_models("full", ModelSource(), None)
    assert set(offered) == set(PRESETS)
    assert not offered["nano"].missing and offered["full"].missing


def test_the_files_that_flags_name_are_those_of_the_chosen_model_alone(tiny_folder):
    offered = offer_models("nano", ModelSource(model_path=str(tiny_folder), quantization="nf4"), None)
    assert offered["nano"].source.model_path == str(tiny_folder)
    assert offered["nano-dev"].source == ModelSource()
    assert offered["full"].source == ModelSource(quantization="nf4")
