"""What the library's base classes bring: its own cache, attention backends, regional compilation, LoRA files."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import TaylorSeerCacheConfig
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from peft import LoraConfig
from torch import Tensor

from cache_functions import CacheConfig, cache_init, cal_type, planned_full_steps
from hi_diffusers.families.hidream import attention
from hi_diffusers.families.hidream.transformer import HiDreamImageTransformer2DModel
from tests.tiny import TINY_BLOCKS, make_inputs, make_tiny, relative_error

NUM_STEPS = 14
CACHED = r"(double|single)_stream_blocks\.\d+\.block\.(attn1|ff_i|ff_t)"


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def model() -> HiDreamImageTransformer2DModel:
    return make_tiny()


def evaluate(model: HiDreamImageTransformer2DModel, step: int, **context: Any) -> Tensor:
    with model.cache_context("cond"):
        return model(*make_inputs().at(900.0 - 40 * step).positional, return_dict=False, **context)[0]


# diffusers' own TaylorSeer


def library_cache(interval: int, before: int, after: int | None = None, max_order: int = 1) -> TaylorSeerCacheConfig:
    return TaylorSeerCacheConfig(
        cache_interval=interval,
        disable_cache_before_step=before,
        disable_cache_after_step=after,
        max_order=max_order,
        taylor_factors_dtype=torch.float32,
        cache_identifiers=[CACHED],
    )


@pytest.fixture
def counted(model: HiDreamImageTransformer2DModel) -> Iterator[Callable[..., tuple[list[int], list[Tensor]]]]:
    """Runs the library's cache; returns the steps that computed, and the outputs."""
    computed: dict[str, list[int]] = {}
    step = 0
    inner = [
        model.double_stream_blocks[0].block.attn1.to_q,
        model.double_stream_blocks[1].block.ff_i.gate,
        model.double_stream_blocks[1].block.ff_t.w2,
        model.single_stream_blocks[0].block.attn1.to_out,
        model.single_stream_blocks[2].block.ff_i.gate,
    ]
    hooks = [
        module.register_forward_hook(lambda *_, name=name: computed.setdefault(name, []).append(step))
        for name, module in enumerate(inner)
    ]

    def run(config: TaylorSeerCacheConfig) -> tuple[list[int], list[Tensor]]:
        nonlocal step
        computed.clear()
        outputs = []
        model.enable_cache(config)
        try:
            for step in range(NUM_STEPS):
                outputs.append(evaluate(model, step))
        finally:
            model.disable_cache()
        steps = list(computed[0])
        assert all(others == steps for others in computed.values()), "cached modules computed at different steps"
        return steps, outputs

    yield run
    for hook in hooks:
        hook.remove()


def run_ours(model: HiDreamImageTransformer2DModel, config: CacheConfig) -> list[Tensor]:
    cache_dic, current = cache_init(config, NUM_STEPS)
    outputs = []
    for step in range(NUM_STEPS):
        cal_type(cache_dic, current)
        outputs.append(evaluate(model, step, cache_dic=cache_dic, current=current))
    return outputs


def test_the_librarys_cache_skips_compute_and_leaves_computed_steps_alone(model, counted) -> None:
    computed, outputs = counted(library_cache(4, 3))
    assert len(computed) < NUM_STEPS
    same = [torch.equal(output, evaluate(model, step)) for step, output in enumerate(outputs)]
    assert [step for step in range(NUM_STEPS) if same[step]] == computed


def test_disabling_the_librarys_cache_restores_the_model(model, counted) -> None:
    before = evaluate(model, 0)
    counted(library_cache(4, 1))
    assert not model.is_cache_enabled
    assert torch.equal(evaluate(model, 0), before)


