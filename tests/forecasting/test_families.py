"""Every family: the same with the cache off or every step full, as many calls as planned, and right after anything.

The pipelines are diffusers' own, with tiny random weights.
"""

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from cache_functions import CacheConfig, planned_full_steps
from forecasting import forecast
from forecasting.session import find_denoisers
from tests.forecasting.naive import naive_taylorseer
from tests.forecasting.table import X0_REFUSED, table, variants
from tests.tiny_pipelines.variant import NUM_STEPS, Variant

VARIANTS = variants()
EVERY = {"fresh_threshold": 1}
# Steps that are computed though not planned: their calls have no step like them before.
BEGIN_ANEW = {
    ("flux2 klein kv", "velocity"): [1],  # step 0 reads the picture, and returns what later steps need of it
    ("flux2 klein kv", "x0"): [1],
    ("flux2 klein kv", "module"): [1],
    ("qwen-image 2.1", "module"): [1],  # step 0 reads the text as well
    ("z-image, cut guidance", "velocity"): [8],  # one branch instead of two
    ("z-image, cut guidance", "x0"): [8],
    ("z-image, cut guidance", "module"): [8],
}


@pytest.fixture(scope="module", params=VARIANTS, ids=lambda variant: variant.name.replace(" ", "-"))
def drawn(request: pytest.FixtureRequest) -> Iterator[tuple[Variant, Any]]:
    yield request.param, request.param.build()


def targets(variant: Variant) -> list[str]:
    """The targets that a variant admits."""
    if variant.renoises:
        return ["x0"]
    return ["velocity", "module"] if variant.name in X0_REFUSED else ["velocity", "x0", "module"]


class Counter:
    """Counts the forward calls of a pipeline's denoisers."""

    def __init__(self, pipe: Any):
        self.count = 0
        self.handles = [one.register_forward_pre_hook(self._count) for one in find_denoisers(pipe)]

    def _count(self, *_: Any) -> None:
        self.count += 1

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one, other)


def test_with_the_cache_off_and_with_every_step_full_it_draws_the_same_bits(drawn: tuple[Variant, Any]) -> None:
    variant, pipe = drawn
    stock = variant.draw(pipe)
    assert torch.isfinite(stock).all() and not same(stock, variant.draw(pipe, seed=1))
    with forecast(pipe, CacheConfig.off()) as session:
        assert same(variant.draw(pipe), stock)
    assert {record.kind for record in session.trace} == {"full"}
    for target in targets(variant):
        with forecast(pipe, CacheConfig(target=target, **EVERY)):
            assert same(variant.draw(pipe), stock), target
    assert same(variant.draw(pipe), stock), "something was left behind"


def test_the_denoiser_is_called_at_the_planned_steps_and_nothing_is_left(drawn: tuple[Variant, Any]) -> None:
    variant, pipe = drawn
    counter = Counter(pipe)
    stock = variant.draw(pipe)
    uncached, counter.count = counter.count, 0
    for target in targets(variant):
        config = CacheConfig(target=target, fresh_threshold=3, max_order=1)
        with forecast(pipe, config) as session:
            cached, others = variant.draw(pipe), variant.draw(pipe, seed=1)
            again = variant.draw(pipe)
        assert same(cached, again) and not same(cached, others)
        assert not same(cached, stock), f"{target}: no step was forecast"
        assert session.num_bytes() == 0
        planned = planned_full_steps(config, len(session.trace))
        extra = [record.index for record in session.trace if record.kind == "full" and record.index not in planned]
        assert [record.index for record in session.trace if record.kind == "full"] == sorted({*planned, *extra})
        assert extra == BEGIN_ANEW.get((variant.name, target), [])
        if target != "module":
            full = sum(record.evaluations for record in session.trace)
            assert counter.count == 3 * full and full < uncached
        counter.count = 0
        for one in (pipe.scheduler, *find_denoisers(pipe)):
            assert not [name for name in vars(one) if name.startswith("_forecast")]
            assert "_forecast_base" not in vars(type(one))
    counter.remove()


def test_another_size_of_run_in_the_next_call_is_drawn_as_in_a_fresh_context(drawn: tuple[Variant, Any]) -> None:
    """Another number of steps, a batch of two."""
    variant, pipe = drawn
    config = CacheConfig(target=targets(variant)[0], fresh_threshold=3)
    changes: list[dict[str, Any]] = [{"num_steps": 8}, {"batch": 2}, {}]
    fresh = []
    for change in changes:
        with forecast(pipe, config):
            fresh.append(variant.draw(pipe, **change))
    with forecast(pipe, config):
        assert all(same(variant.draw(pipe, **change), one) for change, one in zip(changes, fresh, strict=True))


class Stopped(Exception):
    pass


