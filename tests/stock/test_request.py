"""What is asked of a pipeline: nothing is recorded that was not used, and no picture becomes another in silence."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cache_functions import CacheConfig
from hi_diffusers.commands.inference import main
from hi_diffusers.pictures.inputs import read_picture
from hi_diffusers.pictures.metadata import read_metadata
from hi_diffusers.stock.drawing import StockModel, StockResult
from hi_diffusers.stock.files import encode_result, write_result
from hi_diffusers.stock.frames import read_frames
from hi_diffusers.stock.request import StockOptions, StockRequest, decide, find_scheduler
from hi_diffusers.stock.source import StockSource, split_lora

FLUX = ("--resolution", "64x64", "--num_steps", "8", "--full_steps", "3")


def request(folder: Path, cache: CacheConfig | None = None, **options: Any) -> StockRequest:
    return decide(StockSource(str(folder), device="cpu"), StockOptions(**options), cache or CacheConfig.off())


def edited(folder: Path, out: Path, part: str, **changes: Any) -> Path:
    """A copy of a folder with another configuration of one component."""
    shutil.copytree(folder, out)
    path = next((out / part).glob("*config.json"))
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return out


def test_true_guidance_brings_the_negative_prompt_that_it_needs(folders: Path) -> None:
    assert request(folders / "flux", prompt="a", true_cfg=4.0).options["negative_prompt"] == ""
    assert request(folders / "flux", prompt="a", true_cfg=4.0).guidance == 4.0
    assert request(folders / "flux", prompt="a").guidance == 0.0
    said = request(folders / "flux", prompt="a", negative_prompt="b").notices
    assert said == ("the negative prompt has no effect without classifier-free guidance",)


def test_guidance_that_the_network_does_not_read_is_refused_and_not_recorded(folders: Path, tmp_path: Path) -> None:
    schnell = edited(folders / "flux", tmp_path / "schnell", "transformer", guidance_embeds=False)
    assert "guidance" not in request(schnell, prompt="a").options
    with pytest.raises(ValueError, match="guidance has no effect on this network"):
        request(schnell, prompt="a", guidance=3.0)


PIXELS = np.arange(64 * 64).reshape(64, 64)


def test_pictures_of_every_kind_are_read_as_they_look(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.fromarray((PIXELS * 16).astype(np.uint16)).save(path)
    grey = np.asarray(read_picture(path)[0])[..., 0]
    assert np.abs(grey.astype(int) - PIXELS * 16 / 257).max() <= 0.5
    clear = Image.new("RGBA", (64, 64), (255, 0, 0, 0))
    clear.save(path)
    assert read_picture(path)[0].getpixel((0, 0)) == (255, 255, 255)
    turned = Image.new("RGB", (64, 32), "red")
    exif = Image.Exif()
    exif[0x0112] = 6
    turned.save(path, exif=exif)
    assert read_picture(path)[0].size == (32, 64)
    both = tmp_path / "a.jpg"
    turned.save(both, format="MPO", save_all=True, append_images=[turned])
    assert read_picture(both)[0].size == (64, 32)


@pytest.mark.parametrize("path", ["/dev/zero", "/dev/null", "/", "none.png"])
def test_what_is_no_picture_is_refused_before_it_is_read(path: str) -> None:
    with pytest.raises(ValueError, match="image"):
        read_picture(Path(path))


def test_a_narrow_picture_is_refused(tmp_path: Path) -> None:
    Image.new("RGB", (2, 2000)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="both sides need 16"):
        read_picture(tmp_path / "a.png")


@pytest.mark.parametrize(
    ("folder", "part", "changes"),
    [
        ("dit", "scheduler", {"_class_name": "DDPMScheduler"}),
        ("flux", "scheduler", {"stochastic_sampling": True}),
    ],
)
def test_a_seed_gives_the_same_picture_where_the_scheduler_gets_no_generator(
    folders: Path, tmp_path: Path, folder: str, part: str, changes: dict[str, Any]
) -> None:
    noisy = edited(folders / folder, tmp_path / "noisy", part, **changes)
    index = json.loads((noisy / "model_index.json").read_text())
    index["scheduler"][1] = changes.get("_class_name", index["scheduler"][1])
    (noisy / "model_index.json").write_text(json.dumps(index))
    asked = {"prompt": "1", "seed": 7, "num_steps": 8}
    sized = asked | ({} if folder == "dit" else {"width": 64, "height": 64, "prompt": "a star"})
    one = request(noisy, CacheConfig(full_steps=4), **sized)
    model = StockModel.open(one.source)
    first, again = model.draw([one])[0], model.draw([one])[0]
    assert np.array_equal(first.pixels, again.pixels)
    both = model.draw([one, one.again(one.prompt, 8)])
    assert np.array_equal(both[0].pixels, first.pixels) and not np.array_equal(both[1].pixels, first.pixels)


def test_a_scheduler_of_second_order_is_budgeted_by_the_steps_that_it_takes(folders: Path, tmp_path: Path) -> None:
    heun = edited(folders / "wan", tmp_path / "heun", "scheduler", _class_name="FlowMatchHeunDiscreteScheduler")
    index = json.loads((heun / "model_index.json").read_text())
    index["scheduler"][1] = "FlowMatchHeunDiscreteScheduler"
    (heun / "model_index.json").write_text(json.dumps(index))
    sized = {"prompt": "a", "num_steps": 8, "num_frames": 5, "width": 32, "height": 32}
    one = request(heun, CacheConfig(target="velocity", schedule="power", full_steps=12), **sized)
    trace = StockModel.open(one.source).draw([one])[0].trace
    assert len(trace) == 15 and sum(record.kind == "full" for record in trace) == 12


def video(frames: list[int]) -> StockResult:
    pixels = np.stack([np.full((16, 16, 3), value / 10, np.float32) for value in frames])
    return StockResult(pixels, None, 0, {"options": {"fps": 8}, "version": 1}, (), (), 0.0, 0.0)


def test_equal_frames_of_a_video_are_all_read_back(tmp_path: Path) -> None:
    """The encoder merges equal neighbours into one long frame."""
    result = video([1, 1, 1, 1, 5, 5, 5, 5, 9])
    (tmp_path / "a.webp").write_bytes(encode_result(result, ".webp"))
    read = read_frames(tmp_path / "a.webp", 9)
    assert [np.asarray(one)[0, 0, 0] for one in read] == [np.asarray(one)[0, 0, 0] for one in result.frames]


def test_a_picture_does_not_keep_the_settings_of_the_video_that_it_replaces(tmp_path: Path) -> None:
    path = tmp_path / "a.webp"
    write_result(video([1, 2]), path)
    assert (tmp_path / "a.webp.json").is_file()
    still = StockResult(np.zeros((16, 16, 3), np.float32), None, 0, {"version": 1}, (), (), 0.0, 0.0)
    write_result(still, path)
    assert not (tmp_path / "a.webp.json").exists()


BROKEN: dict[str, Any] = {
    "an empty tokenizer": lambda folder: shutil.rmtree(folder / "tokenizer_2") or (folder / "tokenizer_2").mkdir(),
    "no tokenizer": lambda folder: shutil.rmtree(folder / "tokenizer"),
    "no vocabulary": lambda folder: [path.unlink() for path in (folder / "tokenizer_2").glob("*.json")],
    "fewer layers": lambda folder: change(folder / "transformer" / "config.json", num_layers=1),
    "too many layers": lambda folder: change(folder / "transformer" / "config.json", num_layers=10**6),
    "pickled weights": lambda folder: rename(folder / "transformer"),
    "no steps": lambda folder: change(folder / "scheduler" / "scheduler_config.json", num_train_timesteps=0),
    "a shift": lambda folder: change(folder / "scheduler" / "scheduler_config.json", shift="x"),
    "no class": lambda folder: change(folder / "model_index.json", transformer=[]),
    "a number": lambda folder: change(folder / "model_index.json", scheduler=["diffusers"]),
    "another call": lambda folder: change(folder / "model_index.json", _class_name="FluxFillPipeline"),
    "no steps at all": lambda folder: change(folder / "model_index.json", _class_name="FluxPriorReduxPipeline"),
    "cut weights": lambda folder: cut(next((folder / "vae").glob("*.safetensors"))),
}


def change(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def rename(part: Path) -> None:
    weights = next(part.glob("*.safetensors"))
    weights.rename(weights.with_suffix(".bin"))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_folder_is_refused_in_one_line(
    folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    broken = tmp_path / "flux"
    shutil.copytree(folders / "flux", broken)
    BROKEN[name](broken)
    assert main(["--pipeline", str(broken), *FLUX, "-o", str(tmp_path / "a.png"), "a"]) in (1, 2)
    assert "Traceback" not in capsys.readouterr().err and not (tmp_path / "a.png").exists()


def test_what_was_drawn_otherwise_is_said(folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--pipeline", str(folders / "flux"), *FLUX, "--seed", "1", "a star", "--dtype", "bf16"]
    assert main([*command, "-o", str(tmp_path / "a.png")]) == 0
    like = ["--like", str(tmp_path / "a.png"), "-o", str(tmp_path / "b.png")]
    assert main(["--pipeline", str(folders / "flux"), *like]) == 0
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert read_metadata(tmp_path / "b.png")["model"]["dtype"] == "bfloat16"
    capsys.readouterr()
    other = edited(folders / "flux", tmp_path / "other", "scheduler", base_shift=0.7)
    assert main(["--pipeline", str(other), *like]) == 0
    assert "was drawn with other files" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags",
    [("--device", "foo"), ("--lora", "a:nan"), ("--lora", "a:x"), ("--revision", "main"), ("--device", "cuda:99")],
)
def test_wrong_places_are_refused_before_weights_are_read(
    folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: tuple[str, str]
) -> None:
    assert main(["--pipeline", str(folders / "flux"), *FLUX, *flags, "-o", str(tmp_path / "a.png"), "a"]) == 2
    assert "loading" not in capsys.readouterr().err


def test_loras_are_split_from_their_scales() -> None:
    assert split_lora("a.safetensors:0.5") == ("a.safetensors", 0.5)
    assert split_lora("owner/name") == ("owner/name", 1.0)
    with pytest.raises(ValueError, match="scale"):
        split_lora("a.safetensors:inf")


def test_steps_of_a_schedule_that_begins_in_the_middle_are_counted_as_diffusers_does(folders: Path) -> None:
    from hi_diffusers.stock.request import drawn_steps

    one = request(folders / "flux", prompt="a", num_steps=10)
    scheduler = find_scheduler(one.source)
    for strength, drawn in ((0.45, 5), (0.25, 3), (1.0, 10)):
        changed = StockRequest(one.source, "a", 0, {"num_steps": 10, "strength": strength})
        assert drawn_steps(changed, scheduler) == drawn
