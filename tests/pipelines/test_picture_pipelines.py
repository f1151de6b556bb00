"""The pipelines that start from a picture stand where diffusers' would: arguments, forms of pictures, from_pipe."""

import inspect
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from cache_functions import CacheConfig
from hi_diffusers import (
    HiDreamImagePipeline,
    HiDreamImageToImagePipeline,
    HiDreamInpaintPipeline,
    SamplingOptions,
    generate,
    load_pipeline,
)

PROMPT = "a red circle on a blue background"
CALL: dict[str, Any] = {"num_inference_steps": 4, "guidance_scale": 2.0, "max_sequence_length": 32, "output_type": "np"}
ONLY_FLUX = ("true_cfg_scale", "joint_attention_kwargs", "masked_image_latents", "padding_mask_crop")


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    low = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    return Image.fromarray(low).resize((64, 64), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def mask() -> Image.Image:
    left = Image.new("L", (64, 64))
    ImageDraw.Draw(left).rectangle((0, 0, 31, 63), fill=255)
    return left


@pytest.fixture(scope="module")
def pipe(tiny_folder: Path) -> HiDreamImageToImagePipeline:
    return HiDreamImageToImagePipeline.from_pretrained(tiny_folder)


@pytest.fixture(scope="module")
def inpaint(pipe: HiDreamImageToImagePipeline) -> HiDreamInpaintPipeline:
    return HiDreamInpaintPipeline.from_pipe(pipe)


def draw(pipe: Any, **more: Any) -> np.ndarray:
    pipe.set_progress_bar_config(disable=True)
    settings = {"prompt": PROMPT, "generator": torch.Generator().manual_seed(1)} | CALL | more
    found: np.ndarray = pipe(**settings).images
    return found


@pytest.mark.parametrize(
    ("ours", "flux"),
    [
        (HiDreamImageToImagePipeline, diffusers.FluxImg2ImgPipeline),
        (HiDreamInpaintPipeline, diffusers.FluxInpaintPipeline),
    ],
)
def test_arguments_stand_in_the_order_of_fluxs(ours: type, flux: type) -> None:
    mine, theirs = (list(inspect.signature(one.__call__).parameters) for one in (ours, flux))
    shared = [name for name in theirs if name in mine]
    assert [name for name in mine if name in theirs] == shared
    missing = [name for name in theirs if name not in mine and not name.startswith(("ip_adapter", "negative_ip"))]
    assert set(missing) <= {*ONLY_FLUX, "prompt_embeds", "negative_prompt_embeds"}  # ours are by encoder
    defaults = (inspect.signature(one.__call__).parameters["strength"].default for one in (ours, flux))
    assert len(set(defaults)) == 1


def test_it_draws_what_generate_draws(tiny_folder: Path, pipe: Any, inpaint: Any, picture: Any, mask: Any) -> None:
    model = load_pipeline("nano", device="cpu", model_path=tiny_folder)
    options = SamplingOptions(
        PROMPT, seed=1, num_steps=4, guidance=2.0, max_sequence_length=32, image=picture, strength=0.5
    )
    expected = generate(model, options, CacheConfig.off()).pixels
    assert np.abs(draw(pipe, image=picture, strength=0.5)[0] - expected).max() < 1e-6
    masked = SamplingOptions(**{**vars(options), "mask_image": mask})
    expected = generate(model, masked, CacheConfig.off()).pixels
    assert np.abs(draw(inpaint, image=picture, mask_image=mask, strength=0.5)[0] - expected).max() < 1e-6


def test_a_picture_may_have_every_form(pipe: Any, inpaint: Any, picture: Image.Image, mask: Image.Image) -> None:
    array = np.asarray(picture)
    tensor = torch.from_numpy(array / 255).movedim(-1, 0).float()
    plain = draw(pipe, image=picture)
    forms = (array, array[None], array.astype(np.float32) / 255, tensor, tensor[None], [picture], [tensor])
    assert all(np.abs(draw(pipe, image=one) - plain).max() < 1e-4 for one in forms)
    masked = draw(inpaint, image=picture, mask_image=mask)
    half = torch.from_numpy(np.asarray(mask) / 255).float()
    for one in (np.asarray(mask), half, half[None, None]):
        assert np.abs(draw(inpaint, image=picture, mask_image=one) - masked).max() < 1e-4


def test_one_picture_serves_all_prompts_or_each_has_its_own(pipe: Any, picture: Image.Image) -> None:
    other = picture.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    both = draw(pipe, prompt=[PROMPT] * 2, image=[picture, other], generator=generators)
    assert np.abs(both[0] - draw(pipe, image=picture)[0]).max() < 1e-4
    alone = draw(pipe, image=other, generator=torch.Generator().manual_seed(2))
    assert np.abs(both[1] - alone[0]).max() < 1e-4


@pytest.mark.parametrize("output_type", ["pil", "pt", "np", "latent"])
def test_every_kind_of_output_keeps_the_rest(inpaint: Any, picture: Any, mask: Any, output_type: str) -> None:
    found = draw(inpaint, image=picture, mask_image=mask, output_type=output_type)
    if output_type == "latent":
        before = inpaint.encode_pictures(np.asarray(picture, np.float32)[None] / 255)
        half = before.shape[-1] // 2
        assert (found - before)[..., half:].abs().max() < 1e-3 < (found - before)[..., :half].abs().max()
        return
    if output_type == "pt":
        found = found.movedim(1, -1).numpy()
    whole = np.asarray(found[0]) if output_type == "pil" else (np.asarray(found[0]) * 255).round()
    assert np.array_equal(whole[:, 32:], np.asarray(picture)[:, 32:])


def test_the_cache_is_used_from_the_first_step_that_is_drawn(pipe: Any, picture: Image.Image) -> None:
    cached = draw(pipe, image=picture, num_inference_steps=8, strength=0.75, cache=CacheConfig(full_steps=2))
    uncached = draw(pipe, image=picture, num_inference_steps=8, strength=0.75)
    assert np.abs(cached - uncached).max() > 0


def test_from_pipe_goes_between_all_of_ours_and_diffusers(
    tiny_folder: Path, pipe: Any, inpaint: Any, picture: Image.Image, mask: Image.Image
) -> None:
    plain = HiDreamImagePipeline.from_pipe(pipe)
    stock = diffusers.HiDreamImagePipeline.from_pipe(inpaint, transformer=inpaint.transformer)
    assert type(stock) is diffusers.HiDreamImagePipeline
    expected = draw(pipe, image=picture)
    for other in (plain, stock, inpaint):
        again = HiDreamImageToImagePipeline.from_pipe(other)
        assert np.array_equal(draw(again, image=picture), expected)
    assert np.array_equal(draw(HiDreamImagePipeline.from_pipe(inpaint)), draw(plain))
    assert HiDreamInpaintPipeline.from_pipe(stock).transformer is not None


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({}, "image must be given"),
        ({"image": "in.png"}, "image must be a PIL image, an array, a tensor or a list of them, got str"),
        ({"image": np.zeros((64, 64))}, r"image must have the shape \[H,W,3\]"),
        ({"image": np.full((64, 64, 3), 300.0)}, "image must hold numbers from 0 to 1"),
        ({"image": np.full((64, 64, 3), np.nan)}, "image must hold numbers from 0 to 1"),
        ({"image": []}, "image must be one picture or more, got an empty list"),
        ({"image": np.zeros((64, 64, 4))}, r"image must have the shape \[H,W,3\]"),
        ({"image": np.zeros((64, 64, 3)), "strength": 1.5}, r"strength must be a number above 0 to 1, got 1\.5"),
        ({"image": np.zeros((64, 64, 3)), "strength": float("nan")}, "strength must be a number above 0 to 1, got nan"),
        ({"image": np.zeros((32, 32, 3)), "width": 64, "height": 64}, "image must have 64x64 pixels, got 32x32"),
        ({"image": [np.zeros((64, 64, 3))] * 2}, "image must be one picture, or one for each of 1, got 2"),
        ({"image": np.zeros((64, 64, 3)), "strength": 0.01}, r"strength 0\.01 leaves none of 4 steps"),
    ],
)
def test_what_cannot_be_drawn_from_is_refused(pipe: Any, more: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draw(pipe, **more)


def test_masks_are_checked_in_every_form(inpaint: Any, picture: Image.Image) -> None:
    with pytest.raises(ValueError, match="mask_image is black everywhere"):
        draw(inpaint, image=picture, mask_image=np.zeros((64, 64)))
    with pytest.raises(ValueError, match="mask_image must have the image's size 64x64, got 32x32"):
        draw(inpaint, image=picture, mask_image=[np.ones((64, 64)), np.ones((32, 32))])


def test_own_sigmas_tell_the_number_of_steps(pipe: Any, picture: Image.Image) -> None:
    euler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    other = HiDreamImageToImagePipeline.from_pipe(pipe, scheduler=euler)
    drawn = draw(other, image=picture, sigmas=[0.9, 0.7, 0.4, 0.2], num_inference_steps=50, strength=0.5)
    assert drawn.shape == (1, 64, 64, 3) and len(euler.timesteps) == 2


def test_a_mask_is_needed_to_inpaint(inpaint: Any, picture: Image.Image) -> None:
    with pytest.raises(ValueError, match="mask_image must be given"):
        draw(inpaint, image=picture)
