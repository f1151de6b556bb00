"""The target `module` is TaylorSeer: it reproduces a naive implementation on top of diffusers' own transformer.

The naive one follows the paper's words (arXiv 2503.06923, section 3.3, with the published gate): every attention and
feed-forward of diffusers' blocks is wrapped, factors are kept in dictionaries, and all tokens are forecast, text
tokens too. Ours keeps anchors, sums them with weights, and touches image tokens only.
"""

import functools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from cache_functions import CacheConfig, cache_init, cal_type, planned_full_steps
from hi_diffusers.families.hidream.transformer import HiDreamImageTransformer2DModel
from tests.tiny import Inputs, Oracle, make_inputs, make_oracle, make_ours, relative_error

NUM_STEPS = 16
GUIDANCE = 3.0
ROUNDING = 1e-5

Velocity = Callable[[int, Tensor], Tensor]


class NaiveTaylorSeer:
    """Wraps diffusers' attention and feed-forward modules; `begin_step` decides, the wrapped modules obey."""

    def __init__(self, model: Oracle, threshold: int, max_order: int, first_enhance: int, gated: bool = True):
        self.threshold, self.max_order, self.first_enhance, self.gated = threshold, max_order, first_enhance, gated
        self.step, self.counter, self.full = -1, 0, True
        self.activated: list[int] = []
        self.factors: dict[str, dict[int, Tensor]] = {}
        for name, module in model.named_modules():
            if name.endswith(("attn1", "ff_i", "ff_t")):
                module.forward = functools.partial(self.run, name, module.forward)

    def begin_step(self) -> None:
        self.step += 1
        self.full = self.step < self.first_enhance or self.counter == self.threshold - 1
        if self.full:
            self.counter = 0
            self.activated.append(self.step)
        else:
            self.counter += 1

    def run(self, name: str, forward: Callable, *args: Tensor, **kwargs: Tensor) -> Tensor | tuple[Tensor, ...]:
        if not self.full:
            outputs = [self.forecast(key) for key in self.factors if key.startswith(f"{name}/")]
            return outputs[0] if len(outputs) == 1 else tuple(outputs)
        outputs = forward(*args, **kwargs)
        for index, feature in enumerate(outputs if isinstance(outputs, tuple) else (outputs,)):
            self.differentiate(f"{name}/{index}", feature)
        return outputs

    def differentiate(self, key: str, feature: Tensor) -> None:
        before, after = self.factors.get(key, {}), {0: feature.clone()}
        for order in range(self.max_order):
            if order not in before or (self.gated and self.step <= self.first_enhance - 2):
                break
            gap = self.activated[-1] - self.activated[-2]
            after[order + 1] = (after[order] - before[order]) / gap
        self.factors[key] = after

    def forecast(self, key: str) -> Tensor:
        distance = self.step - self.activated[-1]
        return sum(factor * distance**order / math.factorial(order) for order, factor in self.factors[key].items())


def draw(inputs: Inputs, evaluate: Velocity) -> Tensor:
    """Euler steps from noise to picture, both guidance branches in one batch."""
    latents = inputs.latents[:1]
    sigmas = torch.linspace(1, 0, NUM_STEPS + 1).tolist()
    for step in range(NUM_STEPS):
        negative, positive = evaluate(1000 * sigmas[step], torch.cat((latents, latents))).chunk(2)
        velocity = -(negative + GUIDANCE * (positive - negative))
        latents = latents + (sigmas[step + 1] - sigmas[step]) * velocity
    return latents


def draw_naively(oracle: Oracle, inputs: Inputs, naive: NaiveTaylorSeer | None) -> Tensor:
    def evaluate(timestep: float, latents: Tensor) -> Tensor:
        if naive is not None:
            naive.begin_step()
        return oracle(*inputs.at(timestep, latents).positional, return_dict=False)[0]

    return draw(inputs, evaluate)


