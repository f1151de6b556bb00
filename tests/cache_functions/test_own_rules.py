"""Bases and schedules from outside: functions, and what a package announces; with settings of their own."""

import json
import pickle
from collections.abc import Iterator
from pathlib import Path

import pytest

from cache_functions import CacheConfig, planned_full_steps, schedule_names
from cache_functions.named import cache_with
from hi_diffusers.commands import inference
from hi_diffusers.pictures.metadata import read_metadata
from taylor_utils import basis_names, basis_weights, plugins

RULES = """
def faded(anchors, step, max_order, *, decay=0.5, sigma=1.0):
    return [0.0] * (len(anchors) - 1) + [1.0 - decay * 1e-3]

def halves(num_steps, *, full_steps, first=1):
    return [*range(first), *range(first, num_steps, num_steps // full_steps)]
"""
ENTRY_POINTS = "[taylor_utils.bases]\nfaded = own_rules:faded\n[cache_functions.schedules]\nhalves = own_rules:halves\n"
PROMPT = "a red circle on a blue background"


def newest(anchors: list[int], step: int, max_order: int, *, tilt: float = 0.0) -> list[float]:
    return [0.0] * (len(anchors) - 1) + [1.0 + tilt]


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An installed package that announces a basis and a schedule."""
    (tmp_path / "own_rules.py").write_text(RULES, encoding="utf-8")
    info = tmp_path / "own_rules-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: own-rules\nVersion: 1.0\n", encoding="utf-8")
    (info / "entry_points.txt").write_text(ENTRY_POINTS, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    yield
    plugins._load.cache_clear()


def test_a_function_is_a_basis_and_its_own_setting_an_extra() -> None:
    config = CacheConfig(basis=newest, extras={"tilt": 0.5})
    assert basis_weights(config.basis, [0, 4], 6, 1, **config.extras) == [0.0, 1.5]
    assert config.settings()["basis"] == f"{__name__}:newest" and config.settings()["extras"] == {"tilt": 0.5}
    assert pickle.loads(pickle.dumps(config)) == config and hash(config) is not None


def test_without_extras_the_metadata_is_what_it_was() -> None:
    assert "extras" not in CacheConfig().settings()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"extras": {"tilt": 1}}, "tilt has no effect with schedule interval and basis taylor"),
        ({"basis": newest, "extras": {"tilt": float("nan")}}, "extras must hold JSON values, got tilt = nan"),
        ({"basis": newest, "extras": {"max_order": 2}}, "extras must not hold max_order"),
        ({"basis": newest, "extras": [1]}, "extras must map names to values"),
        ({"basis": newest, "sigma": 0.5}, f"sigma has no effect with basis {__name__}:newest"),
        ({"basis": 7}, "basis must be a name or a function, got 7"),
        ({"schedule": 7}, "schedule must be a name or a function, got 7"),
        ({"basis": "os:system"}, "basis 'os:system' names a function of a program"),
    ],
)
def test_what_cannot_work_is_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CacheConfig(**settings)


def test_a_function_is_a_schedule() -> None:
    config = CacheConfig(schedule=lambda num_steps, *, full_steps: range(full_steps), full_steps=3)
    assert planned_full_steps(config, 10) == [0, 1, 2]


def test_another_basis_drops_the_extras_of_the_one_before() -> None:
    base = CacheConfig(basis=newest, extras={"tilt": 0.5})
    assert cache_with(None, base, {"basis": "hermite"}).extras == {}
    assert cache_with(None, base, {"extras": {"tilt": 0.1}}).extras == {"tilt": 0.1}
    assert cache_with(None, base, {"max_order": 2}).extras == {"tilt": 0.5}


def test_what_a_package_announces_is_found_by_name(package: None) -> None:
    assert "faded" in basis_names() and "halves" in schedule_names()
    config = CacheConfig(basis="faded", schedule="halves", full_steps=2, extras={"first": 3, "decay": 0.0})
    assert planned_full_steps(config, 10) == [0, 1, 2, 3, 8]
    assert config.values(["decay", "sigma"]) == {"decay": 0.0}


def test_an_announced_rule_goes_through_the_command_line_and_the_metadata(
    package: None, nano_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, again, stranger = (tmp_path / name for name in ("a.png", "b.png", "c.png"))
    flags = ["--device", "cpu", "--seed", "3", "--num_steps", "8"]
    own = [
        "--basis",
        "faded",
        "--schedule",
        "halves",
        "--full_steps",
        "2",
        "--extra",
        "decay=0.25",
        "--extra",
        "first=2",
    ]
    assert inference.main([PROMPT, *flags, *own, "-o", str(first)]) == 0
    cache = read_metadata(first)["cache"]
    assert (cache["basis"], cache["schedule"], cache["extras"]) == ("faded", "halves", {"decay": 0.25, "first": 2})
    assert inference.main(["--like", str(first), "--device", "cpu", "-o", str(again)]) == 0
    assert first.read_bytes() == again.read_bytes()
    assert inference.main([PROMPT, *flags, *own[:2], "--extra", "speed=1", "-o", str(stranger)]) == 2
    assert "speed has no effect with schedule interval and basis faded" in capsys.readouterr().err


def test_a_picture_s_function_is_never_imported(
    nano_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from PIL import Image

    from hi_diffusers.pictures.metadata import write_picture

    (tmp_path / "trap.py").write_text("raise SystemExit('imported')", encoding="utf-8")
    metadata = {"version": 1, "model": {"model_type": "nano"}, "options": {"prompt": "a"}, "cache": {"basis": "trap:f"}}
    write_picture(Image.new("RGB", (8, 8)), tmp_path / "a.png", json.loads(json.dumps(metadata)))
    assert inference.main(["--like", str(tmp_path / "a.png"), "-o", str(tmp_path / "b.png")]) == 2
    assert "names a function of a program" in capsys.readouterr().err
