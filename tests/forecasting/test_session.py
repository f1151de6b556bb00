"""The session: what it refuses, in one sentence each, and what it survives."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import diffusers
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    ConfigMixin,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchLCMScheduler,
    FluxControlNetModel,
    FluxControlNetPipeline,
    FluxPipeline,
    ModelMixin,
    TaylorSeerCacheConfig,
)
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from cache_functions import CacheConfig
from forecasting import Levels, StepSeen, forecast
from forecasting import generation as generation_module
from tests.tiny_pipelines import flux, hunyuan, ltx
from tests.tiny_pipelines.variant import Variant, noise, quiet, seeded

DEV = next(one for one in flux.VARIANTS if one.name == "flux dev")
GUIDED = next(one for one in flux.VARIANTS if one.name == "flux dev, true guidance")
CONTROL = {
    "patch_size": 1,
    "in_channels": 16,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 32,
    "pooled_projection_dim": 32,
    "axes_dims_rope": (4, 4, 8),
    "guidance_embeds": True,
}
THIRD = CacheConfig(target="velocity", fresh_threshold=3)
X0 = CacheConfig(target="x0", fresh_threshold=3)
MODULE = CacheConfig(target="module", fresh_threshold=3)


@pytest.fixture
def pipe() -> Any:
    return flux.dev()


def kinds(session: Any) -> str:
    return "".join(record.kind[1] for record in session.trace)


# Refusals.


def refusal(pipe: Any, config: CacheConfig, variant: Variant = DEV, **changes: Any) -> str:
    with pytest.raises(ValueError) as caught, forecast(pipe, config):
        variant.draw(pipe, **changes)
    assert "\n" not in str(caught.value)
    for one in (pipe.scheduler, pipe.transformer):
        assert "_forecast_link" not in vars(one)
    return str(caught.value)


def test_one_pipeline_is_not_forecast_twice(pipe: Any) -> None:
    with forecast(pipe, THIRD):
        right = DEV.draw(pipe)
        with pytest.raises(ValueError, match="forecast already"), forecast(pipe, X0):
            pass
        assert torch.equal(DEV.draw(pipe), right), "the refused one took the first one's place"


def test_diffusers_own_cache_and_this_one_are_not_used_at_once(pipe: Any) -> None:
    pipe.transformer.enable_cache(TaylorSeerCacheConfig(cache_interval=3))
    assert "diffusers' own cache" in refusal(pipe, THIRD)
    pipe.transformer.disable_cache()
    with forecast(pipe, THIRD):
        DEV.draw(pipe)
        pipe.transformer.enable_cache(TaylorSeerCacheConfig(cache_interval=3))
        with pytest.raises(ValueError, match="call disable_cache"):
            DEV.draw(pipe)


def test_residual_is_hidreams_own(pipe: Any) -> None:
    assert "HiDream" in refusal(pipe, CacheConfig(target="residual"))


def test_chunked_feed_forwards_are_refused_for_module_and_work_for_velocity(pipe: Any) -> None:
    for block in pipe.transformer.transformer_blocks:
        block._chunk_size, block._chunk_dim = 4, 1
    assert "set_chunk_feed_forward" in refusal(pipe, MODULE)
    with forecast(pipe, THIRD) as session:
        DEV.draw(pipe)
    assert kinds(session) == "uoouoouoouoo"


def test_a_part_of_two_blocks_is_refused(pipe: Any) -> None:
    first, second = pipe.transformer.transformer_blocks
    second.ff = first.ff
    assert "ff of block 1 stands in several" in refusal(pipe, MODULE)


def test_a_part_that_is_called_twice_is_refused(pipe: Any) -> None:
    stack = pipe.transformer.transformer_blocks
    forward = stack[0].forward
    stack[0].forward = lambda *args, **kwargs: (forward(*args, **kwargs), forward(*args, **kwargs))[1]
    assert "is called several times" in refusal(pipe, MODULE)


def test_adaptive_is_refused_under_context_parallelism_and_for_batches(pipe: Any) -> None:
    adaptive = CacheConfig(target="velocity", schedule="adaptive")
    with forecast(pipe, adaptive) as session:
        DEV.draw(pipe)
    assert "o" in kinds(session) and kinds(session)[0] == "u"
    assert "only one picture at a time" in refusal(pipe, adaptive, batch=2)
    pipe.transformer._parallel_config = object()
    assert "context parallelism" in refusal(pipe, adaptive)


def test_module_that_would_not_fit_is_refused_before_anything_large_is_kept(
    pipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with forecast(pipe, MODULE) as session:
        DEV.draw(pipe)
    most = max(record.cache_bytes for record in session.trace)
    monkeypatch.setattr(generation_module, "free_bytes", lambda device: most // 2)
    assert "take target velocity" in refusal(pipe, MODULE)
    monkeypatch.setattr(generation_module, "free_bytes", lambda device: 2 * most)
    with forecast(pipe, MODULE):
        DEV.draw(pipe)


def test_a_scheduler_or_denoiser_that_is_replaced_inside_of_the_context_is_said(pipe: Any) -> None:
    with forecast(pipe, THIRD):
        pipe.transformer = copy.deepcopy(pipe.transformer)
        with pytest.raises(ValueError, match="denoiser was replaced"):
            DEV.draw(pipe)
    pipe = flux.dev()
    old = pipe.scheduler
    with forecast(pipe, THIRD):
        pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config(old.config)
        with pytest.raises(ValueError, match="scheduler was replaced"):
            DEV.draw(pipe)


def forward_inputs() -> dict[str, Any]:
    return {
        "hidden_states": noise(1, 16, 16),
        "timestep": torch.tensor([0.5]),
        "guidance": torch.tensor([3.5]),
        "pooled_projections": noise(1, 32),
        "encoder_hidden_states": noise(1, 8, 32),
        "txt_ids": torch.zeros(8, 3),
        "img_ids": torch.zeros(16, 3),
    }


def test_a_pipeline_that_does_not_step_its_scheduler_is_given_up(pipe: Any) -> None:
    with forecast(pipe, THIRD):
        pipe.scheduler.set_timesteps(4, mu=1.0)
        with pytest.raises(ValueError, match="64 times"):
            for _ in range(70):
                pipe.transformer(**forward_inputs())


@pytest.mark.parametrize("config", [X0, CacheConfig(target="velocity", corrector=True)], ids=["x0", "corrector"])
def test_several_results_and_noise_levels_per_token_are_refused_for_x0_and_the_corrector(config: CacheConfig) -> None:
    for name, message in (("ltx-2", "this denoiser has 2"), ("ltx condition", "one per token")):
        variant = next(one for one in ltx.VARIANTS if one.name == name)
        pipe = variant.build()
        assert message in refusal(pipe, config, variant)
        with forecast(pipe, THIRD) as session:
            variant.draw(pipe)
        assert kinds(session) == "uoouoouoouoo"


def test_a_guider_that_averages_over_the_steps_is_refused_for_x0() -> None:
    variant = next(one for one in hunyuan.VARIANTS if one.name == "hunyuan-image")
    pipe = variant.build()
    assert "averages over the steps" in refusal(pipe, X0, variant)


def test_control_networks_are_computed_at_every_step() -> None:
    """Their results are wasted on forecast steps, and the picture is right."""
    control = seeded(FluxControlNetModel, **CONTROL)
    pipe = quiet(
        FluxControlNetPipeline(flux.dev().scheduler, flux.autoencoder(), *[None] * 4, flux.transformer(), control)
    )
    calls = []
    control.register_forward_pre_hook(lambda *_: calls.append(1))
    settings = {"control_image": noise(1, 3, 64, 64).clamp(-1, 1), "controlnet_conditioning_scale": 1.0}
    stock = DEV.draw(pipe, **settings)
    with forecast(pipe, CacheConfig(target="velocity", fresh_threshold=1)):
        assert torch.equal(DEV.draw(pipe, **settings), stock)
    calls.clear()
    with forecast(pipe, THIRD) as session:
        assert not torch.equal(DEV.draw(pipe, **settings), stock)
    assert kinds(session) == "uoouoouoouoo" and len(calls) == 12


def test_another_size_and_guidance_in_the_next_call_are_drawn_as_in_a_fresh_context() -> None:
    pipe, changes = flux.dev(), [{}, {"height": 96}, {"guidance_scale": 7.0}, {"num_inference_steps": 7}, {}]
    for config in (THIRD, X0, MODULE):
        fresh = []
        for change in changes:
            with forecast(pipe, config):
                fresh.append(DEV.draw(pipe, **change))
        with forecast(pipe, config):
            assert all(torch.equal(DEV.draw(pipe, **change), one) for change, one in zip(changes, fresh, strict=True))


# Schedulers that add noise.


@pytest.mark.parametrize("target", ["velocity", "module"])
@pytest.mark.parametrize(
    "scheduler",
    [
        FlowMatchLCMScheduler(shift=3.0),
        FlowMatchEulerDiscreteScheduler(shift=3.0, stochastic_sampling=True),
    ],
    ids=["lcm", "stochastic-euler"],
)
def test_where_noise_is_added_only_x0_is_admitted_and_is_the_default(pipe: Any, scheduler: Any, target: str) -> None:
    pipe.scheduler = scheduler
    assert "target must be x0" in refusal(pipe, CacheConfig(target=target))
    assert "corrector cannot work" in refusal(pipe, CacheConfig(target="x0", corrector=True))
    with forecast(pipe, CacheConfig(fresh_threshold=3)) as session:
        DEV.draw(pipe)
        assert session.trace[0].cache_bytes == 16 * 16 * 4
    assert kinds(session) == "uoouoouoouoo"


class Grainy(FlowMatchEulerDiscreteScheduler):
    """A scheduler that nobody knows, which adds noise from its second step on."""

    def step(self, *args: Any, **kwargs: Any) -> Any:
        latents = super().step(*args, **kwargs)[0]
        return (latents + 0.01 * torch.randn_like(latents) if self.step_index > 1 else latents,)


def test_a_scheduler_that_nobody_knows_is_recognised_by_what_it_does(pipe: Any) -> None:
    pipe.scheduler = Grainy(shift=3.0)
    assert "Grainy" in refusal(pipe, THIRD)
    before = torch.random.get_rng_state()
    with forecast(pipe, X0):
        DEV.draw(pipe)
    right = DEV.draw(pipe)
    with forecast(pipe, CacheConfig(target="x0", fresh_threshold=1)):
        assert torch.equal(DEV.draw(pipe), right), "looking at the noise used some of it up"
    assert not torch.equal(before, torch.random.get_rng_state())


def test_looking_for_noise_leaves_the_random_numbers_as_they_were(pipe: Any) -> None:
    torch.manual_seed(0)
    right = torch.rand(3)
    torch.manual_seed(0)
    with forecast(pipe, THIRD):
        pipe(**DEV.arguments(1), num_inference_steps=4, latents=noise(1, 16, 16))
    assert torch.equal(torch.rand(3), right)


def test_unknown_noise_levels_are_refused_for_x0_and_the_corrector_alone() -> None:
    pipe = toy(EulerDiscreteScheduler())
    with pytest.raises(ValueError, match="noise levels of EulerDiscreteScheduler are not known"), forecast(pipe, X0):
        pipe(4)


# What it survives.


def test_a_text_that_a_callback_changes_is_computed_anew(pipe: Any) -> None:
    """The shapes are the same: without a look at the tensors the old text's forecasts would go on."""

    def change(pipe: Any, step: int, timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"prompt_embeds": noise(1, 8, 32, seed=9)} if step == 3 else {}

    settings = {"callback_on_step_end": change, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    for config in (THIRD, X0, MODULE):
        with forecast(pipe, config) as session:
            DEV.draw(pipe, **settings)
        assert kinds(session) == "uoouuouoouoo", config.target
        with forecast(pipe, config) as session:
            DEV.draw(pipe)
        assert kinds(session) == "uoouoouoouoo"


def test_stopped_by_the_pipelines_own_flag_the_next_picture_is_right(pipe: Any) -> None:
    def stop(pipe: Any, step: int, timestep: Any, tensors: Any) -> dict[str, Any]:
        pipe._interrupt = step == 4
        return {}

    with forecast(pipe, THIRD) as session:
        right = DEV.draw(pipe)
        DEV.draw(pipe, callback_on_step_end=stop)
        assert len(session.trace) == 5
        assert torch.equal(DEV.draw(pipe), right)
    assert session.num_bytes() == 0


@pytest.mark.parametrize("kind", [KeyboardInterrupt, RuntimeError])
def test_an_exception_in_the_network_leaves_nothing(pipe: Any, kind: type[BaseException]) -> None:
    with forecast(pipe, MODULE):
        right = DEV.draw(pipe)
    block = pipe.transformer.single_transformer_blocks[1]
    calls = []

    def fail(*_: Any) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise kind

    handle = block.register_forward_pre_hook(fail)
    with forecast(pipe, MODULE):
        with pytest.raises(kind):
            DEV.draw(pipe)
        handle.remove()
        assert torch.equal(DEV.draw(pipe), right)
    assert all("_forecast_link" not in vars(one) for one in pipe.transformer.modules())


@pytest.mark.parametrize("config", [THIRD, X0, MODULE, CacheConfig(target="x0", fresh_threshold=3, corrector=True)])
def test_in_bf16_it_stays_in_bf16(config: CacheConfig) -> None:
    """Flow-Euler casts its result to the output's dtype: a forecast in fp32 would go on in fp32, in silence."""
    pipe = flux.dev().to(torch.bfloat16)
    bf16 = {name: value.bfloat16() if isinstance(value, Tensor) else value for name, value in DEV.arguments(1).items()}
    seen: list[StepSeen] = []
    stock = DEV.draw(pipe, **bf16)
    with forecast(pipe, config, on_step=seen.append):
        DEV.draw(pipe, **bf16)
    assert {one.latents.dtype for one in seen} == {torch.bfloat16}
    with forecast(pipe, CacheConfig(target=config.target, fresh_threshold=1)):
        assert torch.equal(DEV.draw(pipe, **bf16), stock)


def test_the_corrector_does_not_redo_what_a_callback_moved(pipe: Any) -> None:
    """It redoes the interval from step 1 to 6, unless the latents were changed in between, in place or not."""

    def scale(pipe: Any, step: int, timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"latents": tensors["latents"] * 0.5} if step == 3 else {}

    def scale_in_place(pipe: Any, step: int, timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        if step == 3:
            tensors["latents"].mul_(0.5)
        return {}

    config = {"target": "x0", "schedule": "mask", "mask": (0, 1, 6, 10), "basis": "reuse", "max_order": 0}
    for callback, is_redone in ((None, True), (scale, False), (scale_in_place, False)):
        results = []
        for corrector in (False, True):
            with forecast(pipe, CacheConfig(**config, corrector=corrector)):
                results.append(DEV.draw(pipe, callback_on_step_end=callback))
        assert torch.equal(*results) != is_redone


def test_it_works_in_inference_mode(pipe: Any) -> None:
    config = CacheConfig(target="x0", fresh_threshold=3, corrector=True)
    with forecast(pipe, config):
        right = DEV.draw(pipe)
        with torch.inference_mode():
            assert torch.equal(DEV.draw(pipe), right)


def test_observers_see_what_the_scheduler_gets(pipe: Any) -> None:
    seen: list[StepSeen] = []
    with forecast(pipe, THIRD, on_step=seen.append):
        result = DEV.draw(pipe)
    assert torch.equal(seen[-1].latents.float(), result)
    for now, before in ((seen[5], seen[4]), (seen[6], seen[5])):
        assert now.x0 is not None
        sigma = float(pipe.scheduler.sigmas[now.record.index])
        assert torch.allclose(before.latents, now.x0 + sigma * now.output, atol=1e-5)


def test_a_copy_of_the_scheduler_stands_alone(pipe: Any) -> None:
    with forecast(pipe, THIRD) as session:
        other = copy.deepcopy(pipe.scheduler)
        other.set_timesteps(4, mu=1.0)
        other.step(noise(1, 16, 16), other.timesteps[0], noise(1, 16, 16))
        assert session.trace == [] and not session.has_begun
        fresh = type(pipe.scheduler).from_config(pipe.scheduler.config)
        fresh.set_timesteps(4, mu=1.0)
        assert not session.has_begun
    pipe.scheduler = other
    with forecast(pipe, THIRD) as session:
        DEV.draw(pipe)
    assert kinds(session) == "uoouoouoouoo"


def test_adaptive_decides_for_each_branch(pipe: Any) -> None:
    with forecast(pipe, CacheConfig(target="velocity", schedule="adaptive")) as session:
        GUIDED.draw(pipe)
    assert kinds(session)[0] == "u" and {record.evaluations for record in session.trace} <= {0, 1, 2}


def test_kept_features_may_be_packed_or_lie_elsewhere(pipe: Any) -> None:
    sizes = {}
    for dtype in (None, "bf16", "fp8"):
        with forecast(pipe, CacheConfig(target="module", fresh_threshold=3, anchor_dtype=dtype)) as session:
            DEV.draw(pipe)
        sizes[dtype] = max(record.cache_bytes for record in session.trace)
    assert sizes[None] == 2 * sizes["bf16"] == 4 * sizes["fp8"]


# A family that nobody named.


class Toy(ModelMixin, ConfigMixin):
    """A denoiser whose output is a dict, with blocks of its own."""

    @register_to_config
    def __init__(self, width: int = 4, prefix: int = 0):
        super().__init__()
        self.stack = nn.ModuleList([nn.Linear(width, width) for _ in range(2)])
        self.calls = 0

    def forward(self, noisy: Tensor, moment: Tensor) -> dict[str, Any]:
        for layer in self.stack:
            noisy = torch.tanh(layer(noisy)) + moment
        self.calls += 1
        if self.config.prefix and self.calls == 1:
            noisy = torch.cat([noisy[..., :2], noisy], -1)
        return {"result": noisy, "note": "unchanged"}


class ToyPipeline(DiffusionPipeline):
    def __init__(self, painter: Toy, solver: Any, vae: Any):
        super().__init__()
        self.register_modules(painter=painter, solver=solver, vae=vae)

    @torch.no_grad()
    def __call__(self, num_steps: int) -> Tensor:
        self.painter.calls = 0
        self.solver.set_timesteps(num_steps)
        latents = noise(1, 4, 4)
        for timestep in self.solver.timesteps:
            output = self.painter(latents, timestep / 1000)
            assert output["note"] == "unchanged"
            latents = self.solver.step(output["result"][..., -4:], timestep, latents, return_dict=False)[0]
        return latents


def toy(scheduler: Any, **config: Any) -> Any:
    vae = seeded(AutoencoderKL, block_out_channels=(32,))
    return quiet(ToyPipeline(seeded(Toy, **config), scheduler, vae))


def test_a_family_that_nobody_named_works_with_velocity_and_is_refused_module() -> None:
    pipe = toy(FlowMatchEulerDiscreteScheduler(shift=3.0))
    stock = pipe(9)
    with forecast(pipe, CacheConfig(target="velocity", fresh_threshold=1)):
        assert torch.equal(pipe(9), stock)
    for config in (THIRD, X0):
        with forecast(pipe, config) as session:
            assert not torch.equal(pipe(9), stock)
        assert kinds(session) == "uoouoouoo" and pipe.painter.calls == 3
    with pytest.raises(ValueError, match="no part of Toy's blocks"), forecast(pipe, MODULE):
        pipe(9)


def test_an_output_whose_shape_changes_is_begun_anew() -> None:
    """As a first step that returns the text's tokens as well."""
    pipe = toy(FlowMatchEulerDiscreteScheduler(shift=3.0), prefix=2)
    with forecast(pipe, CacheConfig(target="velocity", fresh_threshold=3, max_order=2)) as session:
        result = pipe(9)
    assert kinds(session) == "uoouoouoo" and torch.isfinite(result).all()


def test_a_pipeline_without_a_scheduler_or_a_denoiser_is_refused() -> None:
    pipe = toy(FlowMatchEulerDiscreteScheduler())
    pipe.register_modules(painter=None)
    with pytest.raises(ValueError, match="no denoiser"), forecast(pipe, THIRD):
        pass
    pipe.register_modules(solver=None)
    with pytest.raises(ValueError, match="no scheduler"), forecast(pipe, THIRD):
        pass


# Other users of the same network.


def test_another_pipeline_with_the_same_network_is_not_forecast(pipe: Any) -> None:
    """Neither after the first one was stopped by an exception, nor from its callback."""
    other = quiet(FluxPipeline(FlowMatchEulerDiscreteScheduler(shift=2.0), *[None] * 5, pipe.transformer))
    right = DEV.draw(other, seed=5)

    def stop(pipe: Any, step: int, timestep: Any, tensors: Any) -> dict[str, Any]:
        if step == 4:
            raise Stopped
        return {}

    def draw_other(pipe: Any, step: int, timestep: Any, tensors: Any) -> dict[str, Any]:
        if step == 4:
            DEV.draw(other, seed=5)
        return {}

    with forecast(pipe, THIRD):
        with pytest.raises(Stopped):
            DEV.draw(pipe, callback_on_step_end=stop)
        assert torch.equal(DEV.draw(other, seed=5), right)
        with pytest.raises(ValueError, match="another pipeline uses it"):
            DEV.draw(pipe, callback_on_step_end=draw_other)


class Stopped(Exception):
    pass


@pytest.mark.parametrize("last", [0, 3])
@pytest.mark.parametrize("in_place", [False, True])
def test_a_text_is_noticed_however_and_whenever_it_is_changed(pipe: Any, last: int, in_place: bool) -> None:
    def change(pipe: Any, step: int, timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        if step != last:
            return {}
        if in_place:
            tensors["prompt_embeds"].mul_(-1)
            return {}
        return {"prompt_embeds": noise(1, 8, 32, seed=9)}

    settings = {"callback_on_step_end": change, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    config = CacheConfig(target="velocity", schedule="mask", mask=(0, 6))
    with forecast(pipe, config) as session:
        DEV.draw(pipe, **settings)
    full = [record.index for record in session.trace if record.kind == "full"]
    assert full == [0, last + 1, 6]


def test_two_threads_at_once_are_refused(pipe: Any) -> None:
    with forecast(pipe, THIRD):
        right = DEV.draw(pipe)

        def draw_in_thread(pipe: Any, step: int, timestep: Any, tensors: Any) -> dict[str, Any]:
            if step == 4:
                with ThreadPoolExecutor(1) as pool, pytest.raises(ValueError, match="one thread at a time"):
                    pool.submit(DEV.draw, pipe).result()
            return {}

        assert torch.equal(DEV.draw(pipe, callback_on_step_end=draw_in_thread), right)


def test_copies_and_pickles_made_inside_of_the_context_are_of_the_plain_class(pipe: Any) -> None:
    with forecast(pipe, MODULE):
        copies = [copy.deepcopy(pipe.transformer), pickle.loads(pickle.dumps(pipe.transformer))]
        copies += [copy.deepcopy(pipe.scheduler), pickle.loads(pickle.dumps(pipe.scheduler))]
        copies.append(pipe.scheduler.from_config(pipe.scheduler.config))
    for one, plain in zip(copies, [pipe.transformer] * 2 + [pipe.scheduler] * 3, strict=True):
        assert type(one) is type(plain) and "_forecast_link" not in vars(one)


def test_numbers_that_are_not_finite_are_not_taken_for_noise(pipe: Any) -> None:
    with torch.no_grad():
        next(pipe.transformer.parameters()).fill_(float("nan"))
    with forecast(pipe, THIRD):
        assert DEV.draw(pipe).isnan().any()


@pytest.mark.parametrize("name", ["EDMDPMSolverMultistepScheduler", "DDIMInverseScheduler"])
def test_levels_that_are_computed_otherwise_are_refused_for_x0(name: str) -> None:
    scheduler = getattr(diffusers, name)()
    scheduler.set_timesteps(4)
    with pytest.raises(ValueError, match="are not known"):
        Levels.of(scheduler)
