"""Our pipeline is diffusers' pipeline: what diffusers' own class draws from a folder, ours draws, too."""

import inspect
import json
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import TaylorSeerCacheConfig
from PIL import Image
from torch import Tensor
from transformers import LlamaModel

from cache_functions import CacheConfig
from hi_diffusers import HiDreamImagePipeline, HiDreamImageTransformer2DModel
from hi_diffusers.denoising.schedulers import make_scheduler
from hi_diffusers.preset import fit_size
from tests.tiny_folder import CHANNELS, OTHER_PROMPT, PROMPT, SIDE, Calls, decibels, picture_of

THIRD_PROMPT = "a yellow triangle left of a black ring on a white background"
ENCODERS = [f"{kind}{number}" for kind in ("text_encoder", "tokenizer") for number in ("", "_2", "_3", "_4")]
OURS, STOCK = HiDreamImagePipeline, diffusers.HiDreamImagePipeline


@pytest.fixture(scope="module")
def pipe(tiny_folder: Path) -> HiDreamImagePipeline:
    """Ours, for this file alone."""
    pipe = HiDreamImagePipeline.from_pretrained(tiny_folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def saved(pipe: HiDreamImagePipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that ours has written."""
    folder = tmp_path_factory.mktemp("saved") / "model"
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def stock(saved: Path) -> Any:
    """diffusers' own pipeline on the folder that ours has written."""
    pipe = diffusers.HiDreamImagePipeline.from_pretrained(saved)
    pipe.default_sample_size = pipe.transformer.config.max_resolution[0]
    pipe.text_encoder_4.set_attn_implementation("eager")  # it asks for attention maps
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: Any, *args: Any, **kwargs: Any) -> Any:
    """A few steps on fixed settings unless told otherwise; pictures as floats [B,H,W,3]."""
    defaults = {
        "num_inference_steps": 3,
        "guidance_scale": 3.0,
        "generator": torch.Generator().manual_seed(7),
        "max_sequence_length": 32,
        "output_type": "np",
    }
    if not args and "pooled_prompt_embeds" not in kwargs:
        defaults["prompt"] = PROMPT
    return pipe(*args, **(defaults | kwargs)).images


@torch.no_grad()
def encoded(pipe: Any, prompt: str = PROMPT, negative: str = "") -> dict[str, Tensor]:
    """Both branches' embeddings under the names of the call's arguments."""
    t5, negative_t5, llama, negative_llama, pooled, negative_pooled = pipe.encode_prompt(
        prompt, negative_prompt=negative, max_sequence_length=32
    )
    return {
        "prompt_embeds_t5": t5,
        "negative_prompt_embeds_t5": negative_t5,
        "prompt_embeds_llama3": llama,
        "negative_prompt_embeds_llama3": negative_llama,
        "pooled_prompt_embeds": pooled,
        "negative_pooled_prompt_embeds": negative_pooled,
    }


# Folders.


def test_an_ordinary_folder_gives_our_transformer_and_a_llama_without_its_head(pipe) -> None:
    assert type(pipe.transformer) is HiDreamImageTransformer2DModel
    assert type(pipe.text_encoder_4) is LlamaModel


def test_a_loaded_pipeline_has_the_folder_s_weights(pipe, tiny_folder: Path) -> None:
    expected = diffusers.HiDreamImageTransformer2DModel.from_pretrained(tiny_folder / "transformer").state_dict()
    state = pipe.transformer.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[key], expected[key]) for key in state)


def test_the_picture_s_size_comes_from_the_folder(pipe) -> None:
    assert draw(pipe, num_inference_steps=1).shape == (1, SIDE, SIDE, 3)


@pytest.mark.parametrize("argument", ["dtype", "torch_dtype"])
def test_a_folder_loads_in_another_dtype(tiny_folder: Path, argument: str) -> None:
    pipe = HiDreamImagePipeline.from_pretrained(tiny_folder, **{argument: torch.bfloat16})
    for part in (pipe.transformer, pipe.text_encoder_4, pipe.text_encoder, pipe.vae):
        assert part.dtype is torch.bfloat16


def test_a_component_that_is_given_is_not_loaded(tiny_folder: Path, pipe) -> None:
    other = HiDreamImagePipeline.from_pretrained(tiny_folder, transformer=pipe.transformer, text_encoder_4=None)
    assert other.transformer is pipe.transformer and other.text_encoder_4 is None


