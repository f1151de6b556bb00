"""inference.py --pipeline: pictures, edits, classes and videos, and what is refused, in one line each."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from hi_diffusers.commands.inference import main
from hi_diffusers.pictures.metadata import read_metadata
from hi_diffusers.stock import formats
from tests.stock.conftest import sha256

FLUX = ("--resolution", "64x64", "--num_steps", "12", "--full_steps", "4")
WAN = ("--resolution", "32x32", "--num_frames", "5", "--num_steps", "12", "--full_steps", "4")


def run(*argv: object) -> int:
    return main([str(one) for one in argv])


def test_a_picture_carries_its_settings_and_is_the_same_again(
    folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a.png", "b.png"):
        assert run("--pipeline", folders / "flux", *FLUX, "--seed", 7, "-o", tmp_path / name, "a red circle") == 0
    out = capsys.readouterr().out
    assert "12 steps: 4 full, 8 forecast, 4 calls of the denoiser" in out
    assert sha256(tmp_path / "a.png") == sha256(tmp_path / "b.png")
    metadata = read_metadata(tmp_path / "a.png")
    assert metadata["model"]["class"] == "FluxPipeline" and len(metadata["model"]["fingerprint"]) == 16
    assert metadata["options"]["prompt"] == "a red circle" and metadata["options"]["seed"] == 7
    assert metadata["options"]["guidance"] == 3.5, "the pipeline's own default is recorded"
    assert metadata["cache"]["target"] == "velocity"
    assert run("--pipeline", folders / "flux", *FLUX, "--seed", 8, "-o", tmp_path / "c.png", "a red circle") == 0
    assert sha256(tmp_path / "a.png") != sha256(tmp_path / "c.png")


@pytest.mark.parametrize("target", ["velocity", "x0", "module"])
def test_every_target_is_drawn_and_compared(
    folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], target: str
) -> None:
    flags = ("--target", target, "--compare", "--seed", 1, "-o", tmp_path / "a.webp")
    assert run("--pipeline", folders / "flux", *FLUX, *flags, "a star") == 0
    out = capsys.readouterr().out
    assert "speedup:" in out and "PSNR" in out
    assert {path.name for path in tmp_path.iterdir()} == {"a.webp", "a_uncached.webp", "a_compare.png"}


@pytest.mark.parametrize("suffix", [".mp4", ".webp"])
def test_a_video_plays_and_its_settings_lie_beside_it(folders: Path, tmp_path: Path, suffix: str) -> None:
    imageio_ffmpeg = pytest.importorskip("imageio_ffmpeg")
    path = tmp_path / f"a{suffix}"
    assert run("--pipeline", folders / "wan", *WAN, "--seed", 1, "-o", path, "a red circle") == 0
    beside = json.loads((tmp_path / f"a{suffix}.json").read_text())
    assert beside["frames"] == 5 and beside["options"]["fps"] == 16 and len(beside["frames_sha256"]) == 64
    if suffix == ".mp4":
        reader = imageio_ffmpeg.read_frames(str(path))
        assert next(reader)["fps"] == 16
        frames = [np.frombuffer(one, np.uint8).reshape(32, 32, 3) for one in reader]
    else:
        with Image.open(path) as opened:
            frames = []
            for number in range(opened.n_frames):
                opened.seek(number)
                frames.append(np.asarray(opened.convert("RGB")))
    assert len(frames) == 5
    assert not np.array_equal(frames[0], frames[4]), "a video whose frames are all the same shows nothing"


def test_both_forms_of_a_video_hold_the_same_frames(folders: Path, tmp_path: Path) -> None:
    pytest.importorskip("imageio_ffmpeg")
    hashes = set()
    for name in ("a.mp4", "b.webp"):
        assert run("--pipeline", folders / "wan", *WAN, "--seed", 1, "-o", tmp_path / name, "a red circle") == 0
        hashes.add(json.loads((tmp_path / f"{name}.json").read_text())["frames_sha256"])
    assert len(hashes) == 1


def test_a_video_is_compared_over_all_frames(folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.webp"
    assert run("--pipeline", folders / "wan", *WAN, "--seed", 1, "--compare", "-o", path, "a red circle") == 0
    assert "over all frames" in capsys.readouterr().out


def test_an_edit_starts_from_its_picture(folders: Path, tmp_path: Path, picture: Path) -> None:
    other = tmp_path / "other.png"
    Image.new("RGB", (64, 64), "green").save(other)
    hashes = {}
    for one in (picture, other):
        path = tmp_path / f"out-{one.stem}.png"
        flags = ("--image", one, "--num_steps", 6, "--full_steps", 3, "--seed", 1, "-o", path)
        assert run("--pipeline", folders / "qwen-image-edit", "--resolution", "64x64", *flags, "make it blue") == 0
        hashes[one.stem] = sha256(path)
        assert read_metadata(path)["options"]["images"] == [sha256(one)]
    assert len(set(hashes.values())) == 2


def test_a_class_is_given_by_number_or_name(folders: Path, tmp_path: Path) -> None:
    for name, prompt in (("a.png", "1"), ("b.png", "goldfish"), ("c.png", "Tench")):
        flags = ("--num_steps", 12, "--full_steps", 4, "--seed", 1, "-o", tmp_path / name)
        assert run("--pipeline", folders / "dit", *flags, prompt) == 0
    pixels = {name: np.asarray(Image.open(tmp_path / name)) for name in ("a.png", "b.png", "c.png")}
    assert np.array_equal(pixels["a.png"], pixels["b.png"]) and not np.array_equal(pixels["a.png"], pixels["c.png"])


def test_several_seeds_are_several_files(folders: Path, tmp_path: Path) -> None:
    flags = ("--num_images", 2, "--seed", 5, "-o", tmp_path / "a.png")
    assert run("--pipeline", folders / "flux", *FLUX, *flags, "a star") == 0
    assert {path.name for path in tmp_path.iterdir()} == {"a-5.png", "a-6.png"}


def test_a_hidream_folder_is_drawn_by_our_own_pipeline(
    nano_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--num_steps", 6, "--seed", 1, "--cache", "off")
    assert run("--pipeline", nano_folder, *flags, "-o", tmp_path / "a.png", "a red circle") == 0
    assert run(*flags, "-o", tmp_path / "b.png", "a red circle") == 0
    assert sha256(tmp_path / "a.png") == sha256(tmp_path / "b.png")


REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "an option of others": (("dit", "--width", 64, "goldfish"), "--width is not taken by DiTPipeline, which takes"),
    "frames of a picture": (("flux", "--num_frames", 5, "a"), "--num_frames is not taken by FluxPipeline"),
    "a flag of ours": (("flux", "--scheduler", "euler", "a"), "--scheduler has no effect with --pipeline"),
    "a model of ours": (("flux", "-m", "full", "a"), "--model_type has no effect with --pipeline"),
    "nf4": (("flux", "--quantization", "nf4", "a"), "--quantization has no effect with --pipeline"),
    "a size": (("flux", "--width", 60, "a"), "--width must be a multiple of 16"),
    "frames": (("wan", "--num_frames", 6, "a"), "--num_frames must be a multiple of 4, plus one"),
    "no picture": (("qwen-image-edit", "a"), "--image must be given"),
    "no such picture": (("qwen-image-edit", "--image", "none.png", "a"), "--image must be a PNG, JPEG or WebP"),
    "a class": (("dit", "cat"), "--prompt must be a class's number or name, such as 'tench'"),
    "a class's number": (("dit", "7"), "--prompt must be a class's number or name"),
    "a video's suffix": (("wan", "-o", "a.png", "a"), "--output must end in .mp4, .webp for a video"),
    "a picture's suffix": (("flux", "-o", "a.mp4", "a"), "--output must end in .png"),
    "the residual": (("flux", "--target", "residual", "a"), "--target must be velocity, x0 or module"),
    "a plan": (("flux", "--plan", "a"), "--plan has no effect with --pipeline"),
    "steps": (("flux", "--num_steps", 0, "a"), "--num_steps must be a whole number from 1"),
    "guidance": (("flux", "--guidance", "nan", "a"), "--guidance must be a number from 0 to 100"),
    "compare without a cache": (("flux", "--compare", "--cache", "off", "a"), "--compare draws cached"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_drawn_is_refused_in_one_line_before_weights_are_read(
    folders: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (folder, *flags), message = REFUSED[name]
    assert run("--pipeline", folders / folder, *flags) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert message in said[-1] and "loading" not in " ".join(said)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_no_pipeline_and_flags_without_one_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--pipeline", tmp_path, "a") == 2
    assert "has no model_index.json" in capsys.readouterr().err
    (tmp_path / "model_index.json").write_text('{"_class_name": "NoSuchPipeline", "scheduler": ["a", "b"]}')
    assert run("--pipeline", tmp_path, "a") == 2
    assert "must be of a class of diffusers" in capsys.readouterr().err
    (tmp_path / "model_index.json").write_text("[1, 2")
    assert run("--pipeline", tmp_path, "a") == 2
    assert run("--fps", 3, "a") == 2
    assert "--fps has no effect without --pipeline" in capsys.readouterr().err


def test_a_broken_folder_is_one_line(folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = tmp_path / "flux"
    shutil.copytree(folders / "flux", broken)
    shutil.rmtree(broken / "text_encoder")
    assert run("--pipeline", broken, *FLUX, "-o", tmp_path / "a.png", "a") == 2
    assert "text_encoder is missing: the model's folder is incomplete" in capsys.readouterr().err


def test_without_ffmpeg_a_video_is_a_webp(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("hi_diffusers.console.find_spec", lambda name: None)
    monkeypatch.setattr(formats, "find_spec", lambda name: None)
    monkeypatch.chdir(tmp_path)
    assert run("--pipeline", folders / "wan", *WAN, "-o", "a.mp4", "a") == 2
    assert "pip install 'hi-diffusers[video]'" in capsys.readouterr().err
    assert run("--pipeline", folders / "wan", *WAN, "--seed", 3, "a") == 0
    assert (tmp_path / "wan-3.webp").is_file()


def test_like_takes_all_settings_from_a_picture_or_a_video(
    folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flux, wan = ("--pipeline", folders / "flux"), ("--pipeline", folders / "wan")
    assert run(*flux, *FLUX, "--guidance", 2, "--seed", 7, "-o", tmp_path / "a.png", "a red circle") == 0
    assert run(*flux, "--like", tmp_path / "a.png", "-o", tmp_path / "b.png") == 0
    assert sha256(tmp_path / "a.png") == sha256(tmp_path / "b.png")
    assert run(*wan, *WAN, "--seed", 7, "-o", tmp_path / "a.webp", "a red circle") == 0
    assert run(*wan, "--like", tmp_path / "a.webp", "-o", tmp_path / "b.webp") == 0
    assert sha256(tmp_path / "a.webp") == sha256(tmp_path / "b.webp")
    capsys.readouterr()
    assert run(*wan, "--like", tmp_path / "a.png", "-o", tmp_path / "c.webp") == 2
    assert "was drawn by FluxPipeline, not WanPipeline" in capsys.readouterr().err
    assert run("--like", tmp_path / "a.png", "-o", tmp_path / "c.png") == 2
    assert "give --pipeline" in capsys.readouterr().err
    (tmp_path / "a.webp.json").write_text('{"model": 3}')
    assert run(*wan, "--like", tmp_path / "a.webp", "-o", tmp_path / "c.webp") == 2
    assert "does not hold the settings" in capsys.readouterr().err


@pytest.fixture(scope="module")
def flux_inpaint(folders: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """FLUX's files as the pipeline that draws a part of a picture."""
    folder = tmp_path_factory.mktemp("inpaint") / "flux-inpaint"
    shutil.copytree(folders / "flux", folder)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": "FluxInpaintPipeline"}))
    return folder


