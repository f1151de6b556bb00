"""Anchors in fewer bits or in the host's memory: what a forecast from them loses, and what they take."""

import numpy as np
import pytest
import torch

from cache_functions import CacheConfig, CacheState, FeatureName
from hi_diffusers import SamplingOptions, generate, load_pipeline
from hi_diffusers.families.hidream.fast_paths import FastPaths, set_fast_paths
from hi_diffusers.pictures.metrics import psnr
from tests.tiny_folder import PROMPT

NAME = FeatureName("module", 0, "attention")
WEIGHTS = (-0.75, 1.75)
TOLERANCES = {"fp8": 0.06, "bf16": 0.01, "fp32": 0.0}


def kept(features: list[torch.Tensor], **how: str) -> CacheState:
    state = CacheState(CacheConfig(target="module", fresh_threshold=4, **how))
    for feature in features:
        state.keep(NAME, feature)
    return state


@pytest.mark.parametrize("size", [1e-6, 1.0, 1e5])  # fp8 ends at 448, and the smallest it knows is 2^-9
@pytest.mark.parametrize("dtype", ["fp8", "bf16", "fp32"])
def test_a_forecast_is_near_the_one_from_whole_anchors(dtype: str, size: float) -> None:
    generator = torch.Generator().manual_seed(0)
    features = [size * torch.randn(2, 64, 32, generator=generator) for _ in range(2)]
    plain = kept(features).forecast(NAME, WEIGHTS)
    packed = kept(features, anchor_dtype=dtype).forecast(NAME, WEIGHTS)
    assert packed.dtype == plain.dtype
    assert float((packed - plain).norm() / plain.norm()) <= TOLERANCES[dtype]


def test_the_forecast_has_the_features_own_dtype() -> None:
    feature = torch.randn(4, 8).to(torch.bfloat16)
    for dtype in TOLERANCES:
        assert kept([feature], anchor_dtype=dtype).forecast(NAME, (1.0,)).dtype == torch.bfloat16


def test_a_feature_of_zeros_is_kept_in_fp8() -> None:
    forecast = kept([torch.zeros(4, 8)], anchor_dtype="fp8").forecast(NAME, (1.0,))
    assert torch.equal(forecast, torch.zeros(4, 8))


@pytest.mark.parametrize(("dtype", "share"), [("fp8", 0.25), ("bf16", 0.5), ("fp32", 1.0)])
def test_what_is_kept_takes_its_own_bytes(dtype: str, share: float) -> None:
    feature = torch.randn(4, 8)
    assert kept([feature], anchor_dtype=dtype).num_bytes() == feature.nbytes * share


def test_an_anchor_owns_its_memory() -> None:
    whole = torch.randn(2, 16, 8)
    state = kept([whole[:, :10]], anchor_device="cpu")
    before = state.forecast(NAME, (1.0,))
    whole.zero_()
    assert torch.equal(state.forecast(NAME, (1.0,)), before)


def test_anchors_that_do_not_count_are_not_read() -> None:
    state = kept([torch.full((4, 8), float("nan")), torch.ones(4, 8)], anchor_dtype="bf16")
    assert torch.equal(state.forecast(NAME, (0.0, 2.0)), torch.full((4, 8), 2.0))
    assert torch.equal(state.forecast(NAME, (0.0, 0.0)), torch.zeros(4, 8))


@pytest.mark.parametrize("target", ["module", "x0"])
def test_a_picture_from_anchors_in_the_hosts_memory_is_the_same(target: str, nano_folder: object) -> None:
    pipe, options = load_pipeline("nano", device="cpu"), SamplingOptions(PROMPT, seed=1, num_steps=12)
    set_fast_paths(pipe.transformer, FastPaths(one_forecast=False))  # which packed anchors do not take
    plain = generate(pipe, options, CacheConfig(target=target))
    for how in ({"anchor_device": "cpu"}, {"anchor_dtype": "fp32"}):
        assert np.array_equal(generate(pipe, options, CacheConfig(target=target, **how)).pixels, plain.pixels)


def test_a_picture_from_anchors_in_fp8_is_near(nano_folder: object) -> None:
    pipe, options = load_pipeline("nano", device="cpu"), SamplingOptions(PROMPT, seed=1, num_steps=12)
    plain = generate(pipe, options, CacheConfig(target="module"))
    packed = generate(pipe, options, CacheConfig(target="module", anchor_dtype="fp8"))
    assert psnr(plain.pixels, packed.pixels) > 30
    assert max(r.cache_bytes for r in packed.trace) == max(r.cache_bytes for r in plain.trace) / 4


@pytest.mark.parametrize("given", [{"anchor_dtype": "fp4"}, {"anchor_device": "cuda"}])
def test_other_dtypes_and_devices_are_refused(given: dict[str, str]) -> None:
    (name,) = given
    with pytest.raises(ValueError, match=f"{name} must be one of"):
        CacheConfig(**given)