def test_a_saved_folder_names_diffusers_own_classes(saved: Path) -> None:
    index = json.loads((saved / "model_index.json").read_text())
    assert index["_class_name"] == "HiDreamImagePipeline"
    assert index["transformer"] == ["diffusers", "HiDreamImageTransformer2DModel"]
    config = json.loads((saved / "transformer" / "config.json").read_text())
    assert config["_class_name"] == "HiDreamImageTransformer2DModel"


def test_a_saved_folder_loads_again_with_the_same_weights(saved: Path, pipe) -> None:
    again = HiDreamImagePipeline.from_pretrained(saved)
    for name in ("transformer", "text_encoder_4", "vae"):
        state = getattr(pipe, name).state_dict()
        assert all(torch.equal(value, state[key]) for key, value in getattr(again, name).state_dict().items())


def test_a_pipeline_that_was_saved_still_draws_and_saves(pipe, saved: Path, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path / "again")
    index, again = (json.loads((folder / "model_index.json").read_text()) for folder in (saved, tmp_path / "again"))
    assert again == index
    assert draw(pipe, num_inference_steps=1).shape == (1, SIDE, SIDE, 3)


# The call: diffusers' pipeline is the oracle.


# The first two are diffusers' deprecated ones, which it takes from **kwargs.
OWN = ("prompt_embeds", "negative_prompt_embeds", "cache", "image", "mask_image", "strength")


def test_the_call_has_diffusers_parameters_in_diffusers_order_and_cache() -> None:
    ours = list(inspect.signature(OURS.__call__).parameters.values())
    theirs = [p for p in inspect.signature(STOCK.__call__).parameters.values() if p.kind is not p.VAR_KEYWORD]
    assert [parameter.name for parameter in ours] == [*(parameter.name for parameter in theirs), *OWN]
    assert all(parameter.kind is parameter.KEYWORD_ONLY for parameter in ours[-len(OWN) :])


def test_the_call_has_diffusers_defaults() -> None:
    ours, theirs = (inspect.signature(kind.__call__).parameters for kind in (OURS, STOCK))
    for name in list(ours)[1 : -len(OWN)]:
        default, expected = ours[name].default, theirs[name].default
        assert (list(default) if isinstance(default, tuple) else default) == expected, name


@pytest.mark.parametrize("name", ["unipc", "euler"])
@pytest.mark.parametrize("guidance", [0.0, 3.0])
def test_stock_diffusers_draws_the_same_picture_from_the_saved_folder(
    pipe, stock, monkeypatch: pytest.MonkeyPatch, name: str, guidance: float
) -> None:
    for one in (pipe, stock):
        monkeypatch.setattr(one, "scheduler", make_scheduler(name, 3.0))
    ours, theirs = (draw(one, num_inference_steps=6, guidance_scale=guidance) for one in (pipe, stock))
    assert decibels(ours, theirs) > 50
    assert decibels(ours, draw(pipe, generator=torch.Generator().manual_seed(8))) < 30, "any two pictures are alike"


