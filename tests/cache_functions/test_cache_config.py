"""What a cache may be configured to, and how open settings are filled in."""

import json
import re
import sys
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import pytest

import taylor_utils.bases
from cache_functions import CacheConfig, Sampler, cache_init, cal_type, resolve
from taylor_utils import basis_weights

REFUSED = [
    ("target", "blocks", "must be one of module, residual, velocity, x0, solver, off"),
    ("target", 3, "must be one of module, residual, velocity, x0, solver, off"),
    ("basis", "fourier", "must be one of hermite, learned, newton, reuse, taylor"),
    ("schedule", "sometimes", "must be one of adaptive, cosine, interval, mask, power, best"),
    ("abscissa", "time", "must be one of step, sigma, log_snr"),
    ("prior", "newton", "must be one of reuse, taylor"),
    *[("full_steps", value, "must be a whole number from 1 to 1000") for value in (0, 1001, 2.5, True)],
    *[("corrector_from", value, "must be a whole number from 0 to 1000") for value in (-1, None)],
    *[("exponent", value, "must be a number from 0.01 to 10") for value in (0, 11, "2", None)],
    *[("sigma", value, "must be a number from 0.01 to 2") for value in (0, -1.0, 2.1, True)],
    *[("ridge", value, "must be a number from 0 to 1e+06") for value in (-0.1, "0")],
    ("corrector", 1, "must be true or false"),
    ("mask", "0,4", "must be a list of step indices"),
    *[
        ("mask", value, "must be increasing step indices that begin with 0")
        for value in ([], [1, 4], [0, 4, 4], [0, 2.5])
    ],
    *[("fresh_threshold", value, "must be a whole number from 1 to 1000") for value in (0, -1, 1001, 1.5, True, "4")],
    *[("max_order", value, "must be a whole number from 0 to 6") for value in (-1, 7, 1.0, None, False)],
    *[("first_enhance", value, "must be a whole number from 1 to 1000") for value in (0, 1001, 2.0, None)],
    *[("last_enhance", value, "must be a whole number from 0 to 1000") for value in (-1, 1001, "1", None)],
]


UNIPC = Sampler("the unipc scheduler of some-model", "unipc", 28, 3.0, 2.0, renoises=False)
LCM = Sampler("the lcm scheduler of some-model", "lcm", 28, 3.0, 2.0, renoises=True)


@pytest.mark.parametrize(("name", "value", "allowed"), REFUSED)
def test_a_refusal_names_the_setting_the_value_and_what_is_allowed(name: str, value: Any, allowed: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"{name} {allowed}")) as refusal:
        CacheConfig(**{name: value})
    assert str(refusal.value).endswith(f"got {value!r}")


@pytest.mark.parametrize(
    ("name", "value"),
    [("fresh_threshold", 1), ("fresh_threshold", 1000), ("max_order", 0), ("max_order", 6), ("last_enhance", 0)],
)
def test_the_ends_of_a_range_are_allowed(name: str, value: int) -> None:
    assert getattr(CacheConfig(**{name: value}), name) == value


def test_a_configuration_cannot_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        CacheConfig().max_order = 2


def test_the_default_is_the_papers_setting() -> None:
    assert CacheConfig() == CacheConfig.taylorseer()
    assert CacheConfig(fresh_threshold=6, max_order=2) == CacheConfig.taylorseer(fresh_threshold=6, max_order=2)


def test_only_off_is_off() -> None:
    assert CacheConfig.off().is_off
    assert not CacheConfig().is_off
    assert not CacheConfig(fresh_threshold=1).is_off


@pytest.mark.parametrize(
    ("target", "sampler", "resolved"),
    [(None, UNIPC, "module"), (None, LCM, "x0"), ("x0", UNIPC, "x0"), ("x0", LCM, "x0"), ("module", UNIPC, "module")],
)
def test_the_target_follows_from_the_sampler_unless_it_is_given(
    target: str | None, sampler: Sampler, resolved: str
) -> None:
    assert resolve(CacheConfig(target=target), sampler).config.target == resolved


def test_module_with_a_renoising_sampler_is_refused_with_the_reason() -> None:
    with pytest.raises(ValueError, match="target must be x0 with the lcm scheduler of some-model, got 'module'") as no:
        resolve(CacheConfig(target="module"), LCM)
    assert "noise that is drawn after the last full step" in str(no.value)


@pytest.mark.parametrize("sampler", [UNIPC, LCM])
def test_off_stays_off(sampler: Sampler) -> None:
    assert resolve(CacheConfig.off(), sampler).config == CacheConfig.off()


def test_an_open_threshold_becomes_4_and_a_given_one_stays() -> None:
    assert resolve(CacheConfig(), UNIPC).config.fresh_threshold == 4
    assert resolve(CacheConfig(fresh_threshold=7), UNIPC).config.fresh_threshold == 7


