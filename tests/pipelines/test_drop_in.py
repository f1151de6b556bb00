"""The pipeline stands where diffusers' does: its classes, its arguments, its folders; and it knows its model."""

import warnings
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from cache_functions import CacheConfig
from hi_diffusers import HiDreamImagePipeline, HiDreamImageTransformer2DModel, SamplingOptions, generate, load_pipeline
from hi_diffusers.pictures.metadata import read_metadata

PROMPT = "a red circle on a blue background"
CALL: dict[str, Any] = {"num_inference_steps": 3, "guidance_scale": 2.0, "max_sequence_length": 32, "output_type": "np"}


def draw(pipe: Any, **more: Any) -> np.ndarray:
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(1)
    picture: np.ndarray = pipe(**({"prompt": PROMPT} | CALL | more), generator=generator).images[0]
    return picture


@pytest.fixture(scope="module")
def plain(tiny_folder: Path) -> np.ndarray:
    return draw(HiDreamImagePipeline.from_pretrained(tiny_folder))


# Classes.


def test_diffusers_own_transformer_becomes_ours_over_the_same_tensors(tiny_folder: Path, plain: np.ndarray) -> None:
    stock = diffusers.HiDreamImageTransformer2DModel.from_pretrained(tiny_folder / "transformer")
    pipe = HiDreamImagePipeline.from_pretrained(tiny_folder, transformer=stock)
    assert isinstance(pipe.transformer, HiDreamImageTransformer2DModel)
    weight = "x_embedder.proj.weight"
    assert pipe.transformer.get_parameter(weight).data_ptr() == stock.get_parameter(weight).data_ptr()
    assert np.array_equal(draw(pipe), plain)


def test_from_pipe_takes_a_stock_pipeline(tiny_folder: Path, plain: np.ndarray) -> None:
    stock = diffusers.HiDreamImagePipeline.from_pretrained(
        tiny_folder, text_encoder_4=HiDreamImagePipeline.from_pretrained(tiny_folder).text_encoder_4
    )
    assert np.array_equal(draw(HiDreamImagePipeline.from_pipe(stock)), plain)


def test_a_stock_pipeline_takes_ours(tiny_folder: Path) -> None:
    ours = HiDreamImagePipeline.from_pretrained(tiny_folder)
    stock = diffusers.HiDreamImagePipeline.from_pipe(ours, transformer=ours.transformer)
    assert type(stock) is diffusers.HiDreamImagePipeline
    assert draw(stock, num_inference_steps=1, width=64, height=64).ndim == 3


@pytest.mark.parametrize("suffix", [".safetensors"])
def test_from_single_file_reads_the_transformer_alone(
    suffix: str, tiny_folder: Path, tmp_path: Path, plain: np.ndarray
) -> None:
    whole = HiDreamImageTransformer2DModel.from_pretrained(tiny_folder / "transformer")
    save_file({f"model.diffusion_model.{k}": v for k, v in whole.state_dict().items()}, tmp_path / f"a{suffix}")
    read = HiDreamImageTransformer2DModel.from_single_file(tmp_path / f"a{suffix}", config=tiny_folder / "transformer")
    assert np.array_equal(draw(HiDreamImagePipeline.from_pretrained(tiny_folder, transformer=read)), plain)


# Arguments.


