"""The caches of diffusers and of cache-dit on our transformer: what each skips is counted over whole drawings."""

import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    SeaCacheConfig,
    TaylorSeerCacheConfig,
    TextKVCacheConfig,
)
from torch import nn

from cache_functions import CacheConfig
from hi_diffusers import HiDreamImagePipeline, SamplingOptions, generate
from tests.tiny import make_inputs, make_tiny
from tests.tiny_folder import OTHER_PROMPT, PROMPT, TRANSFORMER, decibels

NUM_STEPS = 12
NUM_BLOCKS = TRANSFORMER["num_layers"] + TRANSFORMER["num_single_layers"]
ALL = NUM_STEPS * NUM_BLOCKS
EVERYTHING = 100.0  # a threshold that every step stays below
ANY_TIME = (-1, 1001)
NO_TIME = (-1, -1)


@pytest.fixture(scope="module")
def pipe(tiny_folder: Path) -> HiDreamImagePipeline:
    """Ours, for this file alone."""
    return quiet(HiDreamImagePipeline.from_pretrained(tiny_folder))


@pytest.fixture(scope="module")
def plain(pipe: HiDreamImagePipeline) -> np.ndarray:
    """The picture without a cache."""
    return draw(pipe)


@pytest.fixture(autouse=True)
def switched_off(pipe: HiDreamImagePipeline) -> Iterator[None]:
    """No cache is left on, and none leaves a module or a weight behind."""
    names, keys = [name for name, _ in pipe.transformer.named_modules()], set(pipe.transformer.state_dict())
    yield
    if pipe.transformer.is_cache_enabled:
        pipe.transformer.disable_cache()
    assert sorted(name for name, _ in pipe.transformer.named_modules()) == sorted(names)
    assert set(pipe.transformer.state_dict()) == keys


def quiet(pipe: HiDreamImagePipeline) -> HiDreamImagePipeline:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: HiDreamImagePipeline, **changes: Any) -> np.ndarray:
    settings: dict[str, Any] = {
        "prompt": PROMPT,
        "num_inference_steps": NUM_STEPS,
        "guidance_scale": 3.0,
        "generator": torch.Generator().manual_seed(7),
        "max_sequence_length": 32,
        "output_type": "np",
    }
    return pipe(**(settings | changes)).images


@contextmanager
def counting(pipe: HiDreamImagePipeline) -> Iterator[Counter[str]]:
    """Counts the blocks, attentions and feed-forwards that are computed, and the branches that attentions see."""
    calls: Counter[str] = Counter()

    def count(name: str) -> Callable[..., None]:
        return lambda module, args, output: calls.update({name: 1, "branches": len(output) * (name == "attentions")})

    transformer = pipe.transformer
    parts = [wrapper.block for wrapper in (*transformer.double_stream_blocks, *transformer.single_stream_blocks)]
    hooks: list[Any] = []
    for part in parts:
        hooks.append(part.adaLN_modulation.register_forward_hook(count("blocks")))
        hooks.append(part.attn1.to_q.register_forward_hook(count("attentions")))
        hooks.append(part.ff_i.gate.register_forward_hook(lambda *_: calls.update({"feed_forwards": 1})))
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


def timesteps(pipe: HiDreamImagePipeline) -> list[float]:
    pipe.scheduler.set_timesteps(NUM_STEPS)
    return pipe.scheduler.timesteps.tolist()


def pyramid(pipe: HiDreamImagePipeline, **changes: Any) -> PyramidAttentionBroadcastConfig:
    settings: dict[str, Any] = {
        "spatial_attention_block_skip_range": 2,
        "spatial_attention_timestep_skip_range": (100, 950),
        "current_timestep_callback": lambda: pipe.current_timestep,
    }
    return PyramidAttentionBroadcastConfig(**(settings | changes))


def faster(pipe: HiDreamImagePipeline, **changes: Any) -> FasterCacheConfig:
    settings: dict[str, Any] = {
        "tensor_format": "BCHW",
        "current_timestep_callback": lambda: pipe.current_timestep,
        "attention_weight_callback": lambda _: 0.3,
    }
    return FasterCacheConfig(**(settings | changes))


