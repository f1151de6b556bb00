"""The transformer on CUDA: the CPU's output, and no waiting of the host for the device."""

import contextlib
from collections.abc import Iterator

import pytest
import torch

from cache_functions import CacheConfig, cache_init, cal_type
from forecasting import forecast
from hi_diffusers.families.hidream.moe import MoEFeedForward
from hi_diffusers.families.hidream.transformer import HiDreamImageTransformer2DModel
from tests.tiny import Inputs, make_inputs, make_oracle, make_ours, make_tiny, relative_error
from tests.tiny_pipelines import flux

pytestmark = pytest.mark.gpu

FP32 = 1e-4
BF16 = 3e-2
NUM_STEPS = 6


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@contextlib.contextmanager
def no_host_sync() -> Iterator[None]:
    """Whatever waits for the device raises."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def run_cached(model: HiDreamImageTransformer2DModel, inputs: Inputs, config: CacheConfig) -> list[torch.Tensor]:
    cache_dic, current = cache_init(config, NUM_STEPS)
    conditioning = model.prepare(*inputs.text, inputs.grid)
    outputs = []
    for step in range(NUM_STEPS):
        cal_type(cache_dic, current)
        at = inputs.at(900.0 - 40 * step)
        context = {"conditioning": conditioning, "cache_dic": cache_dic, "current": current}
        outputs.append(model(at.latents, at.timesteps, **context, return_dict=False)[0])
    return outputs


@pytest.mark.parametrize("size", [(8, 8), (8, 12)], ids=str)
def test_fp32_outputs_are_the_cpus(size: tuple[int, int]) -> None:
    model, inputs = make_tiny(), make_inputs(2, *size)
    expected = model(*inputs.positional).sample
    actual = model.cuda()(*inputs.to("cuda").positional).sample
    assert actual.is_cuda
    assert relative_error(actual.cpu(), expected) <= FP32


@pytest.mark.parametrize("size", [(8, 8), (8, 12)], ids=str)
def test_bf16_outputs_are_diffusers(size: tuple[int, int]) -> None:
    """All experts are active: where tokens choose, a rounding may send one elsewhere."""
    oracle = make_oracle(num_activated_experts=4).to("cuda", torch.bfloat16)
    model, inputs = make_ours(oracle).to("cuda", torch.bfloat16), make_inputs(2, *size).to("cuda", torch.bfloat16)
    expected, actual = oracle(*inputs.positional).sample, model(*inputs.positional).sample
    assert relative_error(actual, expected) <= BF16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_stacked_and_looped_experts_agree(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    feed_forward = MoEFeedForward(64, 256, 4, 2).to("cuda", dtype)
    x = torch.randn(2, 96, 64, device="cuda", dtype=dtype)
    looped = feed_forward(x)
    feed_forward.stack_experts()
    assert feed_forward._stack is not None
    assert relative_error(feed_forward(x), looped) <= (1e-5 if dtype == torch.float32 else BF16)


@pytest.mark.parametrize("max_order", [0, 1, 2])
def test_cached_generations_are_the_cpus(max_order: int) -> None:
    model, inputs = make_tiny(), make_inputs()
    config = CacheConfig(fresh_threshold=2, max_order=max_order)
    expected = run_cached(model, inputs, config)
    actual = run_cached(model.cuda(), inputs.to("cuda"), config)
    assert max(relative_error(a.cpu(), b) for a, b in zip(actual, expected, strict=True)) <= FP32


def test_without_forecasts_a_cache_is_bit_identical_to_none() -> None:
    model, inputs = make_tiny().cuda(), make_inputs().to("cuda")
    cached = run_cached(model, inputs, CacheConfig(fresh_threshold=1))
    uncached = run_cached(model, inputs, CacheConfig.off())
    assert all(torch.equal(a, b) for a, b in zip(cached, uncached, strict=True))


@pytest.mark.parametrize("kind", ["full", "forecast"])
def test_the_host_never_waits_within_a_step(kind: str) -> None:
    """In bf16 on Hopper or later, where torch's grouped product is native; elsewhere its fallback waits."""
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("torch's grouped product is native from compute capability 9.0 on")
    model = make_tiny().to("cuda", torch.bfloat16)
    inputs = make_inputs().to("cuda", torch.bfloat16)
    conditioning = model.prepare(*inputs.text, inputs.grid)
    assert all(module._stack is not None for module in model.modules() if isinstance(module, MoEFeedForward))
    cache_dic, current = cache_init(CacheConfig(fresh_threshold=2), 4)
    watched = 0
    for step in range(4):
        step_kind = cal_type(cache_dic, current)
        watch = step >= 2 and step_kind == kind  # the first step of each kind may set up libraries
        watched += watch
        with no_host_sync() if watch else contextlib.nullcontext():
            context = {"conditioning": conditioning, "cache_dic": cache_dic, "current": current}
            model(inputs.latents, inputs.timesteps, **context, return_dict=False)
    assert watched == 1