def test_after_an_exception_the_next_picture_is_right(drawn: tuple[Variant, Any]) -> None:
    variant, pipe = drawn

    def fail(seen: Any) -> None:
        if seen.record.index == 4 and not fired:
            fired.append(1)
            raise Stopped

    fired: list[int] = []
    config = CacheConfig(target=targets(variant)[0], fresh_threshold=3)
    with forecast(pipe, config):
        right = variant.draw(pipe)
    with forecast(pipe, config, on_step=fail):
        with pytest.raises(Stopped):
            variant.draw(pipe)
        assert same(variant.draw(pipe), right)


def test_stopped_by_the_pipelines_own_flag_the_next_picture_is_right(drawn: tuple[Variant, Any]) -> None:
    variant, pipe = drawn
    if not hasattr(type(pipe), "interrupt"):
        pytest.skip(f"{type(pipe).__name__} cannot be interrupted")

    def stop(seen: Any) -> None:
        if stops and seen.record.index == 4:
            pipe._interrupt = True

    stops: list[int] = []
    with forecast(pipe, CacheConfig(target=targets(variant)[0], fresh_threshold=3), on_step=stop) as session:
        right = variant.draw(pipe)
        stops.append(1)
        variant.draw(pipe)
        assert len(session.trace) == 5
        stops.clear()
        assert same(variant.draw(pipe), right)


def test_another_size_and_guidance_in_the_next_call_are_drawn_as_in_a_fresh_context(
    drawn: tuple[Variant, Any],
) -> None:
    variant, pipe = drawn
    given, known = variant.arguments(1), inspect.signature(type(pipe).__call__).parameters
    scale = next((name for name in ("true_cfg_scale", "guidance_scale") if name in known), None)
    changes: list[dict[str, Any]] = [{}]
    changes += [{"height": 2 * given["height"]}] if "height" in given else []
    changes += [{scale: 2.5}] if scale else []
    config, fresh = CacheConfig(target=targets(variant)[0], fresh_threshold=3), []
    for change in [*changes, {}]:
        with forecast(pipe, config):
            fresh.append(variant.draw(pipe, **change))
    with forecast(pipe, config):
        for change, right in zip([*changes, {}], fresh, strict=True):
            assert same(variant.draw(pipe, **change), right), change


NAIVE = {
    "flux dev": {"transformer_blocks": ("attn", "ff", "ff_context"), "single_transformer_blocks": ("proj_out",)},
    "qwen-image": {"transformer_blocks": ("attn", "img_mlp", "txt_mlp")},
    "wan t2v": {"blocks": ("attn1", "attn2", "ffn")},
    "hunyuan-video": {
        "transformer_blocks": ("attn", "ff", "ff_context"),
        "single_transformer_blocks": ("proj_out",),
    },
    "dit ddim": {"transformer_blocks": ("attn1", "ff")},
    "sd3": {"transformer_blocks": ("attn", "attn2", "ff", "ff_context")},
    "z-image": {
        "layers": ("attention", "feed_forward"),
        "noise_refiner": ("attention", "feed_forward"),
        "context_refiner": ("attention", "feed_forward"),
    },
    "cogvideox ddim": {"transformer_blocks": ("attn1", "ff")},
    "ltx": {"transformer_blocks": ("attn1", "attn2", "ff")},
    "hidream": {
        "double_stream_blocks": ("attn1", "ff_i", "ff_t"),
        "single_stream_blocks": ("attn1", "ff_i"),
    },
}


@pytest.mark.parametrize("name", NAIVE)
def test_target_module_is_the_papers_method(name: str) -> None:
    """A reference that keeps derivatives and forecasts the text, too, gives the same picture."""
    variant = next((one for one in VARIANTS if one.name == name), None)
    assert variant is not None, name
    pipe = variant.build()
    stock = variant.draw(pipe)
    config = CacheConfig(target="module", fresh_threshold=3, max_order=2)
    names = {
        stack: tuple(part for part in parts if hasattr(_first(getattr(pipe.transformer, stack)), part))
        for stack, parts in NAIVE[name].items()
    }
    with naive_taylorseer(pipe, names, set(planned_full_steps(config, NUM_STEPS)), 2):
        naive = variant.draw(pipe)
    with forecast(pipe, config):
        ours = variant.draw(pipe)
    effect = (naive - stock).norm() / stock.norm()
    error = (ours - naive).norm() / naive.norm()
    assert effect > 1e-4, "the cache does nothing here: the test shows nothing"
    assert error < 1e-5 and error < effect / 100


def _first(stack: Any) -> Any:
    block = stack[0]
    return getattr(block, "block", block)


def test_the_table_in_the_docs_is_what_the_code_says() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "families.md").read_text(encoding="utf-8")
    assert table() in page, "python -m tests.forecasting.table prints the new one"