def mag(pipe: HiDreamImagePipeline, **changes: Any) -> MagCacheConfig:
    settings: dict[str, Any] = {
        "num_inference_steps": NUM_STEPS,
        "mag_ratios": [1.0] * NUM_STEPS,
        "retention_ratio": 0.25,
    }
    return MagCacheConfig(**(settings | changes))


def taylorseer(pipe: HiDreamImagePipeline, **changes: Any) -> TaylorSeerCacheConfig:
    return TaylorSeerCacheConfig(**({"cache_interval": 3, "disable_cache_before_step": 2} | changes))


CACHES: dict[str, Callable[[HiDreamImagePipeline], Any]] = {
    "FirstBlockCache": lambda pipe: FirstBlockCacheConfig(EVERYTHING),
    "MagCache": mag,
    "SeaCache": lambda pipe: SeaCacheConfig(EVERYTHING),
    "PyramidAttentionBroadcast": pyramid,
    "FasterCache": faster,
    "TaylorSeer": taylorseer,
    "TaylorSeer lite": lambda pipe: taylorseer(pipe, use_lite_mode=True),
}
# The same caches, so set that they skip nothing.
WITHOUT_SKIPPING: dict[str, Callable[[HiDreamImagePipeline], Any]] = {
    "FirstBlockCache": lambda pipe: FirstBlockCacheConfig(0.0),
    "MagCache": lambda pipe: mag(pipe, calibrate=True),
    "SeaCache": lambda pipe: SeaCacheConfig(0.0),
    "PyramidAttentionBroadcast": lambda pipe: pyramid(pipe, spatial_attention_block_skip_range=1),
    "FasterCache": lambda pipe: faster(
        pipe, unconditional_batch_timestep_skip_range=NO_TIME, spatial_attention_timestep_skip_range=NO_TIME
    ),
    "TaylorSeer": lambda pipe: taylorseer(pipe, cache_interval=1),
    "TaylorSeer lite": lambda pipe: taylorseer(pipe, cache_interval=1, use_lite_mode=True),
}


def expected_counts(pipe: HiDreamImagePipeline, name: str) -> dict[str, int]:
    """What the cache's own description says, at the settings above: blocks, attentions and feed-forwards computed."""
    times = timesteps(pipe)
    if name == "FirstBlockCache":  # one step whole; of the others the first block
        return dict.fromkeys(("blocks", "attentions", "feed_forwards"), NUM_BLOCKS + NUM_STEPS - 1)
    if name in ("MagCache", "SeaCache", "TaylorSeer lite"):
        steps = {
            "MagCache": (0, 1, 2, 6, 10),  # the first quarter, then after three that were skipped
            "SeaCache": (0, 3, 6, 9, 11),  # the first, the last, and after two that were skipped
            "TaylorSeer lite": (0, 1, 3, 6, 9),
        }[name]
        return dict.fromkeys(("blocks", "attentions", "feed_forwards"), len(steps) * NUM_BLOCKS)
    if name == "TaylorSeer":
        attentions = len((0, 1, 3, 6, 9))
    elif name == "PyramidAttentionBroadcast":
        attentions = sum(step % 2 == 0 or not 100 < time < 950 for step, time in enumerate(times))
    else:
        alone = [step for step, time in enumerate(times) if time < 641 and step % 5]
        attentions = NUM_STEPS - sum(step % 2 for step in alone)
    return {"blocks": ALL, "attentions": attentions * NUM_BLOCKS, "feed_forwards": ALL}


# What works


def test_without_a_cache_everything_is_computed(pipe: HiDreamImagePipeline) -> None:
    with counting(pipe) as calls:
        draw(pipe)
    assert calls == {"blocks": ALL, "attentions": ALL, "feed_forwards": ALL, "branches": 2 * ALL}


@pytest.mark.parametrize("name", CACHES)
def test_a_cache_skips_what_it_promises_in_every_drawing_and_is_gone_when_it_is_disabled(
    name: str, pipe: HiDreamImagePipeline, plain: np.ndarray
) -> None:
    pipe.transformer.enable_cache(CACHES[name](pipe))
    pictures = []
    for _ in range(2):
        with counting(pipe) as calls:
            pictures.append(draw(pipe))
        assert {key: calls[key] for key in ("blocks", "attentions", "feed_forwards")} == expected_counts(pipe, name)
    pipe.transformer.disable_cache()
    assert np.array_equal(*pictures), "the second picture went on from the first"
    assert np.isfinite(pictures[0]).all() and 12 < decibels(pictures[0], plain) < 60
    assert np.array_equal(draw(pipe), plain)