def test_anchors_stay_on_the_device() -> None:
    model, inputs = make_tiny().cuda(), make_inputs().to("cuda")
    cache_dic, current = cache_init(CacheConfig(), 1)
    cal_type(cache_dic, current)
    model(*inputs.positional, cache_dic=cache_dic, current=current)
    assert all(anchor.is_cuda for kept in cache_dic.anchors.values() for anchor in kept)


def test_freeing_the_cache_gives_its_memory_back() -> None:
    model, inputs = make_tiny().cuda(), make_inputs().to("cuda")
    conditioning = model.prepare(*inputs.text, inputs.grid)
    context = {"conditioning": conditioning, "return_dict": False}
    model(inputs.latents, inputs.timesteps, **context)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    cache_dic, current = cache_init(CacheConfig(), 1)
    cal_type(cache_dic, current)
    model(inputs.latents, inputs.timesteps, **context, cache_dic=cache_dic, current=current)
    assert torch.cuda.memory_allocated() - before >= cache_dic.num_bytes()
    cache_dic.free()
    assert torch.cuda.memory_allocated() == before


def test_moving_the_model_leaves_no_stack_behind() -> None:
    model, inputs = make_tiny(), make_inputs()
    model(*inputs.positional)
    model.cuda()(*inputs.to("cuda").positional)
    stacks = [module._stack for module in model.modules() if isinstance(module, MoEFeedForward)]
    assert all(stack.up.is_cuda and stack.down.is_cuda for stack in stacks)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_forecast_kernel_is_the_plain_sum(dtype: torch.dtype) -> None:
    from hi_diffusers.families.hidream.forecast import add_forecasts, add_forecasts_plainly

    generator = torch.Generator("cuda").manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device="cuda").to(dtype)

    tokens, gates = draw(2, 1000, 640), draw(8, 2, 640)
    anchors, weights = [[draw(2, 1000, 640) for _ in range(3)] for _ in range(8)], (1.5, 0.0, -0.5)
    actual = add_forecasts(tokens, gates, anchors, weights).float()
    expected = add_forecasts_plainly(tokens.cpu(), gates.cpu(), [[a.cpu() for a in kept] for kept in anchors], weights)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(actual.cpu(), expected.float(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("target", ["velocity", "x0", "module"])
@pytest.mark.parametrize("place", ["resident", "model", "sequential", "groups with a stream"])
def test_a_stock_pipeline_is_forecast_wherever_it_is_kept(target: str, place: str) -> None:
    variant = next(one for one in flux.VARIANTS if one.name == "flux dev")
    config = CacheConfig(target=target, fresh_threshold=3)
    pipe = variant.build()
    with forecast(pipe, config):
        on_cpu = variant.draw(pipe)
    if place == "resident":
        pipe.to("cuda")
    elif place == "model":
        pipe.enable_model_cpu_offload()
    elif place == "sequential":
        pipe.enable_sequential_cpu_offload()
    else:
        pipe.transformer.enable_group_offload(
            onload_device=torch.device("cuda"),
            offload_device=torch.device("cpu"),
            offload_type="leaf_level",
            use_stream=True,
        )
    there = {name: one.cuda() for name, one in variant.arguments(1).items() if isinstance(one, torch.Tensor)}
    with forecast(pipe, config) as session:
        drawings = [variant.draw(pipe, **there).cpu() for _ in range(2)]
    assert [record.kind for record in session.trace].count("full") == 4
    assert torch.equal(*drawings) and torch.allclose(drawings[0], on_cpu, atol=1e-3)
