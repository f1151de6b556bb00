"""The cache belongs to one drawing: nothing of it is there before, after, or in another one."""

import itertools
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import cache_functions
from cache_functions import CacheConfig, CacheState
from hi_diffusers import HiDreamImagePipeline, Interrupted, SamplingOptions, generate, generate_batch, load_pipeline
from hi_diffusers.denoising import cached
from hi_diffusers.denoising.schedulers import make_scheduler
from hi_diffusers.denoising.steps import StepEnd
from tests.tiny_folder import CHANNELS, OTHER_PROMPT, PROMPT, Calls

ROOT = Path(__file__).resolve().parents[2]
OFF = CacheConfig.off()
CACHES = {target: CacheConfig(target, fresh_threshold=2) for target in ("module", "residual", "velocity", "x0")}


def asked(prompt: str = PROMPT, **settings: Any) -> SamplingOptions:
    return SamplingOptions(prompt, **({"seed": 7, "num_steps": 4, "guidance": 0.0} | settings))


@pytest.fixture
def states(monkeypatch: pytest.MonkeyPatch) -> list[CacheState]:
    """Every cache that is made while the test runs."""
    made: list[CacheState] = []

    def cache_init(*args: Any) -> Any:
        cache_dic, current = cache_functions.cache_init(*args)
        made.append(cache_dic)
        return cache_dic, current

    monkeypatch.setattr(cached, "cache_init", cache_init)
    return made


def assert_freed(states: list[CacheState], num_states: int = 1) -> None:
    assert len(states) == num_states
    assert all(state.num_bytes() == 0 and not state.anchors and not state.full_steps for state in states)


# Off.


def test_without_a_cache_the_picture_is_that_of_a_plain_call(tiny_pipe) -> None:
    generator = torch.Generator().manual_seed(7)
    (plain,) = tiny_pipe(
        PROMPT, num_inference_steps=4, guidance_scale=3.0, generator=generator, max_sequence_length=32, output_type="np"
    ).images
    assert np.array_equal(generate(tiny_pipe, asked(guidance=3.0), OFF).pixels, plain)


def test_a_cache_that_is_off_keeps_nothing(tiny_pipe, states) -> None:
    generate(tiny_pipe, asked(), OFF)
    assert states == [None]


@pytest.mark.parametrize(
    ("target", "scheduler"),
    [
        ("module", "unipc"),
        ("module", "euler"),
        ("residual", "unipc"),
        ("velocity", "unipc"),
        ("velocity", "euler"),
        ("x0", "unipc"),
        ("x0", "lcm"),
    ],
)
def test_a_threshold_of_1_is_bit_identical_to_no_cache(tiny_pipe, target: str, scheduler: str) -> None:
    options = asked(scheduler=scheduler, guidance=3.0)
    cached = generate(tiny_pipe, options, CacheConfig(target, fresh_threshold=1))
    assert np.array_equal(cached.pixels, generate(tiny_pipe, options, OFF).pixels)
    assert {record.kind for record in cached.trace} == {"full"}


@pytest.mark.parametrize("target", CACHES)
def test_a_cached_picture_differs_from_the_uncached_one(tiny_pipe, target: str) -> None:
    """Or the tests below would hold without any cache."""
    cached, uncached = (generate(tiny_pipe, asked(), cache) for cache in (CACHES[target], OFF))
    assert not np.array_equal(cached.pixels, uncached.pixels)


def test_the_module_target_is_refused_with_the_reason_where_the_sampler_adds_noise(tiny_pipe) -> None:
    with pytest.raises(ValueError, match=r"target must be x0 .*lcm.*noise"):
        generate(tiny_pipe, asked(scheduler="lcm"), CACHES["module"])


# Freed.


@pytest.mark.parametrize("target", CACHES)
def test_the_cache_is_freed_before_the_vae_decodes(
    tiny_pipe, states, monkeypatch: pytest.MonkeyPatch, target: str
) -> None:
    decode = tiny_pipe.vae.decode

    def checked(*args: Any, **kwargs: Any) -> Any:
        assert_freed(states)
        return decode(*args, **kwargs)

    monkeypatch.setattr(tiny_pipe.vae, "decode", checked)
    generate(tiny_pipe, asked(), CACHES[target])
    assert_freed(states)


def test_the_cache_is_full_while_it_is_needed(tiny_pipe, states) -> None:
    """Or the tests of freeing would hold for a cache that never kept anything."""
    num_bytes = []
    generate(tiny_pipe, asked(), CACHES["module"], on_step=lambda *_: num_bytes.append(states[0].num_bytes()))
    assert num_bytes[0] > 0 and num_bytes[-1] == 2 * num_bytes[0], "order 1 keeps two full steps"