def test_resolving_changes_nothing_else_and_settles() -> None:
    config = CacheConfig(max_order=3, first_enhance=2, last_enhance=1)
    resolved = resolve(config, LCM).config
    assert resolved == CacheConfig("x0", "taylor", "interval", 4, 3, 2, 1)
    assert resolve(resolved, LCM).config == resolved


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fresh_threshold": 3, "full_steps": 5}, "fresh_threshold and full_steps both set the budget"),
        ({"schedule": "cosine", "fresh_threshold": 3}, "fresh_threshold has no effect with schedule cosine"),
        ({"schedule": "cosine", "last_enhance": 3}, "last_enhance has no effect with schedule cosine"),
        ({"schedule": "cosine", "exponent": 3.0}, "exponent has no effect with schedule cosine"),
        ({"mask": (0, 4)}, "mask has no effect with schedule interval"),
        ({"schedule": "mask", "mask": (0, 4), "full_steps": 3}, "full_steps 3 contradicts the mask, which has 2"),
        ({"sigma": 0.5, "basis": "reuse"}, "sigma has no effect with basis reuse"),
        ({"abscissa": "sigma"}, "abscissa has no effect with basis taylor"),
        ({"ridge": 0.1}, "ridge has no effect with basis taylor"),
        (
            {"first_enhance": 3, "schedule": "cosine", "basis": "reuse"},
            "first_enhance has no effect with schedule cosine and basis reuse",
        ),
        ({"corrector_from": 3}, "corrector_from 3 has no effect without the corrector"),
        ({"corrector": True, "target": "module"}, "corrector needs target velocity or x0, got 'module'"),
        ({"basis": "learned", "target": "residual"}, "basis learned forecasts velocity and x0, not target 'residual'"),
        ({"schedule": "best", "max_order": 2}, "max_order is chosen by schedule best"),
    ],
)
def test_settings_that_contradict_each_other_or_do_nothing_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        CacheConfig(**settings)


def test_the_named_settings_are_what_they_say() -> None:
    assert CacheConfig.hicache() == CacheConfig(basis="hermite", max_order=2, sigma=0.5)
    assert CacheConfig.best(full_steps=8) == CacheConfig(schedule="best", full_steps=8)


def test_a_mask_from_json_equals_the_tuple_it_was() -> None:
    config = CacheConfig(schedule="mask", mask=(0, 4, 9))
    assert CacheConfig(**json.loads(json.dumps(config.settings()))) == config


def test_a_basis_is_given_the_fields_that_are_named_like_its_settings() -> None:
    cache_dic, current = cache_init(CacheConfig(basis="hermite", sigma=0.25, fresh_threshold=2), 4)
    for _ in range(4):
        cal_type(cache_dic, current)
    assert list(current.weights) == basis_weights("hermite", [0, 2], 3, 1, sigma=0.25)


@pytest.mark.parametrize("config", [CacheConfig.best(), CacheConfig(target="x0", basis="learned")])
def test_what_needs_a_calibration_needs_resolve_first(config: CacheConfig) -> None:
    with pytest.raises(ValueError, match="need their calibration: call resolve first"):
        cache_init(config, 10)


def test_a_setting_that_is_no_field_keeps_the_basis_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = "def weights(anchors, step, max_order, *, share=0.5, last_enhance):\n    return [share + last_enhance]\n"
    (tmp_path / "own.py").write_text(source, encoding="utf-8")
    monkeypatch.setattr(taylor_utils.bases, "__path__", [*taylor_utils.bases.__path__, str(tmp_path)])
    try:
        cache_dic, current = cache_init(CacheConfig(basis="own", last_enhance=2), 9)
        kinds = [cal_type(cache_dic, current) for _ in range(2)]
    finally:
        sys.modules.pop("taylor_utils.bases.own", None)
    assert kinds == ["full", "forecast"]
    assert current.weights == (2.5,)


def test_a_generation_starts_before_step_0_with_nothing_kept() -> None:
    cache_dic, current = cache_init(CacheConfig(), 50)
    assert cache_dic.config == CacheConfig(target="module", fresh_threshold=4)
    assert (current.step, current.num_steps, current.kind) == (-1, 50, "full")
    assert cache_dic.full_steps == [] and cache_dic.anchors == {} and cache_dic.num_bytes() == 0


def test_a_generation_without_a_cache_has_none() -> None:
    cache_dic, current = cache_init(CacheConfig.off(), 50)
    assert cache_dic is None
    assert current.num_steps == 50


def test_two_generations_share_no_state() -> None:
    config = CacheConfig()
    first, second = cache_init(config, 5)[0], cache_init(config, 5)[0]
    first.full_steps.append(0)
    assert second.full_steps == []


@pytest.mark.parametrize("num_steps", [0, -1, 2.5, None])
def test_a_number_of_steps_out_of_its_domain_is_refused(num_steps: Any) -> None:
    with pytest.raises(ValueError, match="num_steps must be a whole number from 1 to 1000, got"):
        cache_init(CacheConfig(), num_steps)
