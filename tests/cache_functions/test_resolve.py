"""From what was asked for to what is done: targets, calibrations, and the best of them."""

import json
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cache_functions import (
    CacheConfig,
    Calibration,
    CalibrationKey,
    CalibrationShelf,
    Sampler,
    planned_full_steps,
    resolve,
)
from cache_functions.calibration import Choice, calibration_text
from cache_functions.optimum import Rule, optimal_full_steps, step_factors
from cache_functions.resolve import BEST_RENOISING, BEST_RULE

NUM_STEPS = 20
SAMPLER = Sampler("the unipc scheduler of some-model", "unipc", NUM_STEPS, 3.0, 2.0, renoises=False)
LCM = replace(SAMPLER, name="the lcm scheduler of some-model", scheduler="lcm", guidance=0.0, renoises=True)
STRONG, UNGUIDED = replace(SAMPLER, guidance=4.0), replace(SAMPLER, guidance=0.0)
SIGMAS = tuple(1 - step / NUM_STEPS for step in range(NUM_STEPS + 1))
CHOICE = Choice((0, 3, 8, 13, 17), 2, "taylor", 0.01, True, 3, 40.0, 35.0)


def gram() -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    drift = torch.randn(6, NUM_STEPS, 20, generator=generator, dtype=torch.float64).cumsum(1) + 3
    return torch.einsum("psn,ptn->st", drift, drift) / len(drift)


def write(folder: Path, name: str = "a.json", choice: Choice = CHOICE, **key: Any) -> Path:
    """A calibration file for SAMPLER, or one that differs in `key`."""
    folder.mkdir(exist_ok=True)
    content = asdict(SAMPLER.key("model", "x0")) | key
    choices = {5: choice, 10: replace(choice, full_steps=tuple(range(10)), prior="reuse")}
    path = folder / name
    path.write_text(calibration_text(CalibrationKey(**content), gram(), SIGMAS, choices, {"prompts": 3}))
    return path


def shelf(*folders: Path) -> CalibrationShelf:
    return CalibrationShelf("model", folders)


# Targets.


@pytest.mark.parametrize("target", ["module", "residual", "velocity"])
def test_a_sampler_that_adds_noise_admits_x0_only_and_says_why(target: str) -> None:
    with pytest.raises(ValueError, match=f"target must be x0 with the lcm .* got '{target}'.* fresh noise") as refusal:
        resolve(CacheConfig(target=target), LCM)
    assert "drawn after the last full step" in str(refusal.value)
    assert resolve(CacheConfig(), LCM).config.target == "x0"


def test_the_corrector_is_refused_where_the_sampler_adds_noise() -> None:
    with pytest.raises(ValueError, match=r"corrector cannot work with the lcm scheduler .* fresh noise"):
        resolve(CacheConfig(target="x0", corrector=True), LCM)


def test_the_corrector_forecasts_x0_unless_velocity_is_asked_for() -> None:
    assert resolve(CacheConfig(corrector=True), SAMPLER).config.target == "x0"
    assert resolve(CacheConfig(corrector=True, target="velocity"), SAMPLER).config.target == "velocity"


# A calibration's file.


def test_a_file_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    calibration = Calibration.read(write(tmp_path))
    assert calibration.key == SAMPLER.key("model", "x0")
    assert torch.equal(calibration.gram, gram()), "float64 survives JSON"
    assert calibration.sigmas == SIGMAS
    assert calibration.choices[5] == CHOICE
    assert calibration.reference.startswith("sha256:")


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"version": 2}, "version is 2, this software reads 1"),
        ({"gram": [[1.0]]}, r"its matrix of shape \(1, 1\) does not fit 20 steps"),
        ({"choices": {}}, "not a calibration file"),
        ({"key": {}}, "not a calibration file"),
        ({"gram": "x"}, "not a calibration file"),
    ],
)
def test_a_file_that_is_no_calibration_is_refused_in_one_sentence(
    tmp_path: Path, change: dict[str, Any], complaint: str
) -> None:
    path = write(tmp_path)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=complaint) as refusal:
        Calibration.read(path)
    assert str(path) in str(refusal.value) and "\n" not in str(refusal.value)


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"calibration .*b\.json cannot be read: No such file"):
        Calibration.read(tmp_path / "b.json")


# Looked up.


def test_learned_weights_take_the_calibration_that_is_found(tmp_path: Path) -> None:
    write(tmp_path / "wrong", guidance=4.0)
    path = write(tmp_path / "right")
    config = resolve(
        CacheConfig(basis="learned", schedule="cosine", full_steps=5), SAMPLER, shelf(tmp_path / "wrong", path.parent)
    ).config
    assert isinstance(config.calibration, Calibration)
    assert config.calibration.reference == Calibration.read(path).reference
    assert (config.target, config.prior, config.ridge) == ("x0", "taylor", 0.01)


