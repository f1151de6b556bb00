"""Drawings that begin with a picture: image-to-image and inpainting, with and without the cache."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

import calibrate
import inference
import sampling
from cache_functions import CacheConfig, Calibration
from hi_diffusers import SamplingOptions, generate, generate_batch, load_pipeline
from hi_diffusers.denoising.loop import Estimate
from hi_diffusers.denoising.schedulers import timed_scheduler
from hi_diffusers.denoising.start import Start, begin_at, first_step
from hi_diffusers.families.table import PRESETS
from hi_diffusers.pictures.inputs import InputPicture
from hi_diffusers.pictures.metadata import read_metadata
from hi_diffusers.pictures.metrics import psnr
from hi_diffusers.request.drawing import decide
from tests.tiny_folder import OTHER_PROMPT, PROMPT

OFF = CacheConfig.off()
CACHES = [
    OFF,
    CacheConfig(full_steps=3, schedule="power", exponent=1.0),
    CacheConfig(target="residual", full_steps=3, schedule="power", exponent=1.0),
    CacheConfig(target="velocity", full_steps=3, schedule="power", exponent=1.0, corrector=True),
    CacheConfig(target="x0", full_steps=3, schedule="power", exponent=1.0),
    CacheConfig.best(3),
]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """in.png, a picture with soft colours, and masks: left.png, its left half; soft.png, a ramp; white.png."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    low = rng.integers(0, 256, (8, 8, 3), np.uint8)
    Image.fromarray(low).resize((64, 64), Image.Resampling.BICUBIC).save(folder / "in.png")
    left = Image.new("L", (64, 64))
    ImageDraw.Draw(left).rectangle((0, 0, 31, 63), fill=255)
    left.save(folder / "left.png")
    ramp = np.clip(np.linspace(2, -1, 64), 0, 1)
    Image.fromarray((np.tile(ramp, (64, 1)) * 255).astype(np.uint8)).save(folder / "soft.png")
    Image.new("L", (64, 64), 255).save(folder / "white.png")
    return folder


def asked(files: Path, mask: str | None = None, **settings: Any) -> SamplingOptions:
    settings = {"seed": 7, "num_steps": 8, "guidance": 3.0, "image": files / "in.png"} | settings
    return SamplingOptions(PROMPT, mask_image=mask and files / mask, **settings)


