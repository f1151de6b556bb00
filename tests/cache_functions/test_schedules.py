"""Which steps are computed."""

import sys
from pathlib import Path

import pytest

import cache_functions.schedules
from cache_functions import CacheConfig, cache_init, cal_type, planned_full_steps, schedule_names


def test_50_steps_at_threshold_4_compute_every_fourth_step() -> None:
    full_steps = planned_full_steps(CacheConfig(fresh_threshold=4), 50)
    assert full_steps == [0, 4, 8, 12, 16, 20, 24, 28, 32, 36, 40, 44, 48]
    assert len(full_steps) == 13


def test_the_interval_begins_after_the_leading_full_steps() -> None:
    assert planned_full_steps(CacheConfig(fresh_threshold=4, first_enhance=3), 16) == [0, 1, 2, 6, 10, 14]


def test_the_final_steps_are_full_whatever_the_interval_says() -> None:
    assert planned_full_steps(CacheConfig(fresh_threshold=4, last_enhance=3), 16) == [0, 4, 8, 12, 13, 14, 15]


def test_a_full_final_step_starts_no_new_interval_before_the_end() -> None:
    assert planned_full_steps(CacheConfig(fresh_threshold=5, last_enhance=1), 13) == [0, 5, 10, 12]


def test_threshold_1_computes_every_step() -> None:
    assert planned_full_steps(CacheConfig(fresh_threshold=1), 7) == list(range(7))


def test_a_threshold_beyond_the_end_computes_step_0_alone() -> None:
    assert planned_full_steps(CacheConfig(fresh_threshold=1000), 7) == [0]


@pytest.mark.parametrize("setting", ["first_enhance", "last_enhance"])
def test_more_enhanced_steps_than_there_are_compute_every_step(setting: str) -> None:
    assert planned_full_steps(CacheConfig(fresh_threshold=4, **{setting: 99}), 7) == list(range(7))


def test_without_a_cache_every_step_is_planned_full() -> None:
    assert planned_full_steps(CacheConfig.off(), 5) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("threshold", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("first_enhance", [1, 3])
@pytest.mark.parametrize("last_enhance", [0, 2])
def test_the_plan_is_what_a_generation_executes(threshold: int, first_enhance: int, last_enhance: int) -> None:
    config = CacheConfig(fresh_threshold=threshold, first_enhance=first_enhance, last_enhance=last_enhance)
    cache_dic, current = cache_init(config, 20)
    executed = [step for step in range(20) if cal_type(cache_dic, current) == "full"]
    assert executed == planned_full_steps(config, 20) == cache_dic.full_steps


def test_a_file_in_the_folder_is_a_schedule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = "def is_full(step, full_steps, num_steps, config):\n    return step in (3, num_steps - 1)\n"
    (tmp_path / "third_and_last.py").write_text(source, encoding="utf-8")
    paths = [*cache_functions.schedules.__path__, str(tmp_path)]
    monkeypatch.setattr(cache_functions.schedules, "__path__", paths)
    try:
        assert "third_and_last" in schedule_names()
        assert planned_full_steps(CacheConfig(schedule="third_and_last"), 9) == [0, 3, 8]
    finally:
        sys.modules.pop("cache_functions.schedules.third_and_last", None)


def test_an_open_threshold_is_planned_as_4() -> None:
    assert planned_full_steps(CacheConfig(), 50) == list(range(0, 50, 4))