def test_learned_weights_without_one_are_refused_with_what_differs(tmp_path: Path) -> None:
    config = CacheConfig(basis="learned", schedule="cosine")
    with pytest.raises(ValueError, match=r"needs a calibration .* \(none was found for this model\): run calibrate.py"):
        resolve(config, SAMPLER)
    write(tmp_path, num_steps=NUM_STEPS, shift=6.0)
    with pytest.raises(ValueError, match=r"the closest: its shift is 6\.0, not 3\.0"):
        resolve(config, SAMPLER, shelf(tmp_path))


@pytest.mark.parametrize(
    ("field", "value"),
    [("model", "other"), ("scheduler", "euler"), ("shift", 6.0), ("guidance", 4.0), ("target", "velocity")],
)
@pytest.mark.parametrize("schedule", ["best", "cosine"])
def test_a_named_file_that_does_not_fit_is_refused_by_the_field_that_differs(
    tmp_path: Path, schedule: str, field: str, value: Any
) -> None:
    path = write(tmp_path, **{field: value})
    basis = {} if schedule == "best" else {"basis": "learned"}
    config = CacheConfig(target="x0", schedule=schedule, calibration=str(path), **basis)
    with pytest.raises(ValueError, match=re.escape(f"calibration does not fit: its {field} is {value}, not ")):
        resolve(config, SAMPLER, shelf())


def test_a_calibration_that_nothing_reads_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="calibration has no effect with basis taylor and schedule interval"):
        resolve(CacheConfig(calibration=str(write(tmp_path))), SAMPLER, shelf())


def test_a_mask_without_a_list_is_the_optimum_for_its_budget_and_anchors(tmp_path: Path) -> None:
    write(tmp_path)
    config = CacheConfig(target="x0", basis="reuse", schedule="mask", max_order=0, full_steps=6)
    resolved = resolve(config, SAMPLER, shelf(tmp_path)).config
    rule = Rule(1, "taylor", 0.01)
    assert resolved.mask == optimal_full_steps(gram(), step_factors(SIGMAS, "x0"), rule, 6)[0]
    assert resolved.calibration is None, "the mask is all that it needed"


# The best.


def test_the_best_is_the_calibrations_choice(tmp_path: Path) -> None:
    path = write(tmp_path)
    resolution = resolve(CacheConfig.best(full_steps=5), SAMPLER, shelf(tmp_path))
    config = resolution.config
    assert resolution.notices == ()
    assert (config.target, config.basis, config.schedule, config.mask) == ("x0", "learned", "mask", CHOICE.full_steps)
    assert (config.max_order, config.prior, config.ridge) == (2, "taylor", 0.01)
    assert (config.corrector, config.corrector_from, config.full_steps) == (True, 3, 5)
    assert config.settings()["calibration"] == Calibration.read(path).reference


def test_the_best_of_two_targets_is_the_one_that_measured_better(tmp_path: Path) -> None:
    write(tmp_path, "x0.json")
    write(tmp_path, "velocity.json", choice=replace(CHOICE, median_db=41.0), target="velocity")
    assert resolve(CacheConfig.best(5), SAMPLER, shelf(tmp_path)).config.target == "velocity"
    asked = replace(CacheConfig.best(5), target="x0")
    assert resolve(asked, SAMPLER, shelf(tmp_path)).config.target == "x0"


def test_a_budget_that_was_not_calibrated_takes_the_nearest_choice_and_a_schedule_of_its_own(tmp_path: Path) -> None:
    write(tmp_path)
    config = resolve(CacheConfig.best(full_steps=6), SAMPLER, shelf(tmp_path)).config
    assert len(config.mask) == 6 and config.prior == "taylor"
    rule = Rule(3, "taylor", 0.01, corrector=True)
    assert config.mask == optimal_full_steps(gram(), step_factors(SIGMAS, "x0"), rule, 6)[0]


