"""Forecast from outside together with what people put around a pipeline: offloading, compilation, LoRA."""

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, cpu_offload_with_hook
from accelerate.hooks import remove_hook_from_module
from diffusers.hooks import apply_group_offloading
from torch import Tensor

from cache_functions import CacheConfig
from forecasting import forecast
from forecasting.parts import parts
from tests.tiny_pipelines import flux, wan
from tests.tiny_pipelines.variant import Variant

FAMILIES = {
    "flux": next(one for one in flux.VARIANTS if one.name == "flux dev"),
    "wan": next(one for one in wan.VARIANTS if one.name == "wan t2v"),
}
CONFIGS = [CacheConfig(target=target, fresh_threshold=3) for target in ("velocity", "x0", "module")]


@pytest.fixture(params=FAMILIES)
def variant(request: pytest.FixtureRequest) -> Variant:
    return FAMILIES[request.param]


def drawings(variant: Variant, pipe: Any, times: int = 1) -> list[Tensor]:
    found = []
    for config in CONFIGS:
        with forecast(pipe, config):
            found += [variant.draw(pipe) for _ in range(times)]
    return found


def equal(some: list[Tensor], others: list[Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(some, others, strict=True))


def sequential(pipe: Any) -> None:
    cpu_offload(pipe.transformer, torch.device("cpu"), offload_buffers=True)


def by_groups(pipe: Any) -> None:
    apply_group_offloading(
        pipe.transformer,
        onload_device=torch.device("cpu"),
        offload_device=torch.device("cpu"),
        offload_type="leaf_level",
    )


def by_blocks(pipe: Any) -> None:
    apply_group_offloading(
        pipe.transformer,
        onload_device=torch.device("cpu"),
        offload_device=torch.device("cpu"),
        offload_type="block_level",
        num_blocks_per_group=1,
    )


def by_model(pipe: Any) -> None:
    """accelerate's hook is taken off and put on at the end of every drawing, as `maybe_free_model_hooks` does."""

    def renew() -> None:
        remove_hook_from_module(pipe.transformer, recurse=True)
        cpu_offload_with_hook(pipe.transformer, torch.device("cpu"))

    renew()
    pipe.maybe_free_model_hooks = renew


@pytest.mark.parametrize("offload", [by_model, sequential, by_groups, by_blocks])
def test_offloading_before_or_inside_of_the_context_changes_nothing(variant: Variant, offload: Any) -> None:
    plain = drawings(variant, variant.build(), times=2)
    offloaded = variant.build()
    offload(offloaded)
    assert equal(drawings(variant, offloaded, times=2), plain)
    for config, right in zip(CONFIGS, plain[::2], strict=True):
        pipe = variant.build()
        with forecast(pipe, config) as session:
            offload(pipe)
            assert torch.equal(variant.draw(pipe), right)
            assert torch.equal(variant.draw(pipe), right)
            assert "forecast" in {record.kind for record in session.trace}


def compiled_in_place(pipe: Any) -> None:
    pipe.transformer.compile(backend="eager")


def compiled_around(pipe: Any) -> None:
    pipe.transformer = torch.compile(pipe.transformer, backend="eager")


def compiled_by_blocks(pipe: Any) -> None:
    pipe.transformer.compile_repeated_blocks(backend="eager")


@pytest.mark.slow
@pytest.mark.parametrize("compile_it", [compiled_in_place, compiled_around, compiled_by_blocks])
def test_compiled_in_the_ways_people_use_it_draws_the_same(variant: Variant, compile_it: Any) -> None:
    torch.compiler.reset()
    plain = drawings(variant, variant.build())
    pipe = variant.build()
    compile_it(pipe)
    compiled = drawings(variant, pipe)
    for one, other in zip(compiled, plain, strict=True):
        assert torch.allclose(one, other, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("compile_it", [compiled_in_place, compiled_around, compiled_by_blocks])
def test_compiled_inside_of_the_context_draws_the_same(compile_it: Any) -> None:
    variant = FAMILIES["flux"]
    for config in CONFIGS:
        torch.compiler.reset()
        pipe = variant.build()
        with forecast(pipe, config) as session:
            plain = variant.draw(pipe)
            compile_it(pipe)
            assert torch.allclose(variant.draw(pipe), plain, atol=1e-6)
            assert [record.kind for record in session.trace].count("full") == 4


def test_compiled_parts_are_forecast(variant: Variant) -> None:
    torch.compiler.reset()
    plain = drawings(variant, variant.build())
    pipe = variant.build()
    for part in parts(pipe.transformer):
        part.module.compile(backend="eager")
    assert all(torch.allclose(*pair, atol=1e-6) for pair in zip(drawings(variant, pipe), plain, strict=True))


def add_lora(pipe: Any, targets: list[str]) -> None:
    from peft import LoraConfig

    with torch.random.fork_rng():
        torch.manual_seed(5)
        pipe.transformer.add_adapter(LoraConfig(r=2, lora_alpha=2, init_lora_weights=False, target_modules=targets))


TARGETS = {"flux": ["to_q", "to_v", "proj_out"], "wan": ["to_q", "to_v"]}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_lora_before_or_inside_of_the_context_is_the_same(name: str) -> None:
    """Adding one replaces linear layers, FLUX's proj_out among them, which target module forecasts."""
    pytest.importorskip("peft")
    variant = FAMILIES[name]
    for config in CONFIGS:
        before = variant.build()
        plain = variant.draw(before)
        add_lora(before, TARGETS[name])
        assert not torch.equal(variant.draw(before), plain), "the LoRA does nothing: the test shows nothing"
        with forecast(before, config):
            right = variant.draw(before)
        inside = variant.build()
        with forecast(inside, config):
            variant.draw(inside)
            add_lora(inside, TARGETS[name])
            assert torch.equal(variant.draw(inside), right)
        assert all("_forecast_link" not in vars(one) for one in inside.transformer.modules())


def test_a_pipeline_is_saved_and_loaded_inside_of_the_context(tmp_path: Path) -> None:
    variant = FAMILIES["flux"]
    pipe = variant.build()
    with forecast(pipe, CONFIGS[2]):
        right = variant.draw(pipe)
        pipe.transformer.save_pretrained(tmp_path)
    loaded = variant.build()
    loaded.transformer = type(loaded.transformer).from_pretrained(tmp_path)
    with forecast(loaded, CONFIGS[2]):
        assert torch.allclose(variant.draw(loaded), right, atol=1e-5)