@pytest.mark.parametrize("target", CACHES)
def test_the_cache_is_freed_when_the_transformer_fails(
    tiny_pipe, states, monkeypatch: pytest.MonkeyPatch, target: str
) -> None:
    monkeypatch.setattr(tiny_pipe.transformer, "forward", Calls(tiny_pipe.transformer.forward, fail_at=2))
    with pytest.raises(RuntimeError, match="this call fails"):
        generate(tiny_pipe, asked(), CACHES[target])
    assert_freed(states)


def test_the_cache_is_freed_when_the_scheduler_fails(tiny_pipe, states, monkeypatch: pytest.MonkeyPatch) -> None:
    step = Calls(None, fail_at=1)
    monkeypatch.setattr("diffusers.UniPCMultistepScheduler.step", lambda self, *args, **kwargs: step())
    with pytest.raises(RuntimeError, match="this call fails"):
        generate(tiny_pipe, asked(), CACHES["module"])
    assert_freed(states)


def test_the_cache_is_freed_when_the_observer_stops_or_fails(tiny_pipe, states) -> None:
    with pytest.raises(Interrupted):
        generate(tiny_pipe, asked(), CACHES["module"], on_step=lambda record, _: record.index < 2)
    with pytest.raises(RuntimeError, match="this call fails"):
        generate(tiny_pipe, asked(), CACHES["module"], on_step=Calls(lambda *_: True, fail_at=2))
    assert_freed(states, 2)


# Alone.

# Sizes, batches, numbers of steps, samplers and caches; each is drawn once in a pipeline that never drew before.
DRAWINGS = {
    "module": ([asked()], CACHES["module"]),
    "module, wide": ([asked(width=80, height=48)], CACHES["module"]),
    "module, guided": ([asked(guidance=3.0, num_steps=3)], CACHES["module"]),
    "module, batch": ([asked(seed=1), asked(OTHER_PROMPT, seed=2)], CACHES["module"]),
    "module, euler, order 2": ([asked(scheduler="euler", num_steps=6)], CacheConfig(fresh_threshold=2, max_order=2)),
    "x0, lcm": ([asked(scheduler="lcm")], CACHES["x0"]),
    "x0, lcm, tall batch": ([asked(seed=s, scheduler="lcm", width=48, height=80) for s in (1, 2)], CACHES["x0"]),
    "off": ([asked(num_steps=3)], OFF),
}


def draw(pipe: HiDreamImagePipeline, name: str) -> np.ndarray:
    options, cache = DRAWINGS[name]
    return np.stack([out.pixels for out in generate_batch(pipe, options, cache)])


@pytest.fixture(scope="module")
def fresh(tiny_folder: Path) -> dict[str, np.ndarray]:
    """Each drawing by a pipeline of its own."""
    return {name: draw(load_pipeline("nano", device="cpu", model_path=tiny_folder), name) for name in DRAWINGS}


@pytest.mark.parametrize("seed", [0, 1])
def test_drawings_in_any_order_are_those_of_a_fresh_pipeline(tiny_pipe, fresh, seed: int) -> None:
    names = [*DRAWINGS, *DRAWINGS]
    random.Random(seed).shuffle(names)
    for before, name in itertools.pairwise(["nothing", *names]):
        assert np.array_equal(draw(tiny_pipe, name), fresh[name]), f"{name!r} after {before!r}"


@pytest.mark.parametrize("name", ["module", "x0, lcm"])
def test_a_drawing_after_an_interrupted_one_is_that_of_a_fresh_pipeline(tiny_pipe, fresh, name: str) -> None:
    options, cache = DRAWINGS[name]
    with pytest.raises(Interrupted):
        generate(tiny_pipe, options[0], cache, on_step=lambda record, _: record.index < 1)
    assert np.array_equal(draw(tiny_pipe, name), fresh[name])


@pytest.mark.parametrize(("part", "method", "fail_at"), [("transformer", "forward", 3), ("vae", "decode", 1)])
def test_a_drawing_after_a_failed_one_is_that_of_a_fresh_pipeline(
    tiny_pipe, fresh, part: str, method: str, fail_at: int
) -> None:
    model = getattr(tiny_pipe, part)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, method, Calls(getattr(model, method), fail_at=fail_at))
        with pytest.raises(RuntimeError, match="this call fails"):
            generate(tiny_pipe, asked(width=80, height=48), CACHES["module"])
    assert np.array_equal(draw(tiny_pipe, "module"), fresh["module"])


def test_a_second_drawing_in_one_process_is_that_of_a_fresh_process(
    tiny_pipe, tiny_folder: Path, tmp_path: Path
) -> None:
    generate(tiny_pipe, asked(seed=1, width=80, height=48))
    second = generate(tiny_pipe, asked(guidance=3.0))
    command = [
        sys.executable,
        ROOT / "inference.py",
        PROMPT,
        "--model_path",
        tiny_folder,
        "--output",
        tmp_path / "a.png",
    ]
    settings = ["--seed", "7", "--num_steps", "4", "--guidance", "3", "--device", "cpu"]
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    subprocess.run([*command, *settings], cwd=tmp_path, env=environment, check=True, capture_output=True)
    assert Image.open(tmp_path / "a.png").tobytes() == second.image.tobytes()