def test_stock_diffusers_draws_the_same_picture_with_lcm_and_the_same_noise(
    pipe, stock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stock diffusers draws a step's noise from the global state only, so that is what both do here."""
    latents = torch.randn(1, CHANNELS, 16, 16, generator=torch.Generator().manual_seed(7))
    pictures = []
    for one in (pipe, stock):
        monkeypatch.setattr(one, "scheduler", make_scheduler("lcm", 3.0))
        torch.manual_seed(5)
        pictures.append(draw(one, latents=latents, generator=None))
    assert decibels(*pictures) > 50


@pytest.mark.parametrize(
    "changed",
    [
        {"prompt": OTHER_PROMPT},
        {"prompt_2": OTHER_PROMPT},
        {"prompt_3": OTHER_PROMPT},
        {"prompt_4": OTHER_PROMPT},
        {"negative_prompt": OTHER_PROMPT},
        {"negative_prompt_2": OTHER_PROMPT},
        {"negative_prompt_3": OTHER_PROMPT},
        {"negative_prompt_4": OTHER_PROMPT},
        {"prompt": [PROMPT, OTHER_PROMPT], "negative_prompt": [OTHER_PROMPT, ""]},
        {"num_images_per_prompt": 2},
        {"height": 48, "width": 80},
        {"height": 512, "width": 512, "num_inference_steps": 2},
        {"max_sequence_length": 20},
        {"sigmas": [1.0, 0.6, 0.2]},
        {"guidance_scale": 0.0, "negative_prompt": OTHER_PROMPT},
    ],
    ids=lambda changed: "-".join(changed),
)
def test_an_argument_means_what_it_means_in_diffusers(
    pipe, stock, monkeypatch: pytest.MonkeyPatch, changed: dict[str, Any]
) -> None:
    for one in (pipe, stock):
        monkeypatch.setattr(one, "scheduler", make_scheduler("euler", 3.0))
    ours, theirs = (draw(one, **changed) for one in (pipe, stock))
    assert ours.shape == theirs.shape
    assert decibels(ours, theirs) > 50
    plain = draw(pipe)
    assert ours.shape != plain.shape or decibels(ours, plain) < 50, "the argument changes nothing"


def test_embeddings_that_are_given_need_no_encoder(pipe, tiny_folder: Path) -> None:
    bare = HiDreamImagePipeline.from_pretrained(tiny_folder, **dict.fromkeys(ENCODERS))
    bare.set_progress_bar_config(disable=True)
    assert np.array_equal(draw(bare, **encoded(pipe)), draw(pipe))


def test_latents_need_no_vae(pipe, tiny_folder: Path) -> None:
    bare = HiDreamImagePipeline.from_pretrained(tiny_folder, vae=None)
    bare.set_progress_bar_config(disable=True)
    assert torch.equal(draw(bare, output_type="latent"), draw(pipe, output_type="latent"))


@pytest.mark.parametrize("shape", [(1, CHANNELS, 8, 8), (1, CHANNELS + 1, 16, 16), (2, CHANNELS, 16, 16)])
def test_latents_of_another_shape_are_refused_as_in_diffusers(pipe, stock, shape: tuple[int, ...]) -> None:
    for one in (stock, pipe):
        with pytest.raises(ValueError, match=r"(?i)latents.*shape|shape.*latents"):
            draw(one, latents=torch.zeros(shape))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"prompt": None}, "prompt"),
        ({"prompt": 3}, "prompt"),
        ({"prompt": [PROMPT] * 2, "negative_prompt": [""] * 3}, "negative_prompt"),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, "callback_on_step_end_tensor_inputs"),
    ],
)
def test_what_diffusers_refuses_is_refused(pipe, arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        draw(pipe, **arguments)


# What comes out.


def test_the_output_types_are_forms_of_one_picture(pipe) -> None:
    floats, tensors, pictures, latents = (draw(pipe, output_type=kind) for kind in ("np", "pt", "pil", "latent"))
    assert floats.shape == (1, SIDE, SIDE, 3) and floats.dtype == np.float32
    assert tensors.shape == (1, 3, SIDE, SIDE)
    assert np.array_equal(tensors.permute(0, 2, 3, 1).numpy(), floats)
    assert isinstance(pictures[0], Image.Image)
    assert pictures[0].tobytes() == picture_of(floats[0]).tobytes()
    assert latents.shape == (1, CHANNELS, 16, 16) and latents.dtype is torch.float32
    assert np.array_equal(pipe.decode(latents), floats)


def test_a_plain_tuple_is_returned_where_one_is_wanted(pipe) -> None:
    result = pipe(PROMPT, num_inference_steps=1, return_dict=False, max_sequence_length=32)
    assert type(result) is tuple and len(result) == 1
    assert isinstance(result[0][0], Image.Image)


@pytest.mark.parametrize("name", ["unipc", "lcm"])
def test_a_picture_of_a_batch_is_the_picture_drawn_alone(pipe, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(pipe, "scheduler", make_scheduler(name, 3.0))
    prompts = [PROMPT, OTHER_PROMPT, THIRD_PROMPT]
    together = draw(pipe, prompts, generator=[torch.Generator().manual_seed(seed) for seed in range(3)])
    for seed, (prompt, picture) in enumerate(zip(prompts, together, strict=True)):
        alone = draw(pipe, prompt, generator=torch.Generator().manual_seed(seed))[0]
        assert decibels(picture, alone) >= 60, f"picture {seed} of the batch"


def test_several_pictures_of_a_prompt_have_a_generator_each(pipe) -> None:
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    pictures = draw(pipe, num_images_per_prompt=2, generator=generators)
    for seed, picture in zip((1, 2), pictures, strict=True):
        alone = draw(pipe, generator=torch.Generator().manual_seed(seed))[0]
        assert decibels(picture, alone) >= 60


def test_a_seed_draws_the_same_picture_with_a_sampler_that_adds_noise(pipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless the generator reaches the scheduler's step, its noise comes from the global state."""
    monkeypatch.setattr(pipe, "scheduler", make_scheduler("lcm", 3.0))
    pictures = []
    for global_seed in (1, 2):
        torch.manual_seed(global_seed)
        pictures.append(draw(pipe))
    assert np.array_equal(*pictures)


# Callbacks and interruption.


def test_a_callback_sees_each_step_with_its_timestep_and_latents(pipe) -> None:
    seen: list[tuple[int, float, Tensor]] = []

    def callback(which: Any, step: int, timestep: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        assert which is pipe and set(tensors) == {"latents"}
        seen.append((step, timestep.item(), tensors["latents"].clone()))
        return tensors

    latents = draw(pipe, callback_on_step_end=callback, output_type="latent")
    assert [step for step, *_ in seen] == [0, 1, 2]
    assert [timestep for _, timestep, _ in seen] == pipe.scheduler.timesteps.tolist()
    assert torch.equal(seen[-1][2], latents)


def test_a_callback_gets_the_tensors_it_asks_for(pipe) -> None:
    names = ["latents", "prompt_embeds_t5", "prompt_embeds_llama3", "pooled_prompt_embeds"]
    shapes = {}

    def callback(_: Any, step: int, timestep: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        shapes.update({name: tuple(tensor.shape) for name, tensor in tensors.items()})
        return {}

    draw(pipe, callback_on_step_end=callback, callback_on_step_end_tensor_inputs=names)
    assert shapes == {
        "latents": (1, CHANNELS, 16, 16),
        "prompt_embeds_t5": (2, 32, 64),
        "prompt_embeds_llama3": (4, 2, 32, 64),
        "pooled_prompt_embeds": (2, 128),
    }


def test_a_callback_changes_the_latents(pipe) -> None:
    latents = draw(pipe, callback_on_step_end=lambda *_: {"latents": torch.ones(1, CHANNELS, 16, 16)}, output_type="pt")
    expected = pipe.decode(torch.ones(1, CHANNELS, 16, 16), "pt")
    assert torch.equal(latents, expected)


@pytest.mark.parametrize("name", ["prompt_embeds_t5", "prompt_embeds_llama3", "pooled_prompt_embeds"])
def test_a_callback_changes_embeddings_as_in_diffusers(pipe, stock, name: str) -> None:
    def callback(_: Any, step: int, timestep: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensors[name].flip(-1)} if step == 0 else {}

    more = {"callback_on_step_end": callback, "callback_on_step_end_tensor_inputs": ["latents", name]}
    ours, theirs = (draw(one, **more) for one in (pipe, stock))
    assert decibels(ours, theirs) > 50
    assert decibels(ours, draw(pipe)) < 50, "the change has no effect"


EMBEDDINGS = ["prompt_embeds_t5", "prompt_embeds_llama3", "pooled_prompt_embeds"]


def end_guidance(which: Any, step: int, timestep: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The callback of diffusers' documentation: the second branch alone goes on, at half the cost."""
    if step != 0:
        return {}
    which._guidance_scale = 0.0
    return {name: tensors[name].chunk(2, dim=1 if "llama3" in name else 0)[-1] for name in EMBEDDINGS}


def test_a_callback_ends_guidance_midway_as_in_diffusers(pipe, stock) -> None:
    more = {"callback_on_step_end": end_guidance, "callback_on_step_end_tensor_inputs": EMBEDDINGS}
    ours, theirs = (draw(one, **more) for one in (pipe, stock))
    assert decibels(ours, theirs) > 50
    assert decibels(ours, draw(pipe)) < 50, "guidance went on"


@pytest.mark.parametrize("target", ["module", "x0"])
def test_a_callback_ends_guidance_midway_while_steps_are_forecast(pipe, target: str) -> None:
    """What was kept of two branches is no forecast of one."""
    more = {"callback_on_step_end": end_guidance, "callback_on_step_end_tensor_inputs": EMBEDDINGS}
    cached = draw(pipe, num_inference_steps=6, cache=CacheConfig(target, fresh_threshold=3), **more)
    assert cached.shape == (1, SIDE, SIDE, 3)
    assert decibels(cached, draw(pipe, num_inference_steps=6, **more)) > 10


def test_an_interrupt_from_a_callback_draws_what_is_there_as_in_diffusers(pipe, stock) -> None:
    def callback(which: Any, step: int, timestep: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        which._interrupt = step == 1
        return {"latents": tensors["latents"] * 0.5} if step == 1 else {}

    ours, theirs = (draw(one, num_inference_steps=5, callback_on_step_end=callback) for one in (pipe, stock))
    assert decibels(ours, theirs) > 50
    assert decibels(ours, draw(pipe, num_inference_steps=5)) < 50, "the drawing went on"


def test_an_interrupt_from_outside_draws_what_is_there_as_in_diffusers(
    pipe, stock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a page's stop button sets it, while no callback is given."""
    pictures = []
    for one in (stock, pipe):
        forward = one.transformer.forward

        def interrupting(*args: Any, which: Any = one, forward: Any = forward, **kwargs: Any) -> Any:
            which._interrupt = True
            return forward(*args, **kwargs)

        monkeypatch.setattr(one.transformer, "forward", interrupting)
        pictures.append(draw(one, num_inference_steps=5))
    assert decibels(*pictures) > 50


def test_a_call_after_an_interrupted_one_draws_to_the_end(pipe) -> None:
    expected = draw(pipe)

    def interrupt(which: Any, *_: Any) -> dict[str, Tensor]:
        which._interrupt = True
        return {}

    draw(pipe, callback_on_step_end=interrupt)
    assert np.array_equal(draw(pipe), expected)


# The cache.


def test_the_call_takes_a_cache(pipe, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = Calls(pipe.transformer.forward)
    monkeypatch.setattr(pipe.transformer, "forward", forward)
    picture = draw(pipe, num_inference_steps=6, cache=CacheConfig("x0", fresh_threshold=3))
    assert forward.count == 2
    assert 10 < decibels(picture, draw(pipe, num_inference_steps=6)) < 60


@pytest.mark.parametrize("name", ["unipc", "lcm"])
def test_a_full_step_hands_the_scheduler_the_network_s_own_output(
    pipe, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Never one rebuilt from x0, which would lose digits where sigma is small."""
    scheduler = make_scheduler(name, 3.0)
    forward, step = pipe.transformer.forward, scheduler.step
    outputs: list[Tensor] = []
    handed: list[Tensor] = []

    def spy_forward(*args: Any, **kwargs: Any) -> tuple[Tensor]:
        outputs.append(forward(*args, **kwargs)[0])
        return (outputs[-1],)

    def spy_step(velocity: Tensor, *args: Any, generator: Any = None, **kwargs: Any) -> Any:
        handed.append(velocity)
        return step(velocity, *args, **kwargs)

    monkeypatch.setattr(pipe.transformer, "forward", spy_forward)
    monkeypatch.setattr(scheduler, "step", spy_step)
    monkeypatch.setattr(pipe, "scheduler", scheduler)
    draw(pipe, num_inference_steps=5, guidance_scale=0.0, cache=CacheConfig("x0", fresh_threshold=2))
    assert len(handed) == 5 and len(outputs) == 3
    for velocity, output in zip(handed[::2], outputs, strict=True):
        assert torch.equal(velocity, -output)


def test_the_call_s_open_target_is_x0_where_the_sampler_adds_noise(pipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipe, "scheduler", make_scheduler("lcm", 3.0))
    open_target, x0 = (draw(pipe, num_inference_steps=5, cache=cache) for cache in (CacheConfig(), CacheConfig("x0")))
    assert np.array_equal(open_target, x0)


def test_the_call_refuses_the_module_target_where_the_sampler_adds_noise(pipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipe, "scheduler", make_scheduler("lcm", 3.0))
    with pytest.raises(ValueError, match="noise"):
        draw(pipe, cache=CacheConfig("module"))


def taylorseer() -> TaylorSeerCacheConfig:
    identifiers = [r"(double|single)_stream_blocks\.\d+\.block\.(attn1|ff_i|ff_t)"]
    return TaylorSeerCacheConfig(
        cache_interval=3,
        disable_cache_before_step=2,
        taylor_factors_dtype=torch.float32,
        cache_identifiers=identifiers,
    )


def test_diffusers_own_taylorseer_works_through_the_call_and_starts_anew_with_each_picture(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = HiDreamImagePipeline.from_pretrained(tiny_folder)
    pipe.set_progress_bar_config(disable=True)
    plain = draw(pipe, num_inference_steps=7)
    pipe.transformer.enable_cache(taylorseer())
    projection = pipe.transformer.single_stream_blocks[0].block.attn1.to_q
    calls = Calls(projection.forward)
    monkeypatch.setattr(projection, "forward", calls)
    pictures, counts = [], []
    for _ in range(2):
        calls.count = 0
        pictures.append(draw(pipe, num_inference_steps=7))
        counts.append(calls.count)
    assert 0 < counts[0] < 7, "no step was skipped"
    assert counts[0] == counts[1] and np.array_equal(*pictures), "the second picture went on counting"
    assert 10 < decibels(pictures[0], plain) < 60


def test_diffusers_own_taylorseer_changes_nothing_while_it_skips_nothing(tiny_folder: Path) -> None:
    pipe = HiDreamImagePipeline.from_pretrained(tiny_folder)
    pipe.set_progress_bar_config(disable=True)
    plain = draw(pipe, num_inference_steps=2)
    pipe.transformer.enable_cache(taylorseer())
    assert np.array_equal(draw(pipe, num_inference_steps=2), plain)
    pipe.transformer.disable_cache()
    assert np.array_equal(draw(pipe, num_inference_steps=2), plain)


# Hooks.


@pytest.fixture
def freed(pipe, monkeypatch: pytest.MonkeyPatch) -> Calls:
    """Counts how often the pipeline frees its models' hooks."""
    calls = Calls(pipe.maybe_free_model_hooks)
    monkeypatch.setattr(pipe, "maybe_free_model_hooks", calls)
    return calls


def test_model_hooks_are_freed_at_the_end_of_a_call(pipe, freed: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    decode = pipe.vae.decode
    count_at_decoding = []

    def spy(*args: Any, **kwargs: Any) -> Any:
        count_at_decoding.append(freed.count)
        return decode(*args, **kwargs)

    monkeypatch.setattr(pipe.vae, "decode", spy)
    draw(pipe, num_inference_steps=1)
    assert freed.count > count_at_decoding[0], "the VAE stays on the device"


@pytest.mark.parametrize("part", ["transformer.forward", "transformer.prepare", "vae.decode"])
def test_model_hooks_are_freed_when_a_model_fails(
    pipe, freed: Calls, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    name, method = part.split(".")
    monkeypatch.setattr(getattr(pipe, name), method, Calls(None, fail_at=1))
    with pytest.raises(RuntimeError, match="this call fails"):
        draw(pipe)
    assert freed.count > 0


def test_model_hooks_are_freed_when_a_callback_fails(pipe, freed: Calls) -> None:
    with pytest.raises(RuntimeError, match="this call fails"):
        draw(pipe, callback_on_step_end=Calls(None, fail_at=1))
    assert freed.count > 0


def test_model_offloading_draws_the_same_picture_call_after_call(tiny_folder: Path, pipe) -> None:
    offloaded = HiDreamImagePipeline.from_pretrained(tiny_folder)
    offloaded.set_progress_bar_config(disable=True)
    offloaded.enable_model_cpu_offload(device="cpu")
    for _ in range(2):
        assert np.array_equal(draw(offloaded), draw(pipe))
        assert hasattr(offloaded.transformer, "_hf_hook"), "the hooks are gone"


# Sizes.


def test_sizes_are_fitted_by_diffusers_own_rule(stock, monkeypatch: pytest.MonkeyPatch) -> None:
    class Seen(Exception):
        """Carries the size that stock diffusers made of the one it was asked for."""

    def prepare_latents(*args: Any) -> None:
        raise Seen(args[3], args[2])

    embeds = (torch.zeros(1, 1, 1), None, torch.zeros(1, 1, 1, 1), None, torch.zeros(1, 1), None)
    monkeypatch.setattr(stock, "encode_prompt", lambda **_: embeds)
    monkeypatch.setattr(stock, "prepare_latents", prepare_latents)
    random = np.random.default_rng(0)
    sizes = [*random.integers(16, 4096, (120, 2)).tolist()]
    sizes += [(side * step, side) for side in (16, 48, 64, 100, 256, 1024) for step in range(1, 9)]
    sizes += [(768, 1360), (1360, 768), (880, 1168), (1168, 880), (1248, 832), (832, 1248), (1280, 720)]
    for sample_size, factor in ((16, 4), (128, 8)):
        monkeypatch.setattr(stock, "default_sample_size", sample_size)
        monkeypatch.setattr(stock, "vae_scale_factor", factor)
        for width, height in sizes:
            with pytest.raises(Seen) as seen:
                stock(PROMPT, width=width, height=height, guidance_scale=0.0)
            if min(seen.value.args) == 0:
                continue
            assert fit_size(width, height, (sample_size * factor) ** 2, 2 * factor) == seen.value.args