@pytest.mark.parametrize("name", [name for name in CACHES if name != "FasterCache"])
def test_without_guidance_a_cache_skips_as_much(name: str, pipe: HiDreamImagePipeline) -> None:
    pipe.transformer.enable_cache(CACHES[name](pipe))
    with counting(pipe) as calls:
        picture = draw(pipe, guidance_scale=1.0)
    assert {key: calls[key] for key in ("blocks", "attentions", "feed_forwards")} == expected_counts(pipe, name)
    assert calls["branches"] == calls["attentions"] and np.isfinite(picture).all()


@pytest.mark.parametrize("name", WITHOUT_SKIPPING)
def test_a_cache_that_skips_nothing_changes_nothing(
    name: str, pipe: HiDreamImagePipeline, plain: np.ndarray, capsys: pytest.CaptureFixture[str]
) -> None:
    pipe.transformer.enable_cache(WITHOUT_SKIPPING[name](pipe))
    with counting(pipe) as calls:
        picture = draw(pipe)
    assert calls["attentions"] == ALL and np.array_equal(picture, plain)


@pytest.mark.parametrize(
    ("config", "least"),
    [
        (lambda pipe: FirstBlockCacheConfig(0.2), 25),
        (lambda pipe: mag(pipe, num_inference_steps=25), 25),
        (lambda pipe: SeaCacheConfig(1.0), 40),
        (pyramid, 30),
        (faster, 35),
        (taylorseer, 35),
        (lambda pipe: taylorseer(pipe, use_lite_mode=True), 35),
    ],
    ids=list(CACHES),
)
def test_on_the_bundled_model_the_picture_changes_little(
    config: Callable[[HiDreamImagePipeline], Any], least: float, nano: HiDreamImagePipeline, nano_plain: np.ndarray
) -> None:
    nano.transformer.enable_cache(config(nano))
    try:
        picture = draw(nano, num_inference_steps=25)
    finally:
        nano.transformer.disable_cache()
    assert least < decibels(picture, nano_plain) < 100


@pytest.fixture(scope="module")
def nano(nano_folder: Path) -> HiDreamImagePipeline:
    return quiet(HiDreamImagePipeline.from_pretrained(nano_folder))


@pytest.fixture(scope="module")
def nano_plain(nano: HiDreamImagePipeline) -> np.ndarray:
    return draw(nano, num_inference_steps=25)


def test_fastercache_computes_one_branch_where_it_guesses_the_other(pipe: HiDreamImagePipeline) -> None:
    pipe.transformer.enable_cache(faster(pipe, spatial_attention_block_skip_range=None))
    with counting(pipe) as calls:
        draw(pipe)
    alone = sum(time < 641 and step % 5 > 0 for step, time in enumerate(timesteps(pipe)))
    assert alone > 0 and calls["branches"] == (2 * NUM_STEPS - alone) * NUM_BLOCKS


def test_fastercache_without_guidance_skips_attentions(pipe: HiDreamImagePipeline) -> None:
    pipe.transformer.enable_cache(faster(pipe, is_guidance_distilled=True))
    with counting(pipe) as calls:
        picture = draw(pipe, guidance_scale=1.0)
    skipped = sum(time < 681 and step % 2 for step, time in enumerate(timesteps(pipe)))
    assert calls["attentions"] == (NUM_STEPS - skipped) * NUM_BLOCKS < ALL and np.isfinite(picture).all()


@pytest.mark.parametrize("name", ["FirstBlockCache", "PyramidAttentionBroadcast", "FasterCache"])
def test_two_oblong_pictures_of_a_batch_are_those_drawn_alone(name: str, pipe: HiDreamImagePipeline) -> None:
    size = {"width": 128, "height": 32}
    pipe.transformer.enable_cache(CACHES[name](pipe))
    generators = [torch.Generator().manual_seed(seed) for seed in (7, 8)]
    together = draw(pipe, num_images_per_prompt=2, generator=generators, **size)
    for picture, seed in zip(together, (7, 8), strict=True):
        assert decibels(picture, draw(pipe, generator=torch.Generator().manual_seed(seed), **size)[0]) > 60