@pytest.mark.parametrize("interval", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("before", [1, 2, 3])
@pytest.mark.parametrize("after", [None, 11])
def test_the_librarys_first_interval_is_two_steps_long(counted, interval: int, before: int, after: int | None) -> None:
    """It computes the first `disable_cache_before_step` steps, then, two after the last of them, every
    `cache_interval`-th; and all from `disable_cache_after_step` on."""
    computed, _ = counted(library_cache(interval, before, after))
    assert computed == [
        step
        for step in range(NUM_STEPS)
        if step < before or (step - before - 1) % interval == 0 or (after is not None and step >= after)
    ]


@pytest.mark.parametrize("before", [1, 2, 3])
@pytest.mark.parametrize("after", [None, 11])
def test_at_interval_2_the_librarys_full_steps_are_ours(counted, before: int, after: int | None) -> None:
    last_enhance = 0 if after is None else NUM_STEPS - after
    ours = CacheConfig(fresh_threshold=2, first_enhance=before, last_enhance=last_enhance)
    assert counted(library_cache(2, before, after))[0] == planned_full_steps(ours, NUM_STEPS)


@pytest.mark.parametrize("interval", [3, 4, 5])
@pytest.mark.parametrize("before", [1, 2, 3])
def test_at_longer_intervals_ours_computes_that_much_later(counted, interval: int, before: int) -> None:
    """Ours counts the interval from the last leading full step, the library from one step before its first interval's
    end: after the leading steps every full step of ours comes cache_interval - 2 steps later."""
    theirs, _ = counted(library_cache(interval, before))
    ours = planned_full_steps(CacheConfig(fresh_threshold=interval, first_enhance=before), NUM_STEPS)
    shifted = [step if step < before else step + interval - 2 for step in theirs]
    assert ours == [step for step in shifted if step < NUM_STEPS]


@pytest.mark.parametrize(
    ("before", "max_order", "agrees"), [(1, 0, True), (1, 1, True), (1, 2, True), (3, 1, True), (3, 2, False)]
)
def test_where_the_full_steps_agree_so_do_the_forecasts_but_for_the_gate(
    model, counted, before: int, max_order: int, agrees: bool
) -> None:
    """The library takes differences at every full step, so its order 2 also counts leading steps that ours does not."""
    _, theirs = counted(library_cache(2, before, max_order=max_order))
    ours = run_ours(model, CacheConfig(fresh_threshold=2, first_enhance=before, max_order=max_order))
    error = max(relative_error(mine, other) for mine, other in zip(ours, theirs, strict=True))
    assert (error <= 1e-5) == agrees, error


def test_the_librarys_cache_needs_a_leading_full_step(counted) -> None:
    with pytest.raises(ValueError, match="Cannot predict without prior"):
        counted(library_cache(4, 0))


def test_the_librarys_cache_needs_a_reset_between_pictures(model: HiDreamImageTransformer2DModel) -> None:
    model.enable_cache(library_cache(4, 1))
    try:
        first = [evaluate(model, step) for step in range(3)]
        without_reset = evaluate(model, 0)
        model._reset_stateful_cache()
        second = [evaluate(model, step) for step in range(3)]
    finally:
        model.disable_cache()
    assert not torch.equal(without_reset, first[0])
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# Attention backends


@pytest.fixture
def backends(model: HiDreamImageTransformer2DModel) -> Iterator[None]:
    """Setting a backend changes the whole process; this sets it back."""
    active = _AttentionBackendRegistry._active_backend
    yield
    model.reset_attention_backend()
    _AttentionBackendRegistry.set_active_backend(active)


@pytest.mark.usefixtures("backends")
@pytest.mark.parametrize("name", ["native", "_native_math", "_native_flash", "flex"])
def test_attention_backends_of_this_machine_agree(model, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = evaluate(model, 0)
    dispatch, used = attention.dispatch_attention_fn, []

    def record(*args: Any, backend: Any, **kwargs: Any) -> Tensor:
        used.append(backend)
        return dispatch(*args, backend=backend, **kwargs)

    monkeypatch.setattr(attention, "dispatch_attention_fn", record)
    model.set_attention_backend(name)
    assert relative_error(evaluate(model, 0), expected) <= 1e-5
    assert used == [AttentionBackendName(name)] * TINY_BLOCKS


@pytest.mark.usefixtures("backends")
@pytest.mark.parametrize("name", ["flash", "_flash_3", "sage", "xformers"])
def test_a_missing_attention_backend_gives_one_line_and_leaves_the_model_as_it_was(model, name: str) -> None:
    before = evaluate(model, 0)
    try:
        model.set_attention_backend(name)
    except RuntimeError as error:
        assert "\n" not in str(error)
        assert re.search(rf"'{name}' is not usable because of missing package.* Please (install|build)", str(error))
    else:
        pytest.skip(f"{name} is installed")
    assert torch.equal(evaluate(model, 0), before)


@pytest.mark.usefixtures("backends")
def test_an_unknown_attention_backend_is_refused(model: HiDreamImageTransformer2DModel) -> None:
    with pytest.raises(ValueError, match="must be one of the following"):
        model.set_attention_backend("fastest")


# Regional compilation


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_attention_and_feed_forwards_compile_without_breaks_and_once(dtype: torch.dtype) -> None:
    """Traced only: the graphs are run as they are, so that no compiler is needed."""
    torch._dynamo.reset()
    model, inputs = make_tiny().to(dtype), make_inputs().to(dtype)
    expected = run_cached(model, inputs)
    graphs = []

    def trace(graph: torch.fx.GraphModule, example_inputs: list[Tensor]) -> Callable[..., Any]:
        graphs.append(num_steps_done)
        return graph.forward

    num_steps_done = 0

    def count_step() -> None:
        nonlocal num_steps_done
        num_steps_done += 1

    model.compile_repeated_blocks(fullgraph=True, backend=trace)
    try:
        outputs = run_cached(model, inputs, count_step)
    finally:
        torch._dynamo.reset()
    assert graphs and set(graphs) == {0}, "something was compiled after the first step"
    assert all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True))