@pytest.mark.parametrize(
    ("sampler", "num_steps", "full_steps"),
    [
        (SAMPLER, 49, 13),  # a quarter
        (SAMPLER, 24, 6),
        (SAMPLER, 20, 6),  # the floor
        (SAMPLER, 12, 6),
        (SAMPLER, 11, None),  # below it nothing is cached
        (SAMPLER, 4, None),
        (SAMPLER, 1, None),
        (STRONG, 50, 13),
        (STRONG, 49, 13),
        (STRONG, 36, 12),
        (STRONG, 35, None),
        (UNGUIDED, 16, 4),
        (UNGUIDED, 4, 2),
        (UNGUIDED, 3, None),
        (LCM, 28, 7),
        (LCM, 16, 4),
        (LCM, 4, 2),
        (LCM, 2, None),
    ],
)
def test_a_budget_that_nobody_named_is_never_worse_than_fewer_steps(
    sampler: Sampler, num_steps: int, full_steps: int | None
) -> None:
    resolution = resolve(CacheConfig.best(), replace(sampler, num_steps=num_steps))
    if full_steps is None:
        assert resolution.config.is_off
        (notice,) = resolution.notices
        assert re.fullmatch(r"below \d+ steps at guidance \S+ nothing is cached unless full_steps is given", notice)
        return
    assert len(planned_full_steps(resolution.config, num_steps)) == full_steps
    is_quarter = full_steps == -(-num_steps // 4)
    assert is_quarter or f"{full_steps} of {num_steps} steps are full: at a quarter" in resolution.notices[0]


def test_a_budget_that_was_named_is_kept() -> None:
    few = replace(SAMPLER, num_steps=8)
    assert len(planned_full_steps(resolve(CacheConfig.best(2), few).config, 8)) == 2
    assert not resolve(CacheConfig.taylorseer(), few).config.is_off


@pytest.mark.parametrize(("sampler", "rule"), [(SAMPLER, BEST_RULE), (LCM, BEST_RENOISING)])
def test_without_a_calibration_the_best_is_a_fixed_rule_and_says_so(sampler: Sampler, rule: dict[str, Any]) -> None:
    resolution = resolve(CacheConfig.best(5), sampler)
    assert resolution.config == CacheConfig(**rule, fresh_threshold=4)
    (notice,) = resolution.notices
    assert notice.endswith("Run calibrate.py for a measured choice")
    assert f"using {rule['basis']} order {rule['max_order']} on the {rule['target']}" in notice


@pytest.mark.parametrize("full_steps", range(1, 21))
def test_without_a_calibration_the_best_makes_every_budget(full_steps: int) -> None:
    config = resolve(CacheConfig.best(full_steps), SAMPLER).config
    assert len(planned_full_steps(config, SAMPLER.num_steps)) == full_steps


def test_the_notice_names_what_differs(tmp_path: Path) -> None:
    write(tmp_path, guidance=4.0)
    (notice,) = resolve(CacheConfig.best(5), SAMPLER, shelf(tmp_path)).notices
    assert "its guidance is 4.0, not 2.0" in notice


def test_guidance_up_to_1_is_no_guidance(tmp_path: Path) -> None:
    write(tmp_path, guidance=0.0)
    assert resolve(CacheConfig.best(5), replace(SAMPLER, guidance=1.0), shelf(tmp_path)).notices == ()


def test_what_was_resolved_resolves_to_itself_also_from_its_settings(tmp_path: Path) -> None:
    """A picture's metadata names the calibration by its hash; --like finds the file again."""
    write(tmp_path)
    config = resolve(CacheConfig.best(5), SAMPLER, shelf(tmp_path)).config
    assert resolve(config, SAMPLER, shelf(tmp_path)).config == config
    again = resolve(CacheConfig(**json.loads(json.dumps(config.settings()))), SAMPLER, shelf(tmp_path)).config
    assert again.settings() == config.settings()
    with pytest.raises(ValueError, match=r"calibration sha256:.* was not found in the folders"):
        resolve(CacheConfig(**config.settings()), SAMPLER, shelf())


# A quality instead of a budget.


def test_a_quality_is_the_fewest_full_steps_that_reach_it(tmp_path: Path) -> None:
    write(tmp_path, choice=replace(CHOICE, p10_db=40.0))  # 5 and 10 full steps, both 40 dB
    resolved = resolve(CacheConfig.best(quality="medium"), SAMPLER, shelf(tmp_path)).config
    assert len(resolved.mask or ()) == 5 and resolved.quality is None
    assert "quality" not in resolved.settings(), "a picture's settings say what was drawn"


def test_a_quality_that_the_calibration_does_not_reach_is_refused_with_what_it_reaches(tmp_path: Path) -> None:
    write(tmp_path, choice=replace(CHOICE, p10_db=40.0))
    message = "quality high needs 45 dB for nine in ten pictures, and the calibration reaches 40.0 with 10 full steps"
    with pytest.raises(ValueError, match=re.escape(message)):
        resolve(CacheConfig.best(quality="high"), SAMPLER, shelf(tmp_path))


def test_a_quality_needs_a_calibration() -> None:
    with pytest.raises(ValueError, match=r"quality draft needs a calibration for .*: run calibrate\.py, or give"):
        resolve(CacheConfig.best(quality="draft"), SAMPLER)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quality": "best"}, "quality must be one of high, medium, draft, got 'best'"),
        ({"schedule": "best", "quality": "high", "full_steps": 5}, "quality and full_steps both set the budget"),
        ({"quality": "high"}, "quality high has no effect with other caches than best"),
    ],
)
def test_a_quality_that_contradicts_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CacheConfig(**settings)