def test_magcache_is_calibrated_as_diffusers_describes(
    pipe: HiDreamImagePipeline, plain: np.ndarray, capsys: pytest.CaptureFixture[str]
) -> None:
    pipe.transformer.enable_cache(MagCacheConfig(calibrate=True, num_inference_steps=NUM_STEPS))
    draw(pipe)
    pipe.transformer.disable_cache()
    (printed,) = re.findall(r"^\[.*\d\]$", capsys.readouterr().out, re.M)
    ratios = [float(ratio) for ratio in printed.strip("[]").split(",")]
    assert len(ratios) == NUM_STEPS and ratios[0] == 1.0
    pipe.transformer.enable_cache(mag(pipe, mag_ratios=ratios, threshold=0.5))
    with counting(pipe) as calls:
        draw(pipe)
    assert calls["blocks"] < ALL


def test_identifiers_that_are_given_are_kept(pipe: HiDreamImagePipeline) -> None:
    pipe.transformer.enable_cache(taylorseer(pipe, cache_identifiers=[r"single_stream_blocks\.\d+\.block\.attn1"]))
    with counting(pipe) as calls:
        draw(pipe)
    num_single = TRANSFORMER["num_single_layers"]
    assert calls["attentions"] == ALL - (NUM_STEPS - len((0, 1, 3, 6, 9))) * num_single


@torch.no_grad()
def changing_text(pipe: HiDreamImagePipeline) -> dict[str, Any]:
    """Arguments of a call that draws another prompt from step 5 on."""
    t5, _, llama, _, pooled, _ = pipe.encode_prompt(
        OTHER_PROMPT, do_classifier_free_guidance=False, max_sequence_length=32
    )
    changed = {"prompt_embeds_t5": t5, "prompt_embeds_llama3": llama, "pooled_prompt_embeds": pooled}

    def change(pipe: Any, step: int, time: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        return changed if step == 4 else {}

    return {"callback_on_step_end": change, "callback_on_step_end_tensor_inputs": ["latents", *changed]}


def test_a_new_text_in_the_middle_of_a_drawing_starts_the_cache_anew(pipe: HiDreamImagePipeline) -> None:
    pipe.transformer.enable_cache(FirstBlockCacheConfig(EVERYTHING))
    with counting(pipe) as calls:
        draw(pipe, guidance_scale=1.0, **changing_text(pipe))
    assert calls["blocks"] == 2 * NUM_BLOCKS + NUM_STEPS - 2, "steps 0 and 5 whole"


def test_the_pipeline_tells_its_timestep_while_it_draws(pipe: HiDreamImagePipeline) -> None:
    seen: list[Any] = []

    def look(pipe: Any, step: int, time: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        seen.append((pipe.current_timestep, float(time)))
        return {}

    assert pipe.current_timestep is None
    draw(pipe, callback_on_step_end=look)
    assert len(seen) == NUM_STEPS and all(told == time for told, time in seen)
    assert pipe.current_timestep is None


@pytest.mark.parametrize("cache_first", [True, False])
def test_a_cache_of_the_stack_works_on_groups_that_are_offloaded(cache_first: bool, tiny_folder: Path) -> None:
    pipe = quiet(HiDreamImagePipeline.from_pretrained(tiny_folder))
    config = FirstBlockCacheConfig(EVERYTHING)
    pipe.transformer.enable_cache(config)
    expected = draw(pipe)
    if not cache_first:
        pipe.transformer.disable_cache()
    pipe.transformer.enable_group_offload(torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1)
    if not cache_first:
        pipe.transformer.enable_cache(config)
    assert np.array_equal(draw(pipe), expected)


def test_a_cached_transformer_is_saved_as_it_was(pipe: HiDreamImagePipeline, tmp_path: Path) -> None:
    pipe.transformer.enable_cache(FirstBlockCacheConfig())
    pipe.transformer.save_pretrained(tmp_path)
    again = type(pipe.transformer).from_pretrained(tmp_path).state_dict()
    assert again.keys() == pipe.transformer.state_dict().keys()


def test_the_half_of_a_conditioning_is_that_of_half_the_texts() -> None:
    model, inputs = make_tiny(), make_inputs(4, 8, 4)
    with torch.no_grad():
        times = torch.tensor([900.0, 500.0])
        whole = model.prepare_gates(model.prepare(*inputs.text, inputs.grid), times)
        texts = (inputs.t5[2:], inputs.llama[:, 2:], inputs.pooled[2:])
        half = model.prepare_gates(model.prepare(*texts, inputs.grid), times)
    first, second = whole.chunk(2)
    assert len(first.pooled) == 2 and second.grid == half.grid
    pairs = [(second.text, half.text), (second.pooled, half.pooled), (second.gates, half.gates)]
    pairs += [(second.key_mask, half.key_mask), (second.rotary.cos, half.rotary.cos)]
    for mine, theirs in (*pairs, *zip(second.llama, half.llama, strict=True)):
        torch.testing.assert_close(mine, theirs)


# What is refused


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (lambda pipe: TextKVCacheConfig(), r"HiDream's changes with the timestep: use FirstBlockCacheConfig"),
        (lambda pipe: faster(pipe, tensor_format="BCFHW"), r'tensor_format must be "BCHW" for pictures, got "BCFHW"'),
        (lambda pipe: faster(pipe, current_timestep_callback=None), r"current_timestep_callback=lambda: pipe"),
        (lambda pipe: pyramid(pipe, current_timestep_callback=None), r"current_timestep_callback"),
        (lambda pipe: pyramid(pipe, spatial_attention_block_identifiers=("up",)), r"skip nothing.*attn1 does\)"),
        (lambda pipe: faster(pipe, spatial_attention_block_identifiers=("up",)), r"skip nothing.*attn1 does\)"),
        (
            lambda pipe: taylorseer(pipe, cache_identifiers=["blocks.*attn"]),
            r"skip nothing.*\(attn1\|ff_i\|ff_t\) does",
        ),
        (lambda pipe: "FirstBlockCache", r"is not supported"),
    ],
)
def test_a_cache_that_cannot_work_is_refused_in_one_sentence_and_leaves_nothing(
    config: Callable[[HiDreamImagePipeline], Any], message: str, pipe: HiDreamImagePipeline, plain: np.ndarray
) -> None:
    with pytest.raises(ValueError, match=message) as refused:
        pipe.transformer.enable_cache(config(pipe))
    assert "\n" not in str(refused.value)
    assert not pipe.transformer.is_cache_enabled
    assert np.array_equal(draw(pipe), plain)


