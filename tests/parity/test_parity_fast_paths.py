"""Every faster way computes what the plain one does, and what diffusers' class does.

Largest difference over the largest output, on the same weights. In bf16 and fp16 every token goes to all experts: a
score that rounding moves past another sends a token elsewhere, which is no error of the arithmetic.

    | dtype | from diffusers' class in fp32                  | one forecast of all blocks from each block's |
    |-------|------------------------------------------------|----------------------------------------------|
    | fp32  | 1e-5                                           | 1e-5                                         |
    | bf16  | 1.5 times as far as diffusers' class in bf16   | 2e-2                                         |
    | fp16  | 1.5 times as far as diffusers' class in fp16   | 3e-3                                         |
"""

import copy
import itertools
import os
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

from cache_functions import CacheConfig, cache_init, cal_type
from hi_diffusers.families.hidream import transformer as transformer_module
from hi_diffusers.families.hidream.fast_paths import FastPaths, set_fast_paths
from hi_diffusers.families.hidream.forecast import add_forecasts_plainly
from hi_diffusers.families.hidream.transformer import HiDreamImageTransformer2DModel
from tests.tiny import Inputs, Oracle, make_inputs, make_oracle, make_ours, relative_error

TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
SWITCHES = [one.name for one in fields(FastPaths)]
CHOICES = [FastPaths(), FastPaths.none(), *(replace(FastPaths(), **{name: False}) for name in SWITCHES)]
SIZES = [(8, 8), (8, 12)]


@pytest.fixture(scope="module")
def sure_pair() -> tuple[Oracle, HiDreamImageTransformer2DModel]:
    oracle = make_oracle(num_routed_experts=4, num_activated_experts=4)
    return oracle, make_ours(oracle)


def describe(value: object) -> str:
    return str(value).replace("torch.", "") if not isinstance(value, FastPaths) else repr(value)[10:-1]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=describe)
@pytest.mark.parametrize("paths", CHOICES, ids=describe)
def test_every_choice_computes_what_diffusers_class_does(pair, sure_pair, paths, dtype, size):
    exact = pair if dtype == torch.float32 else sure_pair
    oracle, ours = (copy.deepcopy(model).to(dtype) for model in exact)
    inputs = make_inputs(2, *size)
    set_fast_paths(ours, paths)
    expected = exact[0](*inputs.positional, return_dict=False)[0]
    theirs, actual = (model(*inputs.to(dtype).positional, return_dict=False)[0].float() for model in (oracle, ours))
    tolerance = TOLERANCES[dtype] if dtype == torch.float32 else 1.5 * relative_error(theirs, expected)
    assert relative_error(actual, expected) < tolerance


def draw(model: HiDreamImageTransformer2DModel, inputs: Inputs, config: CacheConfig) -> list[torch.Tensor]:
    """The outputs of eight steps."""
    timesteps = torch.linspace(900, 100, 8)
    conditioning = model.prepare_gates(model.prepare(*inputs.text, inputs.grid), timesteps)
    cache_dic, current = cache_init(config, len(timesteps))
    outputs = []
    for timestep in timesteps:
        cal_type(cache_dic, current)
        step = {"conditioning": conditioning, "cache_dic": cache_dic, "current": current, "return_dict": False}
        outputs.append(model(inputs.latents, timestep.expand(len(inputs.latents)), **step)[0])
    return outputs


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize("dtype", TOLERANCES, ids=describe)
def test_one_forecast_of_all_blocks_is_what_the_blocks_forecast(pair, dtype, order, size, monkeypatch):
    ours, inputs = copy.deepcopy(pair[1]).to(dtype), make_inputs(2, *size).to(dtype)
    config = CacheConfig(fresh_threshold=3, max_order=order)
    set_fast_paths(ours, FastPaths(one_forecast=False))
    expected = draw(ours, inputs, config)
    set_fast_paths(ours, FastPaths())
    calls = []
    add = transformer_module.add_forecasts
    monkeypatch.setattr(transformer_module, "add_forecasts", lambda *args: calls.append(1) or add(*args))
    actual = draw(ours, inputs, config)
    assert len(calls) == 5, "forecast steps did not take the faster way"
    for one, other in zip(actual, expected, strict=True):
        assert relative_error(one, other) < TOLERANCES[dtype]


def test_packed_anchors_are_forecast_block_by_block(pair, monkeypatch):
    ours, inputs = copy.deepcopy(pair[1]), make_inputs()
    set_fast_paths(ours, FastPaths())
    monkeypatch.setattr(transformer_module, "add_forecasts", lambda *_: pytest.fail("it read packed anchors"))
    draw(ours, inputs, CacheConfig(fresh_threshold=3, anchor_dtype="fp8"))


def test_gradients_are_wanted_only_of_the_plain_way(pair):
    ours, inputs = copy.deepcopy(pair[1]), make_inputs()
    found = []
    for paths in (FastPaths(), FastPaths.none()):
        set_fast_paths(ours, paths)
        with torch.enable_grad():
            latents = inputs.latents.clone().requires_grad_()
            ours(latents, *inputs.positional[1:], return_dict=False)[0].square().sum().backward()
        found.append(latents.grad)
    assert torch.equal(*found)


def test_the_sum_is_the_formula():
    torch.manual_seed(0)
    tokens, gates = torch.randn(2, 5, 8, dtype=torch.float64).float(), torch.randn(3, 2, 8)
    anchors, weights = [[torch.randn(2, 5, 8) for _ in range(3)] for _ in range(3)], (0.5, 0.0, -2.0)
    expected = tokens.double()
    for feature, index in itertools.product(range(3), range(3)):
        expected = expected + weights[index] * gates[feature, :, None].double() * anchors[feature][index].double()
    torch.testing.assert_close(add_forecasts_plainly(tokens, gates, anchors, weights), expected.float())


INTERPRETED = """
import sys, torch
from hi_diffusers.families.hidream.forecast import add_forecasts_plainly
from hi_diffusers.families.hidream.forecast_kernel import add_forecasts_in_one_pass
torch.manual_seed(0)
for dtype, tolerance in ((torch.float32, 1e-6), (torch.float16, 2e-3), (torch.bfloat16, 2e-2)):
    for shape, features, anchors in (((2, 7, 48), 3, 2), ((1, 64, 32), 2, 1), ((2, 40, 33), 1, 4)):
        draw = lambda *shape: torch.randn(shape).to(dtype)
        tokens, gates = draw(*shape), draw(features, shape[0], shape[2])
        kept = [[draw(*shape) for _ in range(anchors)] for _ in range(features)]
        weights = [1.5, -0.5, 0.25, 2.0][:anchors]
        actual = add_forecasts_in_one_pass(tokens, gates, kept, weights).float()
        expected = add_forecasts_plainly(tokens, gates, kept, weights).float()
        error = ((actual - expected).abs().max() / expected.abs().max()).item()
        assert error < tolerance, (dtype, shape, error)
print("alike")
"""


def test_the_kernel_under_tritons_interpreter_is_the_plain_sum():
    pytest.importorskip("triton", reason="triton is not installed")
    root = Path(__file__).resolve().parents[2]
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(root)}
    ended = subprocess.run(
        [sys.executable, "-c", INTERPRETED], env=environment, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0 and "alike" in ended.stdout, ended.stderr