def draw_ours(ours: HiDreamImageTransformer2DModel, inputs: Inputs, config: CacheConfig) -> Tensor:
    cache_dic, current = cache_init(config, NUM_STEPS)
    conditioning = ours.prepare(*inputs.text, inputs.grid)

    def evaluate(timestep: float, latents: Tensor) -> Tensor:
        cal_type(cache_dic, current)
        timesteps = torch.full((2,), timestep)
        context = {"conditioning": conditioning, "cache_dic": cache_dic, "current": current}
        return ours(latents, timesteps, **context, return_dict=False)[0]

    return draw(inputs, evaluate)


def make_pair() -> tuple[Oracle, HiDreamImageTransformer2DModel]:
    """One double-stream and two single-stream blocks, with the same weights."""
    oracle = make_oracle(num_layers=1, num_single_layers=2, llama_layers=[0, 2, 4])
    return oracle, make_ours(oracle)


@pytest.mark.parametrize("first_enhance", [1, 3])
@pytest.mark.parametrize("max_order", [0, 1, 2])
@pytest.mark.parametrize("threshold", [3, 4, 5, 6])
def test_the_same_latents_are_drawn(threshold: int, max_order: int, first_enhance: int) -> None:
    oracle, ours = make_pair()
    inputs = make_inputs()
    config = CacheConfig(fresh_threshold=threshold, max_order=max_order, first_enhance=first_enhance)
    actual = draw_ours(ours, inputs, config)
    naive = NaiveTaylorSeer(oracle, threshold, max_order, first_enhance)
    expected = draw_naively(oracle, inputs, naive)
    assert naive.activated == planned_full_steps(config, NUM_STEPS)
    assert relative_error(actual, expected) <= ROUNDING


@pytest.mark.parametrize("size", [(8, 12), (12, 8)], ids=str)
def test_the_same_latents_are_drawn_where_a_picture_is_padded(size: tuple[int, int]) -> None:
    oracle, ours = make_pair()
    inputs = make_inputs(2, *size)
    actual = draw_ours(ours, inputs, CacheConfig(fresh_threshold=4, max_order=2))
    expected = draw_naively(oracle, inputs, NaiveTaylorSeer(oracle, 4, 2, 1))
    assert relative_error(actual, expected) <= ROUNDING


def test_without_forecasts_the_latents_are_diffusers() -> None:
    oracle, ours = make_pair()
    inputs = make_inputs()
    expected = draw_naively(oracle, inputs, None)
    assert relative_error(draw_ours(ours, inputs, CacheConfig.off()), expected) <= ROUNDING


def test_forecasts_change_the_latents() -> None:
    """Otherwise the agreement would say little."""
    oracle, ours = make_pair()
    inputs = make_inputs()
    cached = draw_ours(ours, inputs, CacheConfig(fresh_threshold=4))
    assert relative_error(cached, draw_naively(oracle, inputs, None)) > 100 * ROUNDING


@pytest.mark.parametrize("changes", [{"fresh_threshold": 5}, {"max_order": 2}, {"first_enhance": 3}], ids=str)
def test_another_setting_draws_other_latents(changes: dict[str, int]) -> None:
    """Every setting is seen in the latents; so their agreement is the settings' agreement."""
    _, ours = make_pair()
    inputs = make_inputs()
    config = {"fresh_threshold": 4, "max_order": 1, "first_enhance": 1}
    latents, others = (draw_ours(ours, inputs, CacheConfig(**{**config, **each})) for each in ({}, changes))
    assert relative_error(others, latents) > 100 * ROUNDING


def test_the_gate_of_the_leading_steps_is_seen_in_the_latents() -> None:
    oracle, ours = make_pair()
    inputs = make_inputs()
    latents = draw_ours(ours, inputs, CacheConfig(fresh_threshold=4, max_order=2, first_enhance=3))
    ungated = draw_naively(oracle, inputs, NaiveTaylorSeer(oracle, 4, 2, 3, gated=False))
    assert relative_error(latents, ungated) > 100 * ROUNDING
