"""Which steps are computed."""

import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch

import cache_functions.schedules
from cache_functions import (
    CacheConfig,
    FeatureName,
    cache_init,
    cal_type,
    compute_or_forecast,
    planned_full_steps,
    schedule_names,
    settle,
)
from cache_functions.budget import full_steps_for


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
    source = "def plan(num_steps):\n    return [3, num_steps - 1]\n"
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


# A budget.


def test_cosine_is_the_published_curve_made_distinct() -> None:
    """S = 50, K = 5: 49 (1 - cos(pi j / 4)) / 2 = 0, 7.18, 24.5, 41.8, 49; round takes halves to even."""
    assert planned_full_steps(CacheConfig(schedule="cosine", full_steps=5), 50) == [0, 7, 24, 42, 49]
    assert planned_full_steps(CacheConfig(schedule="cosine", full_steps=5), 6) == [0, 1, 2, 4, 5]


@pytest.mark.parametrize(("exponent", "expected"), [(1.0, [0, 12, 24, 37, 49]), (2.0, [0, 3, 12, 28, 49])])
def test_power_is_its_curve(exponent: float, expected: list[int]) -> None:
    assert planned_full_steps(CacheConfig(schedule="power", full_steps=5, exponent=exponent), 50) == expected


@pytest.mark.parametrize("schedule", ["cosine", "power"])
def test_a_curve_makes_exactly_the_budget_and_begins_with_step_0(schedule: str) -> None:
    for num_steps in (1, 2, 7, 16, 50):
        for full_steps in range(1, num_steps + 1):
            plan = planned_full_steps(CacheConfig(schedule=schedule, full_steps=full_steps), num_steps)
            assert len(plan) == full_steps and plan[0] == 0 and plan[-1] < num_steps, (num_steps, full_steps)


def test_the_interval_makes_the_budgets_that_it_can_and_names_the_nearest_for_others() -> None:
    for threshold in range(1, 51):
        count = len(planned_full_steps(CacheConfig(fresh_threshold=threshold), 50))
        assert len(planned_full_steps(CacheConfig(full_steps=count), 50)) == count
    with pytest.raises(ValueError, match=r"full_steps 12 of 50 cannot be made .* nearest is 13 \(fresh_threshold 4\)"):
        planned_full_steps(CacheConfig(full_steps=12), 50)


def test_the_budget_is_a_quarter_rounded_up_unless_it_is_given() -> None:
    assert len(planned_full_steps(CacheConfig(schedule="cosine"), 50)) == 13
    assert len(planned_full_steps(CacheConfig(schedule="cosine"), 28)) == 7


@pytest.mark.parametrize("schedule", ["cosine", "interval", "power", "adaptive"])
def test_a_budget_of_more_steps_than_there_are_is_refused(schedule: str) -> None:
    with pytest.raises(ValueError, match="full_steps must be at most num_steps 5, got 6"):
        settle(CacheConfig(schedule=schedule, full_steps=6), 5)


@pytest.mark.parametrize(("speedup", "full_steps"), [(4, 13), (3.85, 13), (1, 50), (50, 1), (1000, 1), (6.25, 8)])
def test_a_speedup_is_the_steps_over_it_rounded_up(speedup: float, full_steps: int) -> None:
    assert full_steps_for(speedup, 50) == full_steps


@pytest.mark.parametrize("speedup", [0.5, 0, -1, float("nan"), float("inf")])
def test_a_speedup_below_1_is_refused(speedup: float) -> None:
    with pytest.raises(ValueError, match="speedup must be a number of at least 1, got"):
        full_steps_for(speedup, 50)


# A mask.


def test_a_mask_is_executed_as_it_is() -> None:
    config = CacheConfig(schedule="mask", mask=(0, 1, 5, 8))
    cache_dic, current = cache_init(config, 10)
    assert [step for step in range(10) if cal_type(cache_dic, current) == "full"] == [0, 1, 5, 8]


def test_a_mask_beyond_the_steps_is_refused() -> None:
    with pytest.raises(ValueError, match="mask must hold steps below 5, got 7"):
        planned_full_steps(CacheConfig(schedule="mask", mask=(0, 7)), 5)


def test_a_mask_that_nobody_gave_is_refused() -> None:
    with pytest.raises(ValueError, match="schedule mask needs a list of full steps"):
        planned_full_steps(CacheConfig(schedule="mask"), 5)


# Adaptive.


def run_adaptive(error_at: Callable[[int], float], full_steps: int, num_steps: int = 50) -> list[int]:
    """The full steps where a forecast over a gap g ending at step s has the error error_at(s) g^2."""
    config = CacheConfig(target="x0", schedule="adaptive", full_steps=full_steps)
    cache_dic, current = cache_init(config, num_steps)
    for step in range(num_steps):
        if cal_type(cache_dic, current) == "full" and step:
            gap = step - cache_dic.full_steps[-2]
            computed = torch.ones(4)
            cache_dic.observe(computed, computed * (1 + error_at(step) * gap**2))
    return cache_dic.full_steps


def test_adaptive_spaces_evenly_where_all_steps_are_alike() -> None:
    gaps = [b - a for a, b in pairwise(run_adaptive(lambda step: 0.01, 10))]
    assert max(gaps) - min(gaps) <= 1


def test_adaptive_spends_its_steps_where_forecasts_are_bad() -> None:
    steps = run_adaptive(lambda step: 0.04 if step < 25 else 0.0025, 12)
    assert sum(step < 25 for step in steps) > sum(step >= 25 for step in steps)


@pytest.mark.parametrize("full_steps", [1, 2, 5, 13, 50])
def test_adaptive_never_exceeds_its_budget(full_steps: int) -> None:
    for error in (0.0, 1e-6, 1.0):
        assert 1 <= len(run_adaptive(lambda step, error=error: error * (1 + step % 3), full_steps)) <= full_steps


def test_adaptive_cannot_be_planned() -> None:
    with pytest.raises(ValueError, match="schedule adaptive decides during the generation"):
        planned_full_steps(CacheConfig(schedule="adaptive"), 10)


def test_adaptive_refuses_a_batch() -> None:
    with pytest.raises(ValueError, match="schedule adaptive can draw only one picture at a time, got a batch of 2"):
        CacheConfig(schedule="adaptive").check_batch(2)
    CacheConfig(schedule="adaptive").check_batch(1)
    CacheConfig(schedule="cosine").check_batch(2)


def test_the_error_of_a_full_step_is_what_a_forecast_of_it_would_have_had() -> None:
    config = CacheConfig(target="x0", basis="reuse", schedule="adaptive", full_steps=3)
    cache_dic, current = cache_init(config, 3)
    name = FeatureName("x0")
    for value in (1.0, 2.0, 4.0):
        cal_type(cache_dic, current)
        compute_or_forecast(cache_dic, current, name, lambda value=value: (torch.full((2,), value), None))
    cache_dic.close_step()
    assert cache_dic.errors == pytest.approx([0.5, 0.5])