@pytest.mark.parametrize(
    ("config", "settings", "message"),
    [
        (lambda pipe: mag(pipe, num_inference_steps=28), {}, r"num_inference_steps=28, and the drawing has 12 steps"),
        (faster, {"guidance_scale": 1.0}, r"is_guidance_distilled=True to draw without guidance"),
        (
            lambda pipe: faster(pipe, is_guidance_distilled=True, spatial_attention_timestep_skip_range=ANY_TIME),
            {},
            r"must leave out the timestep \d+, .* got \(-1, 1001\)",
        ),
    ],
)
def test_a_drawing_that_the_cache_was_not_made_for_is_refused(
    config: Callable[[HiDreamImagePipeline], Any], settings: dict[str, Any], message: str, pipe: HiDreamImagePipeline
) -> None:
    pipe.transformer.enable_cache(config(pipe))
    with pytest.raises(ValueError, match=message):
        draw(pipe, **settings)


@pytest.mark.parametrize("target", ["x0", "velocity", "residual", "module"])
def test_our_cache_and_diffusers_at_once_are_refused(target: str, pipe: HiDreamImagePipeline) -> None:
    pipe.transformer.enable_cache(FirstBlockCacheConfig())
    with pytest.raises(ValueError, match="two caches are switched on, cache= and FirstBlockCacheConfig"):
        draw(pipe, cache=CacheConfig(target))


def test_a_second_cache_of_diffusers_is_refused_and_the_first_goes_on(pipe: HiDreamImagePipeline) -> None:
    pipe.transformer.enable_cache(FirstBlockCacheConfig(EVERYTHING))
    with pytest.raises(ValueError, match="FirstBlockCacheConfig is switched on: call disable_cache before"):
        pipe.transformer.enable_cache(mag(pipe))
    with counting(pipe) as calls:
        draw(pipe)
    assert calls["blocks"] == NUM_BLOCKS + NUM_STEPS - 1