def test_a_mask_says_what_a_pipeline_draws_anew(flux_inpaint: Path, picture: Path, tmp_path: Path) -> None:
    for name, box in (("left", (0, 0, 32, 64)), ("right", (32, 0, 64, 64))):
        mask = Image.new("L", (64, 64))
        mask.paste(255, box)
        mask.save(tmp_path / f"{name}.png")
        flags = ("--image", picture, "--mask", tmp_path / f"{name}.png", "--strength", "0.75", "--seed", 3)
        assert run("--pipeline", flux_inpaint, *FLUX, *flags, "-o", tmp_path / f"{name}.out.png", "a star") == 0
    metadata = read_metadata(tmp_path / "left.out.png")
    assert metadata["options"]["images"] == [sha256(picture)]
    assert metadata["options"]["mask_image"] == sha256(tmp_path / "left.png")
    left, right = (np.asarray(Image.open(tmp_path / f"{name}.out.png"), int) for name in ("left", "right"))
    assert not np.array_equal(left[:, :24], right[:, :24])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--fit", "pad"), "--fit has no effect with --pipeline"),
        (("--mask", "small.png"), "--mask must have the image's size 64x64, got 32x32"),
        (("--mask", "black.png"), "--mask is black everywhere, so nothing would be drawn"),
    ],
)
def test_what_a_pipeline_cannot_start_from_is_refused(
    flux_inpaint: Path,
    picture: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    flags: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Image.new("L", (32, 32), 255).save("small.png")
    Image.new("L", (64, 64)).save("black.png")
    assert run("--pipeline", flux_inpaint, *FLUX, "--image", picture, *flags, "a star") == 2
    assert message in capsys.readouterr().err


def test_a_pipeline_that_draws_a_part_needs_a_mask(
    flux_inpaint: Path, picture: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--pipeline", flux_inpaint, *FLUX, "--image", picture, "a star") == 2
    assert "--mask must be given: FluxInpaintPipeline draws a part of a picture" in capsys.readouterr().err


def test_a_pipeline_that_takes_no_mask_says_so(
    folders: Path, picture: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--pipeline", folders / "flux", *FLUX, "--mask", picture, "a star") == 2
    assert "--mask is not taken by FluxPipeline" in capsys.readouterr().err
