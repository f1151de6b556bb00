"""Every family offloaded, compiled, with a LoRA, in bf16: as `test_placements.py` does in full for two of them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cache_functions import CacheConfig
from forecasting import forecast
from forecasting.session import find_denoisers
from tests.forecasting.table import variants
from tests.forecasting.test_placements import by_blocks, by_groups, by_model, sequential
from tests.tiny_pipelines.variant import Variant

pytestmark = pytest.mark.slow
NUM_STEPS = 5
OFFLOADED: list[Callable[[Any], None]] = [by_model, sequential, by_groups, by_blocks]
WAYS_TO_COMPILE = ("in place", "around", "by blocks")


@pytest.fixture(params=variants(), ids=lambda variant: variant.name.replace(" ", "-"))
def variant(request: pytest.FixtureRequest) -> Variant:
    return request.param


def config_of(variant: Variant) -> CacheConfig:
    return CacheConfig(target="x0" if variant.renoises else "velocity", fresh_threshold=2)


def drawn(variant: Variant, pipe: Any, **changes: Any) -> Tensor:
    with forecast(pipe, config_of(variant)) as session:
        result = variant.draw(pipe, num_steps=NUM_STEPS, **changes)
    assert "forecast" in {record.kind for record in session.trace}
    return result


def draw_or_skip(variant: Variant, pipe: Any, **changes: Any) -> Tensor:
    """A drawing of diffusers alone: a CPU imitates an accelerator's offloading only so far."""
    try:
        return variant.draw(pipe, num_steps=NUM_STEPS, **changes)
    except (RuntimeError, NotImplementedError) as error:
        pytest.skip(f"diffusers' own drawing fails here: {error}"[:100])


@pytest.mark.parametrize("offload", OFFLOADED)
def test_offloaded(variant: Variant, offload: Callable[[Any], None]) -> None:
    pipe = variant.build()
    offload(pipe)
    draw_or_skip(variant, pipe)
    assert torch.equal(drawn(variant, pipe), drawn(variant, variant.build()))


@pytest.mark.parametrize("way", WAYS_TO_COMPILE)
def test_compiled(variant: Variant, way: str) -> None:
    torch.compiler.reset()
    pipe = variant.build()
    for name in ("transformer", "transformer_2"):
        network = getattr(pipe, name, None)
        if network is None:
            continue
        if way == "in place":
            network.compile(backend="eager")
        elif way == "around":
            setattr(pipe, name, torch.compile(network, backend="eager"))
        elif getattr(network, "_repeated_blocks", None):
            network.compile_repeated_blocks(backend="eager")
        else:
            pytest.skip("diffusers names no repeated blocks of this network")
    assert torch.allclose(drawn(variant, pipe), drawn(variant, variant.build()), atol=1e-5)


def test_with_a_lora(variant: Variant) -> None:
    peft = pytest.importorskip("peft")
    before, inside = variant.build(), variant.build()
    if not all(hasattr(one, "add_adapter") for one in find_denoisers(before)):
        pytest.skip("diffusers adds no LoRA to this network")
    plain = drawn(variant, inside)

    def add(pipe: Any) -> None:
        for network in find_denoisers(pipe):
            linear = [name for name, one in network.named_modules() if isinstance(one, nn.Linear) and "to_" in name]
            with torch.random.fork_rng():
                torch.manual_seed(5)
                settings = {"r": 2, "lora_alpha": 8, "init_lora_weights": False}
                network.add_adapter(peft.LoraConfig(target_modules=linear[:8], **settings))

    add(before)
    right = drawn(variant, before)
    with forecast(inside, config_of(variant)):
        variant.draw(inside, num_steps=NUM_STEPS)
        add(inside)
        again = variant.draw(inside, num_steps=NUM_STEPS)
    assert torch.equal(again, right) and not torch.equal(again, plain)


def test_in_bf16(variant: Variant) -> None:
    pipe = variant.build().to(torch.bfloat16)
    given = {name: _in_bf16(value) for name, value in variant.arguments(1).items()}
    stock = draw_or_skip(variant, pipe, **given)
    full = CacheConfig(target=config_of(variant).target, fresh_threshold=1)
    with forecast(pipe, full):
        assert torch.equal(variant.draw(pipe, num_steps=NUM_STEPS, **given), stock)
    assert drawn(variant, pipe, **given).isfinite().all()


def _in_bf16(value: Any) -> Any:
    if isinstance(value, list):
        return [_in_bf16(one) for one in value]
    return value.bfloat16() if isinstance(value, Tensor) and value.is_floating_point() else value