def eight_bits(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"))


# Which steps are drawn.


@pytest.mark.parametrize(
    ("num_steps", "strength", "first"), [(50, 0.6, 20), (50, 1.0, 0), (28, 0.5, 14), (4, 0.25, 3), (7, 0.5, 4)]
)
def test_the_first_step_is_rounded(num_steps: int, strength: float, first: int) -> None:
    assert first_step(num_steps, strength) == first


def test_a_strength_that_leaves_no_step_is_refused(files: Path) -> None:
    with pytest.raises(ValueError, match=r"strength 0\.01 leaves none of 8 steps to draw"):
        asked(files, strength=0.01).resolve(PRESETS["nano"])


@pytest.mark.parametrize("name", ["unipc", "euler", "lcm"])
def test_a_scheduler_that_begins_later_has_the_same_levels(name: str) -> None:
    whole, cut = timed_scheduler(name, 3.0, 10), timed_scheduler(name, 3.0, 10)
    begin_at(cut, 4)
    assert torch.equal(cut.sigmas, whole.sigmas[4:]) and torch.equal(cut.timesteps, whole.timesteps[4:])


@pytest.mark.parametrize("name", ["unipc", "euler"])
def test_from_the_exact_picture_every_solver_returns_to_it(name: str) -> None:
    """The model's estimate is the picture itself at every step, so its path is a straight line."""
    scheduler = timed_scheduler(name, 3.0, 10, 4)
    scheduler.set_begin_index(0)
    picture, noise = torch.randn(2, 1, 4, 8, 8)
    latents = Start(picture).noised(noise, float(scheduler.sigmas[0]))
    for index, timestep in enumerate(scheduler.timesteps):
        velocity = (latents - picture) / scheduler.sigmas[index]
        latents = scheduler.step(velocity, timestep, latents, return_dict=False)[0]
    assert (latents - picture).abs().max() < 1e-4


# The picture.


@pytest.mark.parametrize("scheduler", ["unipc", "euler", "lcm"])
def test_strength_1_is_drawing_without_a_picture_byte_for_byte(tiny_pipe, files: Path, scheduler: str) -> None:
    settings = {"scheduler": scheduler, "width": 64, "height": 64}
    without = generate(tiny_pipe, asked(files, image=None, **settings), OFF)
    assert np.array_equal(generate(tiny_pipe, asked(files, strength=1.0, **settings), OFF).pixels, without.pixels)


def test_the_trace_holds_the_steps_that_are_drawn(tiny_pipe, files: Path) -> None:
    drawn = generate(tiny_pipe, asked(files, strength=0.5), CacheConfig(full_steps=2))
    assert [record.kind for record in drawn.trace] == ["full", "forecast", "full", "forecast"]
    assert [record.index for record in drawn.trace] == [0, 1, 2, 3]


def test_the_size_is_the_pictures_shape_unless_it_is_given(tiny_pipe, tmp_path: Path) -> None:
    Image.new("RGB", (200, 100), "red").save(tmp_path / "wide.png")
    options = SamplingOptions(PROMPT, image=tmp_path / "wide.png").resolve(PRESETS["nano"])
    assert (options.width, options.height) == (88, 40)
    square = SamplingOptions(PROMPT, image=tmp_path / "wide.png", width=64, height=64).resolve(PRESETS["nano"])
    assert (square.width, square.height, square.fit) == (64, 64, "cover")


@pytest.mark.parametrize("cache", CACHES, ids=lambda cache: str(cache.target or cache.schedule))
@pytest.mark.parametrize("mask", [None, "left.png", "soft.png"])
def test_what_is_black_in_the_mask_stays_to_8_bits(
    tiny_pipe, files: Path, cache: CacheConfig, mask: str | None
) -> None:
    drawn = generate(tiny_pipe, asked(files, mask, strength=0.75), cache)
    found, before = np.asarray(drawn.image), eight_bits(files / "in.png")
    kept = np.zeros((64, 64), bool) if mask is None else eight_bits(files / mask)[..., 0] == 0
    assert np.array_equal(found[kept], before[kept])
    assert not np.array_equal(found[~kept], before[~kept])


@pytest.mark.parametrize("scheduler", ["unipc", "euler", "lcm"])
@pytest.mark.parametrize(
    "cache", [OFF, CacheConfig(target="x0", full_steps=4, schedule="power", exponent=1.0)], ids=str
)
def test_the_rest_of_the_latents_is_the_picture_whatever_the_sampler_does(
    tiny_pipe, files: Path, scheduler: str, cache: CacheConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends: list[torch.Tensor] = []
    whole = type(tiny_pipe).decode
    monkeypatch.setattr(type(tiny_pipe), "decode", lambda pipe, x: (ends.append(x), whole(pipe, x))[1])
    generate(tiny_pipe, asked(files, "left.png", scheduler=scheduler, strength=0.75), cache)
    picture = tiny_pipe.encode_pictures(eight_bits(files / "in.png")[None].astype(np.float32) / 255)
    half = picture.shape[-1] // 2
    assert (ends[0] - picture)[..., half:].abs().max() < 1e-3
    assert (ends[0] - picture)[..., :half].abs().max() > 0.1


def test_a_white_mask_is_the_whole_picture(tiny_pipe, files: Path) -> None:
    masked, whole = asked(files, "white.png"), asked(files, strength=1.0)
    assert np.array_equal(generate(tiny_pipe, masked, OFF).pixels, generate(tiny_pipe, whole, OFF).pixels)


def test_a_black_mask_is_refused_before_anything_is_drawn(tiny_pipe, files: Path, tmp_path: Path) -> None:
    Image.new("L", (64, 64)).save(tmp_path / "black.png")
    with pytest.raises(ValueError, match="mask_image is black everywhere"):
        generate(tiny_pipe, SamplingOptions(PROMPT, image=files / "in.png", mask_image=tmp_path / "black.png"))


@pytest.mark.parametrize(
    ("scheduler", "cache"), [*(("unipc", cache) for cache in CACHES), *(("lcm", CACHES[i]) for i in (0, 4, 5))]
)
def test_a_batch_draws_what_each_would_be_alone(tiny_pipe, files: Path, cache: CacheConfig, scheduler: str) -> None:
    other = Image.open(files / "in.png").transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    settings = {"strength": 0.75, "scheduler": scheduler, "guidance": 0.0 if scheduler == "lcm" else 3.0}
    several = [
        asked(files, "left.png", **settings),
        asked(files, seed=8, image=other, **settings),
        asked(files, "soft.png", seed=9, **settings),
    ]
    together = generate_batch(tiny_pipe, several, cache)
    for alone, one in zip(several, together, strict=True):
        assert psnr(generate(tiny_pipe, alone, cache).pixels, one.pixels) > 80


def test_a_soft_mask_blends_pixels_once(tiny_pipe, files: Path) -> None:
    """It blended every step's estimate as well, and a half of grey changed 3 % of the way."""
    whole = generate(tiny_pipe, asked(files, strength=0.75), OFF).pixels
    grey = Image.new("L", (64, 64), 128)
    half = generate(tiny_pipe, replace(asked(files, strength=0.75), mask_image=grey), OFF).pixels
    before = eight_bits(files / "in.png").astype(np.float32) / 255
    assert np.abs(half - (128 * whole + 127 * before) / 255).max() < 1e-5


def test_a_mask_that_is_cut_off_is_refused() -> None:
    edge = Image.new("L", (200, 64))
    edge.paste(255, (0, 0, 4, 64))
    options = SamplingOptions(PROMPT, image=Image.new("RGB", (200, 64)), mask_image=edge, width=64, height=64)
    with pytest.raises(ValueError, match="mask_image is black everywhere"):
        options.resolve(PRESETS["nano"])


def test_what_has_no_effect_or_is_cut_off_is_said() -> None:
    wide = SamplingOptions(PROMPT, image=Image.new("RGB", (300, 60)), width=64, height=64, strength=1.0)
    notices = wide.resolve(PRESETS["nano"]).notices
    assert any("80% of the picture is cut off for 64x64" in one for one in notices)
    assert any("without a mask the picture has no effect: at strength 1" in one for one in notices)


def test_a_batch_of_two_strengths_is_refused(tiny_pipe, files: Path) -> None:
    with pytest.raises(ValueError, match="must be equal except prompt, seed and pictures"):
        generate_batch(tiny_pipe, [asked(files, strength=0.5), asked(files, strength=0.75)])


def test_the_networks_own_estimate_is_what_the_cache_keeps() -> None:
    picture, network = torch.zeros(1, 4, 2, 2), torch.ones(1, 4, 2, 2)
    drawn = torch.tensor([[[[1.0, 0.0], [0.5, 0.0]]]])
    latents = 2 * network

    def predict(latents: torch.Tensor, index: int) -> Estimate:
        return Estimate(network, (latents - network) / 0.5, "full")

    estimate = Start(picture, drawn).holding(predict, [0.5])(latents, 0)
    assert torch.equal(estimate.x0[0, 0], drawn[0, 0])
    assert torch.allclose(estimate.velocity, (latents - estimate.x0) / 0.5)


# What is asked for, and refused.


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image": None, "strength": 0.5}, "strength has no effect without an image"),
        ({"image": None, "fit": "pad"}, "fit has no effect without an image"),
        ({"strength": 0.0}, "strength 0 leaves none"),
        ({"strength": 1.5}, "strength must be a number from 0 to 1, got 1.5"),
        ({"fit": "stretch"}, "fit must be one of cover, pad, got 'stretch'"),
        ({"image": "in.png"}, r"image must be a pathlib\.Path or a PIL image, got 'in\.png'"),
    ],
)
def test_settings_out_of_range_are_refused(files: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        asked(files, **settings).resolve(PRESETS["nano"])


def test_metadata_names_pictures_by_their_hash(tiny_pipe, files: Path) -> None:
    options = generate(tiny_pipe, asked(files, "left.png", strength=0.5), OFF).metadata["options"]
    assert options["image"] == InputPicture.of(files / "in.png").sha256
    assert options["mask_image"] == InputPicture.of(files / "left.png", "mask_image").sha256
    assert (options["strength"], options["fit"]) == (0.5, "cover")
    assert "image" not in generate(tiny_pipe, asked(files, image=None), OFF).metadata["options"]


# The scripts.


def draw(*argv: Any) -> int:
    return inference.main([PROMPT, "--device", "cpu", "--num_steps", "8", *map(str, argv)])


def test_inference_draws_from_a_picture_and_again_like_it(
    nano_folder: Path, files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, again = tmp_path / "a.png", tmp_path / "b.png"
    inputs = ("--image", files / "in.png", "--mask", files / "left.png")
    assert draw(*inputs, "--strength", "0.5", "--seed", "3", "-o", first) == 0
    assert read_metadata(first)["options"]["strength"] == 0.5
    assert inference.main(["--like", str(first), "--device", "cpu", *map(str, inputs), "-o", str(again)]) == 0
    assert first.read_bytes() == again.read_bytes()
    capsys.readouterr()
    assert inference.main(["--like", str(first), "-o", str(again)]) == 2
    assert f"give --image FILE, the one whose SHA-256 is {InputPicture.of(files / 'in.png').sha256}" in (
        capsys.readouterr().err
    )


def test_another_picture_than_likes_is_said(
    nano_folder: Path, files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert draw("--image", files / "in.png", "-o", tmp_path / "a.png") == 0
    Image.new("RGB", (64, 64), "blue").save(tmp_path / "blue.png")
    argv = ["--like", tmp_path / "a.png", "--image", tmp_path / "blue.png", "-o", tmp_path / "b.png"]
    assert inference.main(["--device", "cpu", *map(str, argv)]) == 0
    assert "was drawn from another image than" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--mask", "left.png"), "--mask has no effect without an image"),
        (("--image", "in.png", "--mask", "small.png"), "--mask must have the image's size 64x64, got 32x32"),
        (("--image", "in.png", "--image", "in.png"), "--image must be given once without --pipeline, got 2"),
        (("--image", "in.png", "--mask", "none.png"), "--mask must be a PNG, JPEG or WebP picture, got none.png"),
        (("--image", "none.png"), "--image must be a PNG, JPEG or WebP picture, got none.png"),
        (("--mask", "0,4"), "must be a picture, got '0,4': full steps are given by --step_mask"),
    ],
)
def test_inference_refuses_in_one_line(
    files: Path,
    flags: tuple[str, ...],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(files)
    Image.new("L", (32, 32), 255).save(files / "small.png")
    try:
        assert draw(*flags) == 2
    except SystemExit as end:
        assert end.code == 2
    assert message in capsys.readouterr().err


def run(folder: Path, files: Path, lines: list[dict[str, Any]], *argv: Any) -> int:
    path = files / f"{folder.name}.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in lines))
    settings = ("--prompt_file", path, "--output_dir", folder, "--device", "cpu", "--num_steps", "6")
    return sampling.main([*map(str, settings), *map(str, argv)])


def manifest(folder: Path) -> list[dict[str, Any]]:
    (path,) = folder.glob("manifest*.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_prompt_file_names_pictures(nano_folder: Path, files: Path, tmp_path: Path) -> None:
    lines = [
        {"prompt": PROMPT, "image": "in.png", "strength": 0.5},
        {"prompt": OTHER_PROMPT, "image": "in.png", "mask": "left.png"},
        {"prompt": PROMPT},
    ]
    assert run(tmp_path / "run", files, lines, "--batch_size", "2") == 0
    options = {line["index"]: line["options"] for line in manifest(tmp_path / "run")}
    assert options[0]["image"] == InputPicture.of(files / "in.png").sha256 and options[0]["strength"] == 0.5
    assert options[1]["mask_image"] == InputPicture.of(files / "left.png", "mask_image").sha256
    assert "image" not in options[2]


def test_strength_and_fit_serve_the_lines_that_have_pictures(
    nano_folder: Path, files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = {"image": "in.png"}
    lines = [{"prompt": PROMPT} | image, {"prompt": OTHER_PROMPT}, {"prompt": PROMPT, "strength": 1} | image]
    assert run(tmp_path / "run", files, lines, "--strength", "0.5", "--fit", "pad") == 0
    options = {line["index"]: line["options"] for line in manifest(tmp_path / "run")}
    assert (options[0]["strength"], options[0]["fit"], options[2]["strength"]) == (0.5, "pad", 1)
    assert "strength" not in options[1]
    assert run(tmp_path / "other", files, [{"prompt": PROMPT}], "--strength", "0.5") == 2
    assert "--strength has no effect: no line of" in capsys.readouterr().err


def test_a_prompt_files_pictures_lie_in_its_folder(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for outside in ("../in.png", "/etc/hostname"):
        assert run(tmp_path / "run", files, [{"prompt": PROMPT, "image": outside}]) == 2
        assert f"image must lie in the prompt file's folder, got '{outside}'" in capsys.readouterr().err


def test_a_run_is_not_resumed_from_changed_pictures(
    nano_folder: Path, files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = files / "changing.png"
    Image.new("RGB", (64, 64), "red").save(path)
    lines = [{"prompt": PROMPT, "image": "changing.png"}]
    assert run(tmp_path / "run", files, lines) == 0
    assert run(tmp_path / "run", files, lines) == 0
    Image.new("RGB", (64, 64), "blue").save(path)
    capsys.readouterr()
    assert run(tmp_path / "run", files, lines) == 2
    assert "images" in capsys.readouterr().err


# The bundled model.


@pytest.fixture(scope="module")
def nano(nano_folder: Path) -> Any:
    return load_pipeline("nano", device="cpu")


def test_nf4_weights_keep_the_rest_as_well(nano_folder: Path, files: Path) -> None:
    packed = load_pipeline("nano", device="cpu", quantization="nf4")
    drawn = generate(packed, asked(files, "left.png", guidance=2.0), CacheConfig(full_steps=2))
    assert np.array_equal(np.asarray(drawn.image)[:, 32:], eight_bits(files / "in.png")[:, 32:])


def test_the_bundled_solvers_are_taken_at_their_strengths(nano: Any, files: Path) -> None:
    for strength, first in ((0.4, 30), (0.6, 20), (0.8, 10)):
        drawing = decide(
            nano.preset, SamplingOptions(PROMPT, image=files / "in.png", strength=strength), None, nano.calibrations
        )
        assert drawing.cache.target == "solver" and drawing.cache.calibration.key.first_step == first
    between = SamplingOptions(PROMPT, image=files / "in.png", strength=0.5)
    drawing = decide(nano.preset, between, None, nano.calibrations)
    assert drawing.cache.target == "velocity" and "first_step" in drawing.notices[-1]


def test_compare_draws_both_from_the_picture(nano_folder: Path, files: Path, tmp_path: Path) -> None:
    inputs = ("--image", files / "in.png", "--strength", "0.75", "--cache", "taylorseer", "--full_steps", "2")
    assert draw(*inputs, "--compare", "-o", tmp_path / "a.png") == 0
    found = {read_metadata(tmp_path / name)["options"]["image"] for name in ("a.png", "a_uncached.png")}
    assert found == {InputPicture.of(files / "in.png").sha256}


def test_calibrate_fits_a_solver_from_the_first_step_that_is_drawn(
    nano_folder: Path, files: Path, tmp_path: Path
) -> None:
    prompts = files / "calibrate.jsonl"
    lines = [{"prompt": prompt, "image": "in.png"} for prompt in (PROMPT, OTHER_PROMPT, PROMPT + ".")]
    prompts.write_text("\n".join(json.dumps(line) for line in lines))
    flags = ("--strength", "0.5", "--num_steps", "8", "--full_steps", "2", "--num_held_out", "1", "--seed", "3")
    argv = ["--device", "cpu", "--prompt_file", prompts, "--calibration_dir", tmp_path, *flags]
    assert calibrate.main([str(one) for one in argv]) == 0
    (path,) = tmp_path.glob("*.json")
    assert path.name == "nano-unipc8-guidance2-from4-solver.json"
    found = Calibration.read(path)
    assert (found.key.first_step, len(found.sigmas), found.solver(2).full_steps[0]) == (4, 5, 0)
    drawn = draw(
        "--image",
        files / "in.png",
        "--strength",
        "0.5",
        "--full_steps",
        "2",
        "--seed",
        "1",
        "--calibration_dir",
        tmp_path,
        "-o",
        tmp_path / "a.png",
    )
    assert drawn == 0 and read_metadata(tmp_path / "a.png")["cache"]["target"] == "solver"


def test_calibrate_fits_forecasts_from_there_for_samplers_that_add_noise(
    nano_folder: Path, files: Path, tmp_path: Path
) -> None:
    flags = ("-m", "nano-fast", "--num_prompts", "3", "--num_held_out", "1", "--strength", "0.5", "--full_steps", "3")
    argv = ["--device", "cpu", "--image", files / "in.png", "--calibration_dir", tmp_path, *flags]
    assert calibrate.main([str(one) for one in argv]) == 0
    (path,) = tmp_path.glob("*.json")
    assert Calibration.read(path).matrix.shape == (8, 8)


def test_like_with_another_strength_chooses_the_cache_anew(
    nano_folder: Path, files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = tmp_path / "a.png"
    flags = ["--device", "cpu", "--image", str(files / "in.png")]
    assert inference.main([PROMPT, *flags, "--strength", "0.4", "--full_steps", "4", "-o", str(first)]) == 0
    again = ["--like", str(first), *flags, "--strength", "0.3", "-o", str(tmp_path / "b.png")]
    assert inference.main(again) == 0
    assert "does not fit these settings and is chosen anew" in capsys.readouterr().err


@pytest.mark.slow
def test_strength_leads_from_the_picture_to_a_new_one(nano: Any) -> None:
    from benchmarks.starts import Pictures

    pictures, medians = Pictures(nano, 32), []
    for strength in (0.2, 0.4, 0.6, 0.8, 1.0):
        drawn = pictures.draw(CacheConfig.best(), strength=strength)
        before = [np.asarray(one.pixels(), np.float32) / 255 for one in pictures.inputs]
        medians.append(float(np.median([psnr(a, b) for a, b in zip(drawn, before, strict=True)])))
    assert medians == sorted(medians, reverse=True) and len(set(medians)) == 5


def test_the_bundled_vae_returns_a_picture(nano: Any) -> None:
    from benchmarks.starts import Pictures

    before = np.stack([np.asarray(one.pixels(), np.float32) / 255 for one in Pictures(nano, 16).inputs])
    after = nano.decode(nano.encode_pictures(before))
    assert np.median([psnr(a, b) for a, b in zip(after, before, strict=True)]) > 30
