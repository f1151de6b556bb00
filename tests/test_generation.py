import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cache_functions import CacheConfig
from hi_diffusers import (
    HiDreamImagePipeline,
    Interrupted,
    SamplingOptions,
    StepRecord,
    generate,
    generate_batch,
    load_pipeline,
)
from hi_diffusers.engine.generation import prompt_notices
from hi_diffusers.pictures.metadata import read_metadata, write_picture
from tests.tiny_folder import OTHER_PROMPT, PROMPT, Calls, decibels, picture_of

OFF = CacheConfig.off()


def asked(prompt: str = PROMPT, **settings: Any) -> SamplingOptions:
    return SamplingOptions(prompt, **({"seed": 7, "num_steps": 3, "guidance": 0.0} | settings))


@pytest.fixture(scope="module")
def drawn(tiny_pipe):
    """One guided, cached picture that several tests look at."""
    return generate(tiny_pipe, asked(guidance=3.0, num_steps=6, width=80, height=48), CacheConfig(fresh_threshold=3))


def kinds(generation: Any) -> list[str]:
    return [record.kind for record in generation.trace]


# The picture.


def test_pixels_are_floats_from_0_to_1_of_the_resolved_size(drawn) -> None:
    options = drawn.metadata["options"]
    assert drawn.pixels.shape == (options["height"], options["width"], 3) == (48, 80, 3)
    assert drawn.pixels.dtype == np.float32
    assert drawn.pixels.min() >= 0 and drawn.pixels.max() <= 1
    assert len(np.unique(drawn.pixels)) > 256, "the pixels are already rounded"


def test_the_image_is_the_pixels_rounded_to_8_bits(drawn) -> None:
    assert drawn.image.mode == "RGB"
    assert drawn.image.tobytes() == picture_of(drawn.pixels).tobytes()


def test_the_same_settings_draw_the_same_picture_bit_for_bit(tiny_pipe) -> None:
    first, second = (generate(tiny_pipe, asked(scheduler="lcm")) for _ in range(2))
    assert np.array_equal(first.pixels, second.pixels)
    assert first.metadata == second.metadata


@pytest.mark.parametrize(
    "changed",
    [
        {"prompt": OTHER_PROMPT},
        {"seed": 8},
        {"num_steps": 4},
        {"guidance": 6.0},
        {"negative_prompt": OTHER_PROMPT},
        {"scheduler": "euler"},
        {"scheduler": "lcm"},
        {"shift": 1.0},
        {"max_sequence_length": 16},
    ],
    ids=lambda changed: "-".join(map(str, changed.items())),
)
def test_every_option_changes_the_picture(tiny_pipe, changed: dict[str, Any]) -> None:
    first, second = (generate(tiny_pipe, asked(**({"guidance": 3.0} | more)), OFF) for more in ({}, changed))
    assert decibels(first.pixels, second.pixels) < 45


def test_a_negative_prompt_without_guidance_changes_nothing(tiny_pipe) -> None:
    first, second = (generate(tiny_pipe, asked(negative_prompt=words), OFF) for words in ("", OTHER_PROMPT))
    assert np.array_equal(first.pixels, second.pixels)


def test_the_global_random_state_neither_matters_nor_changes(tiny_pipe) -> None:
    torch.manual_seed(1)
    first = generate(tiny_pipe, asked(scheduler="lcm"), OFF)
    torch.manual_seed(2)
    state = torch.random.get_rng_state()
    second = generate(tiny_pipe, asked(scheduler="lcm"), OFF)
    assert np.array_equal(first.pixels, second.pixels)
    assert torch.equal(torch.random.get_rng_state(), state)


# The metadata.


def test_metadata_says_what_made_the_picture(drawn, tiny_pipe) -> None:
    options, cache = drawn.metadata["options"], drawn.metadata["cache"]
    assert options["prompt"] == PROMPT and options["seed"] == 7
    assert (options["scheduler"], options["shift"], options["max_sequence_length"]) == ("unipc", 3.0, 32)
    assert (cache["target"], cache["fresh_threshold"], cache["max_order"]) == ("module", 3, 1)
    assert drawn.metadata["model"] == {
        **asdict(tiny_pipe.identity),
        "loras": [],
        "dtype": "float32",
        "device": "cpu",
    }
    assert drawn.metadata["versions"]["torch"] == torch.__version__


def test_metadata_is_json_and_comes_back_from_the_file(drawn, tmp_path: Path) -> None:
    write_picture(drawn.image, tmp_path / "a.png", drawn.metadata)
    assert read_metadata(tmp_path / "a.png") == drawn.metadata == json.loads(json.dumps(drawn.metadata))


