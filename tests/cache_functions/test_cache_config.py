"""What a cache may be configured to, and how open settings are filled in."""

import re
import sys
from dataclasses import FrozenInstanceError, dataclass
from pathlib import Path
from typing import Any

import pytest

import taylor_utils.bases
from cache_functions import CacheConfig, cache_init, cal_type

REFUSED = [
    ("target", "blocks", "must be one of module, x0, off"),
    ("target", 3, "must be one of module, x0, off"),
    ("basis", "fourier", "must be one of taylor"),
    ("schedule", "sometimes", "must be one of interval"),
    *[("fresh_threshold", value, "must be a whole number from 1 to 1000") for value in (0, -1, 1001, 1.5, True, "4")],
    *[("max_order", value, "must be a whole number from 0 to 6") for value in (-1, 7, 1.0, None, False)],
    *[("first_enhance", value, "must be a whole number from 1 to 1000") for value in (0, 1001, 2.0, None)],
    *[("last_enhance", value, "must be a whole number from 0 to 1000") for value in (-1, 1001, "1", None)],
]


@dataclass(frozen=True)
class Preset:
    name: str = "some-model"


@dataclass(frozen=True)
class Options:
    scheduler: str
    renoises: bool
    num_steps: int = 28


UNIPC = Options("unipc", renoises=False)
LCM = Options("lcm", renoises=True)


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
    ("target", "options", "resolved"),
    [(None, UNIPC, "module"), (None, LCM, "x0"), ("x0", UNIPC, "x0"), ("x0", LCM, "x0"), ("module", UNIPC, "module")],
)
def test_the_target_follows_from_the_sampler_unless_it_is_given(
    target: str | None, options: Options, resolved: str
) -> None:
    assert CacheConfig(target=target).resolve(Preset(), options).target == resolved


def test_module_with_a_renoising_sampler_is_refused_with_the_reason() -> None:
    with pytest.raises(ValueError, match="target must be x0 with the lcm scheduler of some-model, got 'module'") as no:
        CacheConfig(target="module").resolve(Preset(), LCM)
    assert "noise that is drawn after the last full step" in str(no.value)


@pytest.mark.parametrize("options", [UNIPC, LCM])
def test_off_stays_off(options: Options) -> None:
    assert CacheConfig.off().resolve(Preset(), options) == CacheConfig.off()


def test_an_open_threshold_becomes_4_and_a_given_one_stays() -> None:
    assert CacheConfig().resolve(Preset(), UNIPC).fresh_threshold == 4
    assert CacheConfig(fresh_threshold=7).resolve(Preset(), UNIPC).fresh_threshold == 7


def test_resolving_changes_nothing_else_and_settles() -> None:
    config = CacheConfig(max_order=3, first_enhance=2, last_enhance=1)
    resolved = config.resolve(Preset(), LCM)
    assert resolved == CacheConfig("x0", "taylor", "interval", 4, 3, 2, 1)
    assert resolved.resolve(Preset(), LCM) == resolved


def test_a_basis_is_given_the_fields_that_are_named_like_its_settings() -> None:
    assert CacheConfig(first_enhance=3).basis_settings == {"first_enhance": 3}


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
