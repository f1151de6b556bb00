"""The harness measures what it says and writes down what it measured. No test looks at how long anything took."""

import json
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import report, sizes, speed
from benchmarks.report import Hardware, Ratio, Spread, Timing
from benchmarks.sizes import NANO, Size, Subject, find_size
from benchmarks.speed import Contender, Settings, take_turns
from hi_diffusers.families.table import PRESETS

CPU = torch.device("cpu")
TINY = Size(
    "tiny",
    {
        **NANO,
        "in_channels": 4,
        "num_layers": 1,
        "num_single_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "axes_dims_rope": (8, 4, 4),
        "max_resolution": (8, 8),
        "llama_layers": (0, 2, 2),
    },
    num_text_tokens=5,
    preset=PRESETS["full"],
    num_steps=9,
    goals={"forward": 1e9, "cache_cost": -1e9, "forecast_module": 1e9, "forecast_x0": 1e9},
)
SETTINGS = Settings(CPU, torch.float32, seed=3, repeats=3, loops=2)


@pytest.fixture(scope="module")
def result() -> report.Result:
    return speed.measure(TINY, SETTINGS)


@pytest.fixture
def written(result: report.Result, tmp_path: Path) -> dict[str, Any]:
    paths = result.write(tmp_path)
    assert [path.suffix for path in paths] == [".json", ".md"]
    return json.loads(paths[0].read_text(encoding="utf-8"))


