"""The meeting point of network and cache: who computes, what is kept, what a forecast is made of."""

from collections.abc import Callable

import pytest
import torch

from cache_functions import CacheConfig, FeatureName, cache_init, cal_type, compute_or_forecast, forecasts

ATTENTION = FeatureName("module", 3, "attention")
X0 = FeatureName("x0")


def run(config: CacheConfig, num_steps: int, feature: Callable[[int], torch.Tensor], name: FeatureName = ATTENTION):
    """Run a generation of one feature. Returns (cache, steps that computed, what each step gave)."""
    cache_dic, current = cache_init(config, num_steps)
    computed, given = [], []

    def compute() -> tuple[torch.Tensor, str]:
        computed.append(current.step)
        return feature(current.step), "rest"

    for _ in range(num_steps):
        cal_type(cache_dic, current)
        given.append(compute_or_forecast(cache_dic, current, name, compute))
    return cache_dic, computed, given


def test_compute_is_called_on_full_steps_only() -> None:
    _, computed, _ = run(CacheConfig(fresh_threshold=4), 10, lambda step: torch.ones(2))
    assert computed == [0, 4, 8]


def test_a_full_step_returns_what_compute_returned() -> None:
    features = [torch.full((2,), float(step)) for step in range(9)]
    _, computed, given = run(CacheConfig(fresh_threshold=4), 9, features.__getitem__)
    assert all(given[step][0] is features[step] and given[step][1] == "rest" for step in computed)


def test_a_forecast_step_has_no_rest() -> None:
    _, computed, given = run(CacheConfig(fresh_threshold=4), 9, lambda step: torch.ones(2))
    assert [step for step, (_, rest) in enumerate(given) if rest is None] == [
        step for step in range(9) if step not in computed
    ]


def test_a_forecast_is_the_weighted_sum_of_the_anchors() -> None:
    _, _, given = run(CacheConfig(fresh_threshold=4, max_order=2), 12, lambda step: torch.tensor(float(step**2)))
    assert given[10][0].item() == 1 / 8 * 0 - 3 / 4 * 16 + 13 / 8 * 64


def test_a_linear_feature_is_continued() -> None:
    _, _, given = run(CacheConfig(fresh_threshold=3, max_order=1), 12, lambda step: torch.tensor([2.0 * step + 1]))
    assert [value.item() for value, _ in given[3:]] == pytest.approx([2 * step + 1 for step in range(3, 12)])


def test_the_gate_of_the_leading_steps_reaches_the_forecast() -> None:
    config = CacheConfig(fresh_threshold=4, max_order=2, first_enhance=3)
    _, _, given = run(config, 6, lambda step: torch.tensor(float([5, 1, 2][step])))
    assert given[5][0].item() == 0 * 5 - 3 * 1 + 4 * 2


@pytest.mark.parametrize("target", ["module", "x0"])
def test_only_the_configured_target_is_kept_and_forecast(target: str) -> None:
    cache_dic, current = cache_init(CacheConfig(target=target, fresh_threshold=3), 4)
    computed: dict[FeatureName, int] = {ATTENTION: 0, X0: 0}
    for _ in range(4):
        cal_type(cache_dic, current)
        for name in computed:

            def compute(name: FeatureName = name) -> tuple[torch.Tensor, None]:
                computed[name] += 1
                return torch.ones(2), None

            compute_or_forecast(cache_dic, current, name, compute)
    own, other = (ATTENTION, X0) if target == "module" else (X0, ATTENTION)
    assert computed == {own: 2, other: 4}
    assert list(cache_dic.anchors) == [own]


def test_without_a_cache_every_step_computes_and_nothing_is_kept() -> None:
    cache_dic, computed, given = run(CacheConfig.off(), 5, lambda step: torch.ones(2))
    assert cache_dic is None
    assert computed == [0, 1, 2, 3, 4]
    assert all(rest == "rest" for _, rest in given)


def test_a_caller_that_knows_no_step_computes() -> None:
    assert compute_or_forecast(None, None, ATTENTION, lambda: (torch.ones(1), 7))[1] == 7
    assert not forecasts(None, None, "module")


def test_features_are_told_apart_by_layer_and_part() -> None:
    names = [FeatureName("module", layer, part) for layer in (0, 1) for part in ("attention", "feed_forward")]
    cache_dic, current = cache_init(CacheConfig(fresh_threshold=2), 2)
    cal_type(cache_dic, current)
    for value, name in enumerate(names):
        compute_or_forecast(cache_dic, current, name, lambda value=value: (torch.tensor(float(value)), None))
    cal_type(cache_dic, current)
    reused = [compute_or_forecast(cache_dic, current, name, pytest.fail)[0].item() for name in names]
    assert reused == [0, 1, 2, 3]


def test_only_the_target_of_a_forecast_step_forecasts() -> None:
    cache_dic, current = cache_init(CacheConfig(fresh_threshold=2), 2)
    cal_type(cache_dic, current)
    assert not forecasts(cache_dic, current, "module")
    cal_type(cache_dic, current)
    assert forecasts(cache_dic, current, "module")
    assert not forecasts(cache_dic, current, "x0")


def test_weights_are_set_on_forecast_steps_and_empty_on_full_ones() -> None:
    cache_dic, current = cache_init(CacheConfig(fresh_threshold=4), 9)
    weights = []
    for _ in range(9):
        cal_type(cache_dic, current)
        weights.append(current.weights)
    assert weights == [(), (1,), (1,), (1,), (), (-0.25, 1.25), (-0.5, 1.5), (-0.75, 1.75), ()]


@pytest.mark.parametrize("config", [CacheConfig(), CacheConfig.off()])
def test_a_step_beyond_the_last_is_refused(config: CacheConfig) -> None:
    cache_dic, current = cache_init(config, 2)
    for _ in range(2):
        cal_type(cache_dic, current)
    with pytest.raises(ValueError, match="num_steps was 2 in cache_init, and all of these steps are done"):
        cal_type(cache_dic, current)
    assert current.step == 1


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_constant_x0_is_forecast_exactly_under_any_noise(seed: int) -> None:
    """A sampler that adds noise at every step: the velocity holds the new noise, the denoised estimate does not."""
    generator = torch.Generator().manual_seed(seed)
    x0 = torch.randn(3, 4, generator=generator)
    sigmas = [0.9**step for step in range(12)]
    for step, (estimate, _) in enumerate(run(CacheConfig(target="x0", max_order=2), 12, lambda _: x0, X0)[2]):
        latents = sigmas[step] * torch.randn(3, 4, generator=generator) + (1 - sigmas[step]) * x0
        velocity = (latents - estimate) / sigmas[step]
        torch.testing.assert_close(latents - sigmas[step] * velocity, x0, rtol=0, atol=1e-5)