# A flow whose denoised estimate is always the same picture: the forecast of x0 has nothing to get wrong.


class ConstantX0:
    """A transformer that leads every latent to `x0`, whatever the noise: its velocity is (x - x0) / sigma."""

    def __init__(self, x0: torch.Tensor, sigmas: torch.Tensor) -> None:
        self.x0, self.sigmas = x0, sigmas
        self.steps: list[int] = []

    def __call__(self, latents: torch.Tensor, timesteps: torch.Tensor, **arguments: Any) -> tuple[torch.Tensor]:
        step = arguments["current"].step
        self.steps.append(step)
        return (-(latents - self.x0) / self.sigmas[step],)


def denoise_toy(pipe: Any, name: str, cache: CacheConfig, seed: int, patch: pytest.MonkeyPatch) -> Any:
    scheduler = make_scheduler(name, 3.0)
    scheduler.set_timesteps(12)
    x0 = torch.randn(1, CHANNELS, 16, 16, generator=torch.Generator().manual_seed(0))
    toy = ConstantX0(x0, scheduler.sigmas)
    patch.setattr(pipe.transformer, "forward", toy)
    ends: list[StepEnd] = []
    generator = torch.Generator().manual_seed(seed)
    latents = pipe.denoise(
        torch.randn(1, CHANNELS, 16, 16, generator=generator),
        pipe.encode([PROMPT], 32),
        scheduler=scheduler,
        guidance=0.0,
        cache=cache,
        generator=generator,
        on_step_end=ends.append,
    )
    return x0, toy, ends, latents


@pytest.mark.parametrize("name", ["unipc", "euler", "lcm"])
def test_a_step_s_sigma_is_the_scheduler_s(tiny_pipe, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """UniPC's timesteps are whole numbers: a thousandth of one is another sigma."""
    x0, _, ends, latents = denoise_toy(tiny_pipe, name, OFF, 1, monkeypatch)
    for end in ends:
        torch.testing.assert_close(end.x0, x0, atol=2e-5, rtol=0)
    torch.testing.assert_close(latents, x0, atol=2e-5, rtol=0)


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("max_order", [0, 1, 2])
def test_a_constant_x0_is_forecast_exactly_under_any_noise(
    tiny_pipe, monkeypatch: pytest.MonkeyPatch, seed: int, max_order: int
) -> None:
    cache = CacheConfig("x0", fresh_threshold=4, max_order=max_order)
    x0, toy, ends, latents = denoise_toy(tiny_pipe, "lcm", cache, seed, monkeypatch)
    assert toy.steps == [0, 4, 8], "forecast steps must not call the network"
    for end in ends:
        torch.testing.assert_close(end.x0, x0, atol=2e-5, rtol=0)
    torch.testing.assert_close(latents, x0, atol=2e-5, rtol=0)


def test_forecast_steps_follow_the_noise_that_is_drawn_after_the_last_full_step(
    tiny_pipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The forecast is of x0 alone: between full steps latents still move with each draw, as without a cache."""
    cached = denoise_toy(tiny_pipe, "lcm", CACHES["x0"], 1, monkeypatch)[2]
    uncached = denoise_toy(tiny_pipe, "lcm", OFF, 1, monkeypatch)[2]
    other = denoise_toy(tiny_pipe, "lcm", CACHES["x0"], 2, monkeypatch)[2]
    for ours, theirs, others in list(zip(cached, uncached, other, strict=True))[:-1]:
        torch.testing.assert_close(ours.latents, theirs.latents, atol=5e-5, rtol=0)
        assert not torch.allclose(ours.latents, others.latents, atol=1e-3)


def test_latents_and_x0_are_kept_in_fp32_whatever_the_network_s_dtype(tiny_folder: Path) -> None:
    pipe = load_pipeline("nano", device="cpu", dtype="bf16", model_path=tiny_folder)
    scheduler = make_scheduler("euler", 3.0)
    scheduler.set_timesteps(2)
    ends: list[StepEnd] = []
    embeds = pipe.encode([PROMPT], 32)
    latents = pipe.draw_noise(1, 64, 64, torch.Generator().manual_seed(1))
    pipe.denoise(latents, embeds, scheduler=scheduler, guidance=0.0, cache=CACHES["x0"], on_step_end=ends.append)
    assert [(end.latents.dtype, end.x0.dtype) for end in ends] == [(torch.float32, torch.float32)] * 2