def run_cached(
    model: HiDreamImageTransformer2DModel, inputs: Any, after_step: Callable[[], None] = int
) -> list[Tensor]:
    cache_dic, current = cache_init(CacheConfig(fresh_threshold=2), 6)
    conditioning = model.prepare(*inputs.text, inputs.grid)
    outputs = []
    for step in range(6):
        cal_type(cache_dic, current)
        at = inputs.at(900.0 - 40 * step)
        context = {"conditioning": conditioning, "cache_dic": cache_dic, "current": current}
        outputs.append(model(at.latents, at.timesteps, **context, return_dict=False)[0])
        after_step()
    return outputs


@pytest.mark.slow
def test_compiled_blocks_give_the_same_output() -> None:
    torch._dynamo.reset()
    model, inputs = make_tiny(num_routed_experts=0), make_inputs()
    expected = run_cached(model, inputs)
    model.compile_repeated_blocks(fullgraph=True)
    try:
        outputs = run_cached(model, inputs)
    finally:
        torch._dynamo.reset()
    assert max(relative_error(a, b) for a, b in zip(outputs, expected, strict=True)) <= 1e-5


# LoRA


def add_lora(model: HiDreamImageTransformer2DModel, name: str = "style") -> None:
    torch.manual_seed(0)
    lora = LoraConfig(r=3, target_modules=["to_q", "to_out", "w1", "w2"], init_lora_weights=False)
    model.add_adapter(lora, adapter_name=name)


def test_a_lora_changes_the_output_and_unloads_cleanly() -> None:
    model = make_tiny()
    before, keys = evaluate(model, 0), set(model.state_dict())
    add_lora(model)
    assert relative_error(evaluate(model, 0), before) > 1e-2
    model.unload_lora()
    assert torch.equal(evaluate(model, 0), before)
    assert set(model.state_dict()) == keys
    assert not getattr(model, "peft_config", None)


def test_a_disabled_or_deleted_lora_has_no_effect() -> None:
    model = make_tiny()
    before = evaluate(model, 0)
    add_lora(model)
    model.disable_adapters()
    assert relative_error(evaluate(model, 0), before) <= 1e-6
    model.enable_adapters()
    assert relative_error(evaluate(model, 0), before) > 1e-2
    model.delete_adapters("style")
    assert relative_error(evaluate(model, 0), before) <= 1e-6


def test_a_lora_is_saved_and_loaded(tmp_path: Path) -> None:
    model, other = make_tiny(), make_tiny()
    add_lora(model)
    model.save_lora_adapter(tmp_path, adapter_name="style")
    other.load_lora_adapter(tmp_path, prefix=None, use_safetensors=True)
    assert torch.equal(evaluate(other, 0), evaluate(model, 0))


def test_a_lora_acts_on_cached_generations() -> None:
    model, inputs = make_tiny(), make_inputs()
    add_lora(model)
    with_lora = run_cached(model, inputs)
    model.fuse_lora()
    model.unload_lora()
    merged = run_cached(model, inputs)
    assert max(relative_error(a, b) for a, b in zip(with_lora, merged, strict=True)) <= 1e-5