def test_without_a_dtype_everything_is_fp32(tiny_folder: Path, tmp_path: Path) -> None:
    HiDreamImagePipeline.from_pretrained(tiny_folder, dtype=torch.bfloat16).save_pretrained(tmp_path / "bf16")
    pipe = HiDreamImagePipeline.from_pretrained(tmp_path / "bf16")
    models = {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    assert {name: part.dtype for name, part in models.items()} == dict.fromkeys(models, torch.float32)


@pytest.mark.parametrize(
    ("dtype", "found"),
    [
        (torch.bfloat16, {"transformer": torch.bfloat16, "text_encoder_4": torch.bfloat16, "vae": torch.bfloat16}),
        ({"transformer": torch.bfloat16}, {"transformer": torch.bfloat16, "text_encoder_4": torch.float32}),
        ({"text_encoder_4": torch.bfloat16, "default": torch.float16}, {"transformer": torch.float16}),
    ],
)
def test_a_dtype_reaches_every_component(dtype: Any, found: dict[str, torch.dtype], tiny_folder: Path) -> None:
    pipe = HiDreamImagePipeline.from_pretrained(tiny_folder, torch_dtype=dtype)
    assert {name: getattr(pipe, name).dtype for name in found} == found


def test_a_variant_is_asked_of_every_component(tiny_folder: Path, tmp_path: Path, plain: np.ndarray) -> None:
    HiDreamImagePipeline.from_pretrained(tiny_folder).save_pretrained(tmp_path / "v", variant="fp16")
    assert np.array_equal(draw(HiDreamImagePipeline.from_pretrained(tmp_path / "v", variant="fp16")), plain)
    with pytest.raises(OSError, match="no file named"):
        HiDreamImagePipeline.from_pretrained(tmp_path / "v")


@pytest.mark.parametrize("part", ["transformer", "text_encoder_4"])
def test_a_quantization_reaches_the_components_that_are_loaded_here(part: str, tiny_folder: Path) -> None:
    settings = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    config = diffusers.PipelineQuantizationConfig(
        quant_backend="bitsandbytes_4bit", quant_kwargs=settings, components_to_quantize=[part]
    )
    try:
        pipe = HiDreamImagePipeline.from_pretrained(tiny_folder, quantization_config=config)
    except (RuntimeError, ImportError, OSError) as error:
        pytest.skip(f"bitsandbytes quantizes through diffusers on a GPU only: {error}")
    kinds = {type(layer).__name__ for layer in getattr(pipe, part).modules()}
    assert "Linear4bit" in kinds, f"{part} was asked for in 4 bits"


def test_a_device_map_that_names_a_device_is_kept(tiny_folder: Path, plain: np.ndarray) -> None:
    assert np.array_equal(draw(HiDreamImagePipeline.from_pretrained(tiny_folder, device_map="cpu")), plain)


def test_a_device_map_that_spreads_components_is_refused(tiny_folder: Path) -> None:
    with pytest.raises(ValueError, match='device_map "balanced" is not supported'):
        HiDreamImagePipeline.from_pretrained(tiny_folder, device_map="balanced")


@pytest.mark.parametrize("absent", [("text_encoder_4", "tokenizer_4"), ("vae",), ("transformer", "text_encoder_3")])
def test_a_component_that_is_none_is_saved_and_loaded_as_none(
    absent: tuple[str, ...], tiny_folder: Path, tmp_path: Path
) -> None:
    pipe = HiDreamImagePipeline.from_pretrained(tiny_folder, **dict.fromkeys(absent))
    pipe.save_pretrained(tmp_path / "model")
    again = HiDreamImagePipeline.from_pretrained(tmp_path / "model")
    assert {name for name, part in again.components.items() if part is None} == set(absent)
    parts = {name: getattr(HiDreamImagePipeline.from_pretrained(tiny_folder), name) for name in absent}
    whole = HiDreamImagePipeline.from_pretrained(tmp_path / "model", **parts)
    assert draw(whole).shape == draw(HiDreamImagePipeline.from_pretrained(tiny_folder)).shape


@pytest.mark.parametrize("offload_type", ["block_level", "leaf_level"])
def test_groups_are_offloaded_to_disk(offload_type: str, tiny_folder: Path, tmp_path: Path, plain: np.ndarray) -> None:
    pipe = HiDreamImagePipeline.from_pretrained(tiny_folder)
    more = {"num_blocks_per_group": 1} if offload_type == "block_level" else {}
    pipe.transformer.enable_group_offload(
        torch.device("cpu"), offload_type=offload_type, offload_to_disk_path=str(tmp_path / "disk"), **more
    )
    assert np.array_equal(draw(pipe), plain)
    assert list((tmp_path / "disk").iterdir()), "nothing was written"


def test_what_diffusers_tells_of_a_pipeline_holds(tiny_folder: Path, plain: np.ndarray) -> None:
    pipe = HiDreamImagePipeline.from_pretrained(tiny_folder)
    assert set(pipe.components) == set(HiDreamImagePipeline._get_signature_keys(HiDreamImagePipeline)[0])
    assert np.array_equal(draw(HiDreamImagePipeline(**pipe.components)), plain)
    pipe.register_to_config(note="kept")
    assert pipe.config.note == "kept"


def test_a_pipeline_without_llama_says_so_before_it_encodes(tiny_folder: Path) -> None:
    pipe = HiDreamImagePipeline.from_pretrained(tiny_folder, text_encoder_4=None, tokenizer_4=None)
    with pytest.raises(ValueError, match="tokenizer_4 is missing"):
        draw(pipe)


def test_the_deprecated_embeddings_are_taken(tiny_folder: Path, plain: np.ndarray) -> None:
    pipe = HiDreamImagePipeline.from_pretrained(tiny_folder)
    t5, negative_t5, llama, negative_llama, pooled, negative_pooled = pipe.encode_prompt(
        PROMPT, do_classifier_free_guidance=True, max_sequence_length=32
    )
    texts = {"pooled_prompt_embeds": pooled, "negative_pooled_prompt_embeds": negative_pooled}
    again = draw(
        pipe, prompt=None, prompt_embeds=[t5, llama], negative_prompt_embeds=[negative_t5, negative_llama], **texts
    )
    assert np.allclose(again, plain, atol=1e-5)


# A pipeline knows its model.


def test_a_pipeline_from_a_folder_knows_its_model_and_draws_what_load_pipeline_draws(nano_folder: Path) -> None:
    options, cache = SamplingOptions(PROMPT, seed=3), CacheConfig.best(13)
    ours = generate(HiDreamImagePipeline.from_pretrained(nano_folder), options, cache)
    loaded = generate(load_pipeline("nano", device="cpu"), options, cache)
    assert ours.metadata == loaded.metadata and np.array_equal(ours.pixels, loaded.pixels)
    assert ours.metadata["cache"]["target"] == "solver", "its calibrations were not found"


@pytest.mark.parametrize(
    ("scheduler", "name"),
    [
        (diffusers.UniPCMultistepScheduler(use_flow_sigmas=True, flow_shift=3.0), "nano"),
        (diffusers.FlowMatchLCMScheduler(shift=6.0), "nano-dev"),
        (diffusers.FlowMatchLCMScheduler(shift=3.0), "nano-fast"),
    ],
)
def test_the_folder_s_scheduler_tells_the_presets_apart(
    scheduler: Any, name: str, tiny_folder: Path, tmp_path: Path
) -> None:
    HiDreamImagePipeline.from_pretrained(tiny_folder, scheduler=scheduler).save_pretrained(tmp_path / "model")
    preset = HiDreamImagePipeline.from_pretrained(tmp_path / "model").preset
    assert preset is not None and preset.name == name


def test_what_the_command_line_says_python_is_warned_of(tiny_pipe: HiDreamImagePipeline) -> None:
    options = SamplingOptions("a red zebra", seed=1, num_steps=2, width=1000, height=1000)
    with pytest.warns(UserWarning) as warned:
        generate(tiny_pipe, options, CacheConfig.off())
    said = [str(one.message) for one in warned]
    assert any("1000x1000 is drawn as 64x64" in one for one in said)
    assert any("does not know 'zebra'" in one for one in said)
    assert {one.filename for one in warned} == {__file__}, "a warning names the caller's line"


def test_a_picture_is_saved_with_what_made_it(tiny_pipe: HiDreamImagePipeline, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = generate(tiny_pipe, SamplingOptions(PROMPT, seed=1, num_steps=2), CacheConfig.off())
    for suffix in (".png", ".jpg", ".webp"):
        out.save(tmp_path / f"a{suffix}")
        assert read_metadata(tmp_path / f"a{suffix}") == out.metadata