def timings_of(written: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {timing["name"]: timing for timing in written["timings"]}


def ratios_of(written: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {ratio["name"]: ratio for ratio in written["ratios"]}


# The result files.


def test_the_files_are_named_after_size_hardware_and_date(result: report.Result, tmp_path: Path) -> None:
    slug = Hardware.of(CPU).slug
    for path in result.write(tmp_path):
        assert path.stem == f"speed_tiny_{slug}_{report.today()}"
    assert slug.endswith(("-thread", "-threads")) and set(slug) <= set("abcdefghijklmnopqrstuvwxyz0123456789-")


def test_a_result_says_where_and_how_it_was_measured(written: dict[str, Any]) -> None:
    assert set(written) == {
        "benchmark",
        "size",
        "date",
        "hardware",
        "versions",
        "environment",
        "settings",
        "facts",
        "timings",
        "ratios",
        "notes",
    }
    assert written["hardware"]["threads"] == torch.get_num_threads() and written["hardware"]["cores"] >= 1
    assert written["hardware"]["gpu"] is None and written["hardware"]["cpu"]
    assert written["versions"]["torch"] == torch.__version__
    settings = written["settings"]
    assert (settings["seed"], settings["dtype"], settings["device"]) == (3, "float32", "cpu")
    assert (settings["image tokens"], settings["text tokens"], settings["weights"]) == (16, "3 x 5", "random")
    assert any("random" in note for note in written["notes"])


def test_every_timing_holds_its_samples_and_their_median_and_quartiles(written: dict[str, Any]) -> None:
    for name, timing in timings_of(written).items():
        assert len(timing["seconds"]) == (SETTINGS.loops if name.startswith("loop.") else SETTINGS.repeats), name
        assert timing["median"] == statistics.median(timing["seconds"]), name
        assert timing["lower_quartile"] <= timing["median"] <= timing["upper_quartile"], name


@pytest.mark.parametrize(
    ("ratio", "top", "bottom"),
    [
        ("forward", "forward.ours", "forward.diffusers"),
        ("forward_with_text", "forward.ours_with_text", "forward.diffusers"),
        ("forecast_module", "step.forecast", "step.full"),
        ("forecast_module_in_loop", "loop.module.forecast", "loop.module.full"),
        ("forecast_x0", "loop.x0.forecast", "loop.x0.full"),
        ("speedup_module", "loop.uncached", "loop.module"),
        ("speedup_x0", "loop.uncached", "loop.x0"),
    ],
)
def test_a_quotient_is_that_of_the_medians(written: dict[str, Any], ratio: str, top: str, bottom: str) -> None:
    timings = timings_of(written)
    expected = statistics.median(timings[top]["seconds"]) / statistics.median(timings[bottom]["seconds"])
    assert ratios_of(written)[ratio]["value"] == pytest.approx(expected)


@pytest.mark.parametrize(("ratio", "other"), [("cache_cost", "step.full"), ("cache_cost_floor", "step.uncached_again")])
def test_a_cost_is_the_median_difference_within_rounds(written: dict[str, Any], ratio: str, other: str) -> None:
    timings = timings_of(written)
    base = timings["step.uncached"]["seconds"]
    differences = [a - b for a, b in zip(timings[other]["seconds"], base, strict=True)]
    expected = statistics.median(differences) / statistics.median(base)
    assert ratios_of(written)[ratio]["value"] == pytest.approx(expected)


def test_no_ratio_is_without_a_test(written: dict[str, Any]) -> None:
    assert set(ratios_of(written)) == {
        "forward",
        "forward_with_text",
        "cache_cost",
        "cache_cost_floor",
        "forecast_module",
        "forecast_module_in_loop",
        "forecast_x0",
        "speedup_module",
        "speedup_x0",
    }


def test_a_ratio_stands_beside_its_goal_or_bound(written: dict[str, Any], result: report.Result) -> None:
    ratios = ratios_of(written)
    assert (ratios["forward"]["goal"], ratios["forward"]["met"]) == (1e9, True)
    assert (ratios["cache_cost"]["goal"], ratios["cache_cost"]["met"]) == (-1e9, False)
    assert (ratios["forward_with_text"]["goal"], ratios["forward_with_text"]["met"]) == (None, None)
    assert ratios["speedup_module"]["bound"] == ratios["speedup_x0"]["bound"] == 9 / 3, "steps 0, 4 and 8 are full"
    markdown = result.to_markdown()
    for name in [*ratios, *timings_of(written)]:
        assert f"| {name}: " in markdown
    assert "met" in markdown and "missed" in markdown


def test_a_single_round_is_enough(tmp_path: Path) -> None:
    result = speed.measure(TINY, replace(SETTINGS, repeats=1, loops=1))
    for ratio in result.ratios:
        assert ratio.spread.lower_quartile == ratio.spread.upper_quartile == pytest.approx(ratio.value)


def test_a_spread_is_of_the_samples() -> None:
    assert Spread.of([4.0, 1.0, 2.0, 3.0, 100.0]) == Spread(median=3.0, lower_quartile=2.0, upper_quartile=4.0)


def test_an_overhead_does_not_see_drift() -> None:
    """The machine gets three times slower from round to round; the cost within a round stays 1 % of it."""
    without = Timing("a", "", (1.0, 2.0, 3.0))
    with_it = Timing("b", "", (1.01, 2.02, 3.03))
    assert Ratio.overhead("cost", "", with_it, without).value == pytest.approx(0.01)


# What is measured.


def test_both_classes_compute_the_same_on_the_same_memory() -> None:
    subject = Subject.build(TINY, CPU, torch.float32, seed=0)
    theirs = dict(subject.transformers.theirs.named_parameters())
    for name, parameter in subject.transformers.ours.named_parameters():
        assert parameter.data_ptr() == theirs[name].data_ptr(), name
    facts = subject.facts()
    assert facts["largest difference of the outputs over the largest output"] < 1e-5
    low, high = facts["share of the tokens of any block's least and most loaded expert"]
    assert 0 <= low <= 0.25 <= high <= 1


def test_full_steps_keep_and_forecast_steps_skip() -> None:
    """If the timed steps were not what their names say, the ratios would mean nothing."""
    subject = Subject.build(TINY, CPU, torch.float32, seed=0)
    calls = []
    for module in subject.transformers.ours.modules():
        if type(module).__name__ == "HiDreamAttention":
            module.register_forward_hook(lambda *_: calls.append(1))
    blocks = TINY.transformer["num_layers"] + TINY.transformer["num_single_layers"]
    speed.compare_steps(subject, replace(SETTINGS, repeats=1))
    preparing, rounds = 2 + 2, speed.WARM_UP + 1
    assert len(calls) == blocks * (preparing + 3 * rounds), "three of the four contenders compute, one forecasts"


def test_contenders_take_turns_in_both_directions_and_warm_up_does_not_count() -> None:
    order = []
    contenders = [Contender(name, "", lambda name=name: order.append(name)) for name in "ab"]
    timings = take_turns(contenders, 3, CPU, warm_up=1)
    assert "".join(order) == "abbaabba"
    assert [(timing.name, len(timing.seconds)) for timing in timings] == [("a", 3), ("b", 3)]


def test_small_is_the_agreed_size() -> None:
    small = find_size("small")
    assert (small.num_image_tokens, small.num_text_tokens) == (256, 128)
    assert small.goals == {"forward": 1.0, "cache_cost": 0.02, "forecast_module": 0.15, "forecast_x0": 0.01}


def test_real_is_the_published_size() -> None:
    real = find_size("real")
    assert real.num_image_tokens == 4096 and real.devices == ("cuda",)
    with torch.device("meta"):
        transformer = sizes.HiDreamImageTransformer2DModel(**real.transformer)
    assert sum(parameter.numel() for parameter in transformer.parameters()) == pytest.approx(17.106e9, rel=1e-4)


def test_nano_is_the_bundled_model_where_there_is_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sizes, "nano_folder", lambda: tmp_path)
    assert find_size("nano").transformer == NANO
    (tmp_path / "transformer").mkdir()
    config = {"_class_name": "HiDreamImageTransformer2DModel", **NANO, "in_channels": 12}
    (tmp_path / "transformer" / "config.json").write_text(json.dumps(config))
    nano = find_size("nano")
    assert nano.transformer["in_channels"] == 12 and "_class_name" not in nano.transformer
    assert "bundled" in nano.source


# The flags.


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--size", "real", "--device", "cpu"], "real"),
        (["--size", "huge"], "huge"),
        (["--repeats", "0"], "repeats"),
        (["--loops", "901"], "loops"),
        (["--output", "/no/such/folder/results"], "/no/such/folder/results"),
    ],
)
def test_a_bad_flag_is_refused_in_one_line(flags: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert speed.main(flags) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and said in captured.err and captured.err.count("\n") == 1


def test_main_writes_both_files(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(speed, "find_size", lambda name: TINY)
    output = tmp_path / "results"
    flags = ["--size", "nano", "--device", "cpu", "--repeats", "1", "--loops", "1", "--output", str(output)]
    assert speed.main(flags) == 0
    assert {path.suffix for path in output.iterdir()} == {".json", ".md"}
    assert capsys.readouterr().out.startswith("# speed, size tiny")