def test_a_text_of_another_number_of_pictures_is_refused() -> None:
    model, inputs = make_tiny(), make_inputs(2)
    with torch.no_grad(), pytest.raises(ValueError, match="the text is that of 2 pictures, hidden_states of 1"):
        model(inputs.latents[:1], inputs.timesteps[:1], *inputs.text)


# cache-dit


@pytest.fixture
def cache_dit() -> ModuleType:
    return pytest.importorskip("cache_dit", reason="cache-dit is not installed")


@contextmanager
def wrapped(cache_dit: ModuleType, pipe: HiDreamImagePipeline, **settings: Any) -> Iterator[None]:
    """cache-dit switched on, and off at the end: it changes the pipeline's class."""
    settings = {"Fn_compute_blocks": 1, "max_warmup_steps": 4, "residual_diff_threshold": EVERYTHING} | settings
    cache_dit.enable_cache(pipe, cache_config=cache_dit.DBCacheConfig(**settings))
    try:
        yield
    finally:
        cache_dit.disable_cache(pipe)


def test_cache_dit_skips_blocks_and_is_gone_when_it_is_disabled(
    cache_dit: ModuleType, tiny_folder: Path, plain: np.ndarray
) -> None:
    pipe = quiet(HiDreamImagePipeline.from_pretrained(tiny_folder))  # anew: then it checks the blocks' signatures
    pictures = []
    with wrapped(cache_dit, pipe):
        for _ in range(2):
            with counting(pipe) as calls:
                pictures.append(draw(pipe))
            skipped = (NUM_STEPS - 4) * (NUM_BLOCKS - 2)  # of each list of blocks the first is computed
            assert calls["blocks"] == calls["attentions"] == ALL - skipped
    assert np.array_equal(*pictures)
    assert 12 < decibels(pictures[0], plain) < 60
    assert np.array_equal(draw(pipe), plain)


def test_cache_dit_that_skips_nothing_changes_nothing(
    cache_dit: ModuleType, pipe: HiDreamImagePipeline, plain: np.ndarray
) -> None:
    with wrapped(cache_dit, pipe, residual_diff_threshold=0.0):
        assert decibels(draw(pipe), plain) > 60


def test_cache_dit_and_another_cache_at_once_are_refused(cache_dit: ModuleType, pipe: HiDreamImagePipeline) -> None:
    with wrapped(cache_dit, pipe):
        with pytest.raises(ValueError, match=r"cache-dit is switched on: call cache_dit\.disable_cache before"):
            pipe.transformer.enable_cache(FirstBlockCacheConfig())
        with pytest.raises(ValueError, match="two caches are switched on, cache= and cache-dit"):
            draw(pipe, cache=CacheConfig("x0"))


def test_cache_dit_over_a_cache_of_diffusers_is_refused(cache_dit: ModuleType, pipe: HiDreamImagePipeline) -> None:
    pipe.transformer.enable_cache(taylorseer(pipe))
    with (
        wrapped(cache_dit, pipe),
        pytest.raises(ValueError, match="two caches are switched on, TaylorSeerCacheConfig and cache-dit"),
    ):
        draw(pipe)


def test_cache_dit_outside_of_the_call_is_refused(cache_dit: ModuleType, pipe: HiDreamImagePipeline) -> None:
    """It would go on with what it kept of the drawing before."""
    options = SamplingOptions(PROMPT, seed=1, num_steps=2)
    for drawings_before in range(2):
        with wrapped(cache_dit, pipe):
            for _ in range(drawings_before):
                draw(pipe)
            with pytest.raises(ValueError, match=r"cache-dit works in pipe\(...\) alone"):
                generate(pipe, options, CacheConfig.off())


def test_a_new_text_in_the_middle_of_a_drawing_with_cache_dit_is_refused(
    cache_dit: ModuleType, pipe: HiDreamImagePipeline
) -> None:
    with wrapped(cache_dit, pipe), pytest.raises(ValueError, match="cache-dit cannot go on with another text"):
        draw(pipe, guidance_scale=1.0, **changing_text(pipe))


def test_every_stage_of_a_stack_is_a_block_and_no_weight_of_its_own(pipe: HiDreamImagePipeline) -> None:
    pipe.transformer.enable_cache(FirstBlockCacheConfig())
    stages = pipe.transformer.stages
    assert isinstance(stages, nn.ModuleList) and len(stages) == NUM_BLOCKS and not list(stages.parameters())