def test_metadata_has_no_measured_value(drawn) -> None:
    """Or the same settings would not give the same file."""
    assert set(drawn.metadata) == {"version", "software", "model", "options", "cache", "versions"}
    text = json.dumps(drawn.metadata)
    for measured in ("second", "time", "memory", "trace", "date"):
        assert measured not in text


def test_metadata_names_no_local_path(drawn, tiny_folder: Path) -> None:
    text = json.dumps(drawn.metadata)
    for part in (str(tiny_folder), tiny_folder.parent.name, str(Path.home())):
        assert part not in text


def test_metadata_does_not_depend_on_where_the_model_lies(drawn, tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").symlink_to(tiny_folder)
    pipe = load_pipeline("nano", device="cpu", model_path=tmp_path / "elsewhere")
    again = generate(pipe, asked(guidance=3.0, num_steps=6, width=80, height=48), CacheConfig(fresh_threshold=3))
    assert again.metadata == drawn.metadata


def test_metadata_s_options_draw_the_picture_again(drawn, tiny_pipe) -> None:
    again = generate(tiny_pipe, SamplingOptions(**drawn.metadata["options"]), CacheConfig(**drawn.metadata["cache"]))
    assert np.array_equal(again.pixels, drawn.pixels)
    assert again.metadata == drawn.metadata


def test_a_seed_that_was_drawn_is_recorded_and_draws_the_picture_again(tiny_pipe) -> None:
    first = generate(tiny_pipe, asked(seed=None), OFF)
    again = generate(tiny_pipe, asked(seed=first.metadata["options"]["seed"]), OFF)
    assert np.array_equal(first.pixels, again.pixels)


def test_a_cache_that_is_off_is_recorded_as_off_alone(tiny_pipe) -> None:
    assert generate(tiny_pipe, asked(num_steps=1), OFF).metadata["cache"] == {"target": "off"}


# The cache.


def test_no_cache_given_is_the_preset_s(tiny_pipe, monkeypatch: pytest.MonkeyPatch) -> None:
    assert kinds(generate(tiny_pipe, asked(num_steps=12))).count("full") == 3
    preset = replace(tiny_pipe.preset, cache=CacheConfig(fresh_threshold=2))
    monkeypatch.setattr(tiny_pipe, "preset", preset)
    assert kinds(generate(tiny_pipe, asked())) == ["full", "forecast", "full"]


def test_only_off_is_off(tiny_pipe) -> None:
    assert kinds(generate(tiny_pipe, asked(), OFF)) == ["full"] * 3


def test_the_open_target_is_x0_where_the_sampler_adds_noise_and_module_elsewhere(tiny_pipe) -> None:
    targets = {
        name: generate(tiny_pipe, asked(scheduler=name), CacheConfig()).metadata["cache"]["target"]
        for name in ("unipc", "euler", "lcm")
    }
    assert targets == {"unipc": "module", "euler": "module", "lcm": "x0"}


# Embeddings.


@pytest.mark.parametrize("guidance", [0.0, 3.0])
def test_embeddings_draw_what_their_prompt_draws_and_need_no_encoder(
    tiny_pipe, monkeypatch: pytest.MonkeyPatch, guidance: float
) -> None:
    options = asked(negative_prompt=OTHER_PROMPT, guidance=guidance)
    expected = generate(tiny_pipe, options, OFF)
    embeds = tiny_pipe.encode([PROMPT], 32, [OTHER_PROMPT] if guidance else None)

    def encode(*_: Any, **__: Any) -> None:
        raise AssertionError("encoded, although embeddings were given")

    monkeypatch.setattr(tiny_pipe, "encode_prompt", encode)
    assert np.array_equal(generate(tiny_pipe, options, OFF, embeds=embeds).pixels, expected.pixels)


# The batch.


@pytest.mark.parametrize("scheduler", ["unipc", "lcm"])
@pytest.mark.parametrize("cache", [OFF, CacheConfig(fresh_threshold=2)], ids=["off", "cached"])
def test_a_picture_of_a_batch_is_the_picture_drawn_alone(tiny_pipe, scheduler: str, cache: CacheConfig) -> None:
    options = [
        asked(prompt, seed=seed, scheduler=scheduler, guidance=3.0)
        for prompt, seed in ((PROMPT, 1), (OTHER_PROMPT, 2), (PROMPT, 3))
    ]
    for one, of_batch in zip(options, generate_batch(tiny_pipe, options, cache), strict=True):
        alone = generate(tiny_pipe, one, cache)
        assert decibels(of_batch.pixels, alone.pixels) >= 60
        assert of_batch.metadata == alone.metadata
        assert kinds(of_batch) == kinds(alone)


def test_a_batch_is_one_call_of_the_network_a_step(tiny_pipe, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = Calls(tiny_pipe.transformer.forward)
    monkeypatch.setattr(tiny_pipe.transformer, "forward", forward)
    generate_batch(tiny_pipe, [asked(seed=1), asked(seed=2)], OFF)
    assert forward.count == 3


@pytest.mark.parametrize(
    "changed",
    [
        {"negative_prompt": "b"},
        {"width": 80, "height": 48},
        {"num_steps": 4},
        {"guidance": 2.0},
        {"scheduler": "euler"},
        {"shift": 2.0},
        {"max_sequence_length": 16},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_a_batch_of_unlike_options_is_refused(tiny_pipe, changed: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="equal except prompt, seed and pictures"):
        generate_batch(tiny_pipe, [asked(), asked(**changed)], OFF)


def test_an_empty_batch_is_refused(tiny_pipe) -> None:
    with pytest.raises(ValueError, match="at least one picture"):
        generate_batch(tiny_pipe, [])


@pytest.mark.parametrize(
    ("options", "cache"),
    [
        (asked(width=6400, height=10), None),
        (asked(scheduler="lcm"), CacheConfig(target="module")),
    ],
    ids=["size", "target"],
)
def test_what_cannot_work_is_refused_before_anything_is_computed(
    tiny_pipe, monkeypatch: pytest.MonkeyPatch, options: SamplingOptions, cache: CacheConfig | None
) -> None:
    encode = Calls(tiny_pipe.encode_prompt)
    monkeypatch.setattr(tiny_pipe, "encode_prompt", encode)
    with pytest.raises(ValueError):
        generate(tiny_pipe, options, cache)
    assert encode.count == 0


def test_a_pipeline_that_says_not_which_model_it_is_is_refused(tiny_folder: Path) -> None:
    pipe = HiDreamImagePipeline.from_pretrained(tiny_folder)
    pipe = HiDreamImagePipeline(**pipe.components)  # put together by hand: no folder says what it is
    with pytest.raises(ValueError, match="load_pipeline"):
        generate(pipe, asked())


# The trace and the observer.


def test_the_trace_has_one_record_a_step(tiny_pipe) -> None:
    trace = generate(tiny_pipe, asked(num_steps=6), CacheConfig(fresh_threshold=3)).trace
    assert all(isinstance(record, StepRecord) for record in trace)
    assert [record.index for record in trace] == [0, 1, 2, 3, 4, 5]
    assert [record.kind for record in trace] == ["full", "forecast", "forecast"] * 2
    assert all(record.seconds > 0 for record in trace)


@pytest.mark.parametrize("target", ["module", "x0"])
@pytest.mark.parametrize(("guidance", "full"), [(0.0, 1), (3.0, 2)])
def test_the_trace_counts_evaluations_of_a_picture(tiny_pipe, target: str, guidance: float, full: int) -> None:
    cache = CacheConfig(target, fresh_threshold=2)
    outs = generate_batch(tiny_pipe, [asked(guidance=guidance), asked(guidance=guidance, seed=8)], cache)
    for out in outs:
        assert [record.evaluations for record in out.trace] == [full, 0, full]


def test_the_stages_seconds_make_up_the_whole(drawn) -> None:
    seconds = drawn.seconds
    assert min(seconds.encode, seconds.denoise, seconds.decode) > 0
    assert seconds.whole == seconds.encode + seconds.denoise + seconds.decode
    assert sum(record.seconds for record in drawn.trace) <= seconds.denoise


def test_the_observer_sees_the_records_of_the_trace(tiny_pipe) -> None:
    seen = []

    def on_step(record: StepRecord, preview: Any) -> bool:
        seen.append(record)
        return True

    out = generate(tiny_pipe, asked(), on_step=on_step)
    assert tuple(seen) == out.trace


def test_an_observer_that_returns_nothing_stops_nothing(tiny_pipe) -> None:
    assert len(generate(tiny_pipe, asked(), on_step=lambda *_: None).trace) == 3


@pytest.mark.parametrize("last", [0, 1, 2])
def test_an_observer_s_false_stops_the_drawing_after_that_step(
    tiny_pipe, monkeypatch: pytest.MonkeyPatch, last: int
) -> None:
    decode = Calls(tiny_pipe.vae.decode)
    monkeypatch.setattr(tiny_pipe.vae, "decode", decode)
    seen = []

    def on_step(record: StepRecord, preview: Any) -> bool:
        seen.append(record.index)
        return record.index < last

    with pytest.raises(Interrupted, match=f"after step {last + 1} of 3"):
        generate(tiny_pipe, asked(), on_step=on_step)
    assert seen == list(range(last + 1))
    assert decode.count == 0


def test_a_preview_is_a_picture_of_the_drawing_s_size(tiny_pipe) -> None:
    previews = []
    generate(tiny_pipe, asked(width=80, height=48), on_step=lambda _, preview: previews.append(preview()))
    assert [(preview.mode, preview.size) for preview in previews] == [("RGB", (80, 48))] * 3


def test_the_last_preview_is_the_picture(tiny_pipe) -> None:
    previews = []
    out = generate(tiny_pipe, asked(scheduler="euler"), OFF, on_step=lambda _, preview: previews.append(preview()))
    assert decibels(previews[-1], out.image) > 50
    assert decibels(previews[0], out.image) < 40


def test_previews_do_not_change_the_picture(tiny_pipe) -> None:
    plain = generate(tiny_pipe, asked(scheduler="lcm"))
    watched = generate(tiny_pipe, asked(scheduler="lcm"), on_step=lambda _, preview: preview() is not None)
    assert np.array_equal(plain.pixels, watched.pixels)


def test_model_hooks_are_freed_once_the_picture_is_decoded(tiny_pipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """With model offloading the VAE would otherwise stay on the device beside the next picture's models."""
    freed = Calls(tiny_pipe.maybe_free_model_hooks)
    count_at_decoding = []
    decode = tiny_pipe.vae.decode

    def spy(*args: Any, **kwargs: Any) -> Any:
        count_at_decoding.append(freed.count)
        return decode(*args, **kwargs)

    monkeypatch.setattr(tiny_pipe, "maybe_free_model_hooks", freed)
    monkeypatch.setattr(tiny_pipe.vae, "decode", spy)
    generate(tiny_pipe, asked(num_steps=1))
    assert freed.count > count_at_decoding[-1]


# What of the prompt the model does not get to see.


def test_a_prompt_that_is_seen_whole_needs_no_notice(tiny_pipe) -> None:
    assert prompt_notices(tiny_pipe, asked().resolve(tiny_pipe.preset)) == []


def test_a_prompt_that_is_cut_is_said_with_the_words_lost(tiny_pipe) -> None:
    options = asked("a red circle above a blue square on a green background", max_sequence_length=8)
    (notice,) = prompt_notices(tiny_pipe, options.resolve(tiny_pipe.preset))
    assert "cut at 8 tokens" in notice and "square on a green background" in notice and "red circle" not in notice


def test_words_that_the_bundled_model_does_not_know_are_named_in_order(tiny_pipe) -> None:
    options = asked("a Zebra beside a red circle and a quokka on a blue background")
    (notice,) = prompt_notices(tiny_pipe, options.resolve(tiny_pipe.preset))
    assert "'Zebra', 'beside'" in notice and "'quokka'" in notice and "'red'" not in notice


# The bundled model.


def test_the_bundled_model_sees_its_whole_example(nano_folder: Path) -> None:
    pipe = load_pipeline("nano", device="cpu")
    options = SamplingOptions(pipe.preset.example).resolve(pipe.preset)
    assert prompt_notices(pipe, options) == []


def test_the_bundled_model_s_cached_picture_is_like_its_uncached_one_and_unlike_another(nano_folder: Path) -> None:
    pipe = load_pipeline("nano", device="cpu")
    options = SamplingOptions(pipe.preset.example, seed=1)
    uncached, cached = generate(pipe, options, OFF), generate(pipe, options)
    other = generate(pipe, replace(options, seed=2))
    likeness, unlikeness = decibels(cached.pixels, uncached.pixels), decibels(other.pixels, uncached.pixels)
    assert likeness > unlikeness + 3, f"{likeness:.1f} dB cached, {unlikeness:.1f} dB from another seed"


@pytest.mark.parametrize(
    ("name", "num_full", "targets"),
    [("nano", 13, ("solver",)), ("nano-dev", 7, ("x0",)), ("nano-fast", 4, ("x0",))],
)
def test_the_bundled_model_s_presets_compute_a_quarter_of_their_steps(
    nano_folder: Path, name: str, num_full: int, targets: tuple[str, ...]
) -> None:
    out = generate(load_pipeline(name, device="cpu"), SamplingOptions("a red circle on a blue background", seed=1))
    assert kinds(out).count("full") == num_full
    assert out.metadata["cache"]["target"] in targets


def test_a_picture_of_no_numbers_is_refused(nano_folder: Path) -> None:
    pipe = load_pipeline("nano", device="cpu")
    pipe.transformer.final_layer.linear.weight.data.fill_(float("nan"))
    with pytest.raises(RuntimeError, match="contain NaN or infinity"):
        generate(pipe, SamplingOptions("a red circle", seed=1, num_steps=2), CacheConfig.off())
