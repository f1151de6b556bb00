"""The evaluation draws prompts that training never saw, and reports what is needed to repeat it."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from training import evaluate, scenes
from training.checker import Claims, accuracy
from training.evaluate import contact_sheet, held_out_prompts, main, report_rates

TIER = pytest.mark.parametrize("tier", scenes.TIERS.values(), ids=scenes.TIERS)


class Agreeable:
    """Stands in for the checker, whose making takes seconds: background and count hold, shapes do not."""

    def __init__(self, tier: scenes.Tier) -> None:
        self.tier = tier

    def check(self, picture: np.ndarray, prompt: str) -> Claims:
        assert picture.shape == (64, 64, 3) and 0 <= picture.min() <= picture.max() <= 1
        scenes.parse_caption(prompt)
        return Claims(background=True, count=True, colour=True, shape=False, size=True, position=None)


@TIER
def test_prompts_are_held_out_and_none_comes_twice(tier: scenes.Tier) -> None:
    prompts = held_out_prompts(tier, 256)
    assert len(set(prompts)) == len(prompts) == 256
    for prompt in prompts:
        scene = scenes.parse_caption(prompt)
        assert scenes.is_held_out(scene), prompt
        assert scenes.caption(scene) == prompt, "not in the canonical form"


def test_fewer_prompts_are_the_first_of_more() -> None:
    assert held_out_prompts(scenes.CPU_TIER, 16) == held_out_prompts(scenes.CPU_TIER, 64)[:16]


def test_rates_count_only_the_prompts_that_make_a_claim() -> None:
    common = {"background": True, "count": True, "colour": True, "size": None}
    rates = report_rates(
        accuracy(
            [
                Claims(shape=True, position=True, **common),
                Claims(shape=False, position=None, **common),
            ]
        )
    )
    assert list(rates) == ["background", "count", "colour", "shape", "size", "position", "all"]
    assert rates["shape"] == {"held": 1, "stated": 2, "share": 0.5}
    assert rates["position"] == {"held": 1, "stated": 1, "share": 1.0}
    assert rates["all"]["share"] == 0.5
    assert rates["size"] == {"held": 0, "stated": 0, "share": None}, "NaN is no JSON"


def test_the_report_says_how_it_can_be_repeated(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(evaluate, "Checker", Agreeable)
    output = tmp_path / "rates.json"
    flags = ["--model_path", str(tiny_folder), "--device", "cpu", "--output", str(output)]
    assert main([*flags, "--num_prompts", "3", "--batch_size", "2", "--num_steps", "2", "--guidance", "1"]) == 0
    report = json.loads(output.read_text())
    assert report.keys() == {"model", "options", "cache", "prompts", "seeds", "rates", "hardware", "versions"}
    assert report["model"]["model_type"] == "nano" and len(report["model"]["fingerprint"]) == 16
    assert report["options"] == {
        "num_steps": 2,
        "guidance": 1.0,
        "scheduler": "unipc",
        "shift": 3.0,
        "max_sequence_length": 32,
        "width": 64,
        "height": 64,
    }
    assert report["cache"] == "off" and report["prompts"].startswith("3 canonical captions")
    assert report["rates"]["count"] == {"held": 3, "stated": 3, "share": 1.0}
    assert report["rates"]["shape"]["held"] == report["rates"]["all"]["held"] == 0
    assert "background 100.0 % (3/3)" in capsys.readouterr().out


def test_a_picture_depends_on_its_place_and_not_on_its_batch(tiny_pipe: object) -> None:
    prompts = held_out_prompts(scenes.CPU_TIER, 3)
    options = evaluate.SamplingOptions(prompt="", num_steps=2, guidance=1.0)
    by_two, by_three = (
        evaluate.draw_prompts(tiny_pipe, prompts, evaluate.CacheConfig.off(), size, options) for size in (2, 3)
    )
    for one, other in zip(by_two, by_three, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-3)
    assert np.abs(by_two[0] - by_two[1]).max() > 0.05


def test_the_sheet_shows_the_first_sixteen_pictures_row_by_row() -> None:
    pictures = [np.full((8, 8, 3), i / 20, np.float32) for i in range(18)]
    sheet = contact_sheet(pictures)
    assert isinstance(sheet, Image.Image) and sheet.size == (64, 64)
    centres = np.asarray(sheet)[8::16, 8::16, 0]
    assert centres.flatten().tolist() == [round(255 * i / 20) for i in range(16)]


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--num_prompts", "0"], "num_prompts must be above 0, got 0"),
        (["--num_steps", "0"], "num_steps must be a whole number from 1 to 1000, got 0"),
        (["--num_prompts", "3", "--sheet", "sheet.png"], "--sheet shows 16 pictures, got --num_prompts 3"),
        (["--output", "nowhere/rates.json"], "there is no folder nowhere"),
        (["--model_path", "nowhere"], "nowhere: there is no such folder"),
    ],
)
def test_bad_input_is_refused_in_one_line(
    flags: list[str], reason: str, tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--model_path", str(tiny_folder), *flags]) == 2
    err = capsys.readouterr().err
    assert reason in err and err.count("\n") == 1
