import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, PngImagePlugin

from cache_functions import CacheConfig
from hi_diffusers import HiDreamImageTransformer2DModel
from hi_diffusers.commands import inference
from hi_diffusers.families.table import PRESETS
from hi_diffusers.pictures.metadata import read_metadata
from hi_diffusers.pictures.metrics import psnr, ssim
from tests.tiny_folder import OTHER_PROMPT, PROMPT, Calls, visible_files

ROOT = Path(__file__).resolve().parents[1]
LONG_NAME = "a" * 300 + ".png"
SCHEDULERS = ("unipc", "euler", "lcm")
TAYLORSEER = ("--cache", "taylorseer")  # a setting about which there is nothing to say
ONE = ("--full_steps", "1")
OF_CACHE = {
    "--cache",
    "--like",
    "--full_steps",
    "--speedup",
    "--fresh_threshold",
    "--step_mask",
    "--schedule",
    "--basis",
    "--target",
    "--calibration",
    "--corrector",
    "--sigma",
    "--max_order",
}


@dataclass(frozen=True)
class Run:
    """What a run of the script left on the terminal."""

    code: int
    out: str
    err: str

    @property
    def lines(self) -> list[str]:
        """The lines of stderr without the progress bar."""
        return [line for line in re.split(r"[\r\n]+", self.err) if line.strip() and not re.match(r" *\d+%\|", line)]


Script = Callable[..., Run]


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Script:
    """Run the script in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(*argv: str) -> Run:
        capsys.readouterr()
        code = inference.main([str(argument) for argument in argv])
        return Run(code, *capsys.readouterr())

    return run


@pytest.fixture
def draw(script: Script, tiny_folder: Path) -> Script:
    """Run the script on the tiny model, with few steps unless told otherwise."""

    def run(*argv: str) -> Run:
        few = {"--num_steps": "3", "--guidance": "0", "--seed": "7", "--model_path": tiny_folder, "--device": "cpu"}
        if not OF_CACHE & {part.partition("=")[0] for part in map(str, argv)}:
            few |= {"--full_steps": "1"}  # a budget that nobody names would cache nothing in three steps
        if "--like" in argv:
            few = {name: few[name] for name in ("--model_path", "--device")}
        return script(*argv, *(part for flag in few.items() if flag[0] not in argv for part in flag))

    return run


@pytest.fixture
def refused(draw: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Run the script, expect a refusal as the contract has it, and return its one line.

    The model is named unless the test does so: then there is nothing else to say.
    """

    def load(*_: Any, **__: Any) -> None:
        raise AssertionError("the model was loaded before the refusal")

    monkeypatch.setattr("hi_diffusers.engine.session.load_files", load)

    def run(*argv: str) -> str:
        before = visible_files(tmp_path)
        named = {"-m", "--model_type", "--like"} & set(argv)
        result = draw(*argv, *(() if named else ("-m", "nano")))
        assert result.code == 2, result.err
        assert result.out == ""
        assert visible_files(tmp_path) == before, "something was written"
        assert len(result.err.splitlines()) == 1 and result.err.endswith("\n"), f"not one line:\n{result.err}"
        assert result.err.startswith("inference.py: error: ")
        return result.err

    return run


@pytest.fixture(scope="module")
def drawn(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A picture that the script drew; --like takes its settings."""
    path = tmp_path_factory.mktemp("drawn") / "picture.png"
    argv = f"--model_path {tiny_folder} --output {path} --seed 7 --num_steps 3 --guidance 0 --device cpu".split()
    assert inference.main([PROMPT, *argv, *ONE]) == 0
    return path


def forged(path: Path, like: Path, **sections: dict[str, Any]) -> Path:
    """A picture with the metadata of `like`, its sections changed: as anybody may send one."""
    metadata = read_metadata(like)
    for name, changes in sections.items():
        metadata[name] = metadata[name] | changes
    chunks = PngImagePlugin.PngInfo()
    chunks.add_itxt("hi_diffusers", json.dumps(metadata))
    Image.new("RGB", (64, 64)).save(path, pnginfo=chunks)
    return path


# A picture.


def test_a_prompt_becomes_a_picture_and_its_file_is_named(draw: Script, tmp_path: Path) -> None:
    result = draw(PROMPT, "--output", "a.png")
    assert result.code == 0
    assert visible_files(tmp_path) == {"a.png"}
    assert Image.open("a.png").size == (64, 64)
    assert result.out.splitlines()[-1] == "a.png"


def test_results_alone_are_on_stdout(draw: Script) -> None:
    summary, path = draw(PROMPT, *ONE, "--output", "a.png").out.splitlines()
    assert re.fullmatch(
        r"64x64, seed 7, 3 steps: 1 full, 2 forecast, \d+\.\d\d s"
        r" \(encode \d+\.\d\d, denoise \d+\.\d\d, decode \d+\.\d\d\), about [\d.e-]+ s saved",
        summary,
    )
    assert path == "a.png"


def test_the_progress_bar_counts_full_and_forecast_steps_on_stderr(draw: Script) -> None:
    err = draw(PROMPT, "--fresh_threshold", "2").err
    assert "3/3" in err and "full=2" in err and "forecast=1" in err


@pytest.mark.parametrize("form", [(PROMPT,), ("--prompt", PROMPT)], ids=["positional", "flag"])
def test_both_forms_of_the_prompt_draw_the_same_file(draw: Script, drawn: Path, form: tuple[str, ...]) -> None:
    assert draw(*form, "--output", "a.png").code == 0
    assert Path("a.png").read_bytes() == drawn.read_bytes()


def test_no_prompt_draws_the_model_s_example_and_says_so(draw: Script) -> None:
    result = draw("--output", "a.png")
    example = PRESETS["nano"].example
    assert read_metadata("a.png")["options"]["prompt"] == example
    assert any("no prompt given" in line and example in line for line in result.lines)


def test_an_empty_prompt_is_a_prompt(draw: Script) -> None:
    result = draw("", "--output", "a.png")
    assert read_metadata("a.png")["options"]["prompt"] == ""
    assert not any("no prompt given" in line for line in result.lines)


def test_without_output_the_file_is_named_after_the_seed(draw: Script, tmp_path: Path) -> None:
    draw(PROMPT)
    assert visible_files(tmp_path) == {"hidream-7.png"}


def test_a_seed_that_was_drawn_is_printed_and_recorded(script: Script, tiny_folder: Path) -> None:
    argv = ("--model_path", tiny_folder, "--num_steps", "1", "--device", "cpu", "-o", "a.png")
    seeds = []
    for _ in range(2):
        result = script(PROMPT, *argv)
        seeds.append(read_metadata("a.png")["options"]["seed"])
        assert f"seed {seeds[-1]}," in result.out
    assert seeds[0] != seeds[1]


@pytest.mark.parametrize(
    ("name", "kind"), [("a.jpg", "JPEG"), ("a.jpeg", "JPEG"), ("a.webp", "WEBP"), ("A.PNG", "PNG")]
)
def test_the_suffix_says_the_format(draw: Script, drawn: Path, name: str, kind: str) -> None:
    assert draw(PROMPT, "-o", name).code == 0
    assert Image.open(name).format == kind
    assert read_metadata(name) == read_metadata(drawn)


def test_an_existing_picture_is_replaced(draw: Script, drawn: Path) -> None:
    Path("a.png").write_bytes(b"old")
    draw(PROMPT, "-o", "a.png")
    assert Path("a.png").read_bytes() == drawn.read_bytes()


def test_flags_reach_the_picture(draw: Script) -> None:
    argv = "-m nano-dev --seed 3 --resolution 80x48 --num_steps 2 --guidance 2 --scheduler euler --shift 2"
    cache = "--target x0 --fresh_threshold 2 --max_order 0 --first_enhance 1 --last_enhance 1"
    words = ("--negative_prompt", "grey", "--max_sequence_length", "16", "-o", "a.png", "--dtype", "bf16")
    assert draw(PROMPT, *argv.split(), *cache.split(), *words).code == 0
    metadata = read_metadata("a.png")
    assert metadata["options"] == {
        "prompt": PROMPT,
        "negative_prompt": "grey",
        "seed": 3,
        "width": 80,
        "height": 48,
        "num_steps": 2,
        "guidance": 2.0,
        "scheduler": "euler",
        "shift": 2.0,
        "max_sequence_length": 16,
    }
    expected = {"target": "x0", "fresh_threshold": 2, "max_order": 0, "first_enhance": 1, "last_enhance": 1}
    assert metadata["cache"].items() >= expected.items()
    assert metadata["model"]["model_type"] == "nano-dev" and metadata["model"]["dtype"] == "bfloat16"


def test_no_flag_of_the_cache_is_the_preset_s_cache(
    script: Script, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nano = replace(PRESETS["nano"], cache=CacheConfig(fresh_threshold=2))
    monkeypatch.setattr("hi_diffusers.families.hidream.presets.PRESETS", (nano,))
    few = ("--num_steps", "3", "--guidance", "0", "--model_path", tiny_folder, "--device", "cpu")
    assert "2 full, 1 forecast" in script(PROMPT, *few).out


def test_the_cache_can_be_switched_off(draw: Script) -> None:
    assert "3 full, 0 forecast" in draw(PROMPT, "--cache", "off").out


# What is said.


def test_the_small_model_is_named_as_such_unless_it_was_asked_for(draw: Script) -> None:
    by_default, asked_for = (draw(PROMPT, *TAYLORSEER, *model) for model in ((), ("-m", "nano")))
    assert any("bundled" in line and "full|dev|fast" in line for line in by_default.lines)
    assert asked_for.lines == ["loading nano"]


def test_a_size_that_is_changed_is_said_before_anything_is_loaded(
    draw: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hi_diffusers.engine.session.load_files", Calls(None, fail_at=1))
    result = draw(PROMPT, "--resolution", "512x512")
    assert result.code == 1
    assert any("512x512 is drawn as 64x64" in line for line in result.lines)


def test_a_negative_prompt_without_guidance_is_said_to_have_no_effect(draw: Script) -> None:
    assert any("negative prompt" in line for line in draw(PROMPT, "--negative_prompt", "grey").lines)


def test_that_x0_is_forecast_is_said_where_the_sampler_adds_noise(draw: Script) -> None:
    lines = draw(PROMPT, "--scheduler", "lcm", *TAYLORSEER).lines
    assert any("forecasts x0" in line and "noise" in line for line in lines)


def test_that_no_calibration_fits_is_said_with_what_is_done_instead(draw: Script) -> None:
    line, _ = draw(PROMPT, "-m", "nano", "--cache", "best", *ONE).lines
    assert line.startswith("no calibration for unipc, ") and "using taylor order 1 on the velocity" in line
    assert line.endswith("Run calibrate.py for a measured choice")


def test_a_prompt_that_is_cut_is_said_with_the_words_lost(draw: Script) -> None:
    result = draw("a red circle above a blue square on a green background", "--max_sequence_length", "8")
    assert any("8 tokens" in line and "square on a green background" in line for line in result.lines)


def test_words_that_the_model_does_not_know_are_said(draw: Script) -> None:
    assert any("'zebra'" in line for line in draw("a red zebra on a blue background").lines)


# Refusals: exit code 2, one line, nothing written, nothing loaded.


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--model_type", "giant"),
        ("--model_path", "none"),
        ("--device", "tpu"),
        ("--dtype", "fp8"),
        ("--seed", "-2"),
        ("--seed", "1.5"),
        ("--seed", "x"),
        ("--seed", str(2**64)),
        ("--resolution", "64"),
        ("--resolution", "64x"),
        ("--resolution", "64x64x64"),
        ("--resolution", "0x0"),
        ("--resolution", "6400x10"),
        ("--num_steps", "0"),
        ("--num_steps", "1001"),
        ("--num_steps", "many"),
        ("--guidance", "-1"),
        ("--guidance", "100.5"),
        ("--guidance", "nan"),
        ("--guidance", "inf"),
        ("--guidance", "much"),
        ("--scheduler", "ddim"),
        ("--shift", "0"),
        ("--shift", "-3"),
        ("--shift", "nan"),
        ("--max_sequence_length", "7"),
        ("--max_sequence_length", "219"),
        ("--cache", "magic"),
        ("--target", "attention"),
        ("--basis", "fourier"),
        ("--schedule", "never"),
        ("--fresh_threshold", "0"),
        ("--fresh_threshold", "1001"),
        ("--max_order", "-1"),
        ("--max_order", "7"),
        ("--first_enhance", "0"),
        ("--last_enhance", "-1"),
        ("--output", "a.gif"),
        ("--output", "a"),
        ("--output", "none/a.png"),
        ("--output", LONG_NAME),
        ("--like", "none.png"),
    ],
)
def test_a_bad_value_is_refused_with_flag_and_value(refused, flag: str, value: str) -> None:
    line = refused(PROMPT, flag, value)
    assert flag.removeprefix("--") in line
    assert value in line


@pytest.mark.parametrize(
    "argv",
    [
        ["--output", "none/a.png"],
        ["--model_path", "none"],
        [PROMPT, "--scheduler", "lcm", "--output", "a.gif"],
        [PROMPT, "--resolution", "512x512", "--model_path", "none"],
    ],
    ids=" ".join,
)
def test_a_refusal_is_the_only_line_even_if_there_was_something_to_notice(refused, argv: list[str]) -> None:
    refused(*argv)


@pytest.mark.parametrize(("width", "height", "named"), [("0", "64", "--width"), ("64", "16385", "--height")])
def test_a_bad_side_is_refused_with_flag_and_value(refused, width: str, height: str, named: str) -> None:
    line = refused(PROMPT, "--width", width, "--height", height)
    assert named in line and (width if named == "--width" else height) in line


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--prompt", "a", "b"], "once"),
        (["a", "b"], "unrecognized"),
        (["--bogus"], "--bogus"),
        (["--bogus\nflag"], "bogus"),
        (["--seed"], "--seed"),
        (["--resolution", "64x64", "--height", "64"], "--resolution"),
        (["--compare", "--cache", "off"], "--compare"),
        (["--cache", "off", "--target", "x0"], "--target"),
        (["--cache", "off", "--max_order", "2"], "--max_order"),
        (["--scheduler", "lcm", "--target", "module"], "noise"),
        (["-m", "nano-fast", "--target", "module"], "noise"),
        (["half a character: \udcc3"], "prompt"),
    ],
    ids=lambda value: (
        "-".join(value).replace("\n", " ").encode("ascii", "replace").decode() if isinstance(value, list) else value
    ),
)
def test_flags_that_do_not_go_together_are_refused(refused, argv: list[str], said: str) -> None:
    assert said in refused(*argv)


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_a_device_that_this_machine_lacks_is_refused(refused, monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    line = refused(PROMPT, "--device", device)
    assert "device" in line and repr(device) in line


def test_an_output_that_is_a_folder_is_refused(refused) -> None:
    Path("a.png").mkdir()
    line = refused(PROMPT, "--output", "a.png")
    assert "--output" in line and "a.png" in line


def test_an_output_in_a_folder_that_is_a_file_is_refused(refused) -> None:
    Path("file").touch()
    assert "--output" in refused(PROMPT, "--output", "file/a.png")


def test_an_output_in_a_folder_that_is_not_writable_is_refused(refused, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked of the system, since this test may run as a user who may write anywhere."""
    Path("locked").mkdir()
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode, **_: Path(path).name != "locked" and access(path, mode))
    line = refused(PROMPT, "--output", "locked/a.png")
    assert "--output" in line and "locked" in line and "writable" in line


@pytest.mark.parametrize("name", ["a_uncached.png", "a_compare.png"])
def test_a_comparison_one_of_whose_files_cannot_be_written_is_refused(refused, name: str) -> None:
    Path(name).mkdir()
    assert name in refused(PROMPT, "--compare", *ONE, "--output", "a.png")


def test_a_hidream_model_without_its_files_is_refused_with_the_way_to_get_them(script: Script, tmp_path: Path) -> None:
    result = script(PROMPT, "-m", "full", "--device", "cpu")
    assert (result.code, result.out, visible_files(tmp_path)) == (2, "", set())
    (line,) = result.err.splitlines()
    assert line.startswith("inference.py: error: HiDream-ai/HiDream-I1-Full is not on this disk")


def test_a_model_of_another_size_is_refused(refused) -> None:
    assert "full" in refused(PROMPT, "-m", "full")


def damage_index(folder: Path) -> Path:
    (folder / "model_index.json").unlink()
    return folder / "model_index.json"


def damage_pipeline(folder: Path) -> Path:
    (folder / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    return folder


def damage_transformer(folder: Path) -> Path:
    (folder / "transformer" / "config.json").write_text('{"_class_name": "FluxTransformer2DModel"}')
    return folder / "transformer"


def damage_component(folder: Path) -> Path:
    shutil.rmtree(folder / "text_encoder_3")
    return folder / "text_encoder_3"


def damage_weights(folder: Path) -> Path:
    (path,) = (folder / "transformer").glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:-1])
    return path


@pytest.mark.parametrize(
    "damage", [damage_index, damage_pipeline, damage_transformer, damage_component, damage_weights]
)
def test_a_damaged_model_folder_is_refused_with_the_path_at_fault(
    refused, tiny_folder: Path, tmp_path: Path, damage: Callable[[Path], Path]
) -> None:
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "model"))
    at_fault = damage(folder)
    assert str(at_fault) in refused(PROMPT, "--model_path", folder)


# --like.


@pytest.mark.parametrize(
    "settings",
    [
        "",
        "--scheduler lcm",
        "--cache off",
        "--guidance 3 --negative_prompt grey --resolution 80x48 --fresh_threshold 2 --max_order 2 --target x0",
        "-m nano-fast --num_steps 4",
        "--dtype bf16",
    ],
)
def test_like_draws_the_same_file_bit_for_bit(draw: Script, settings: str) -> None:
    assert draw(PROMPT, *settings.split(), "-o", "a.png").code == 0
    assert draw("--like", "a.png", "-o", "b.png").code == 0
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes()


@pytest.mark.parametrize("suffix", [".jpg", ".webp"])
def test_like_reads_every_format(draw: Script, suffix: str) -> None:
    draw(PROMPT, "-o", f"a{suffix}")
    assert draw("--like", f"a{suffix}", "-o", f"b{suffix}").code == 0
    assert Path(f"a{suffix}").read_bytes() == Path(f"b{suffix}").read_bytes()


@pytest.mark.parametrize(
    ("flags", "section", "changed"),
    [
        (["--seed", "8"], "options", {"seed": 8}),
        (["--prompt", OTHER_PROMPT], "options", {"prompt": OTHER_PROMPT}),
        ([OTHER_PROMPT], "options", {"prompt": OTHER_PROMPT}),
        (["--num_steps", "2"], "options", {"num_steps": 2}),
        (["--resolution", "80x48"], "options", {"width": 80, "height": 48}),
        (["--max_order", "0"], "cache", {"max_order": 0}),
    ],
    ids=lambda value: value[0].split()[0] if isinstance(value, list) else None,
)
def test_a_flag_beside_like_changes_that_setting_alone(
    draw: Script, drawn: Path, flags: list[str], section: str, changed: dict[str, Any]
) -> None:
    assert draw("--like", drawn, *flags, "-o", "b.png").code == 0
    expected = read_metadata(drawn)
    expected[section] = expected[section] | changed
    assert read_metadata("b.png") == expected


def test_the_cache_beside_like_can_be_switched_off(draw: Script, drawn: Path) -> None:
    assert draw("--like", drawn, "--cache", "off", "-o", "b.png").code == 0
    assert read_metadata("b.png") == read_metadata(drawn) | {"cache": {"target": "off"}}


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_the_scheduler_beside_like_can_be_changed(draw: Script, drawn: Path, scheduler: str) -> None:
    """The picture records the target as it was resolved; another sampler may admit another one only."""
    assert draw("--like", drawn, "--scheduler", scheduler, "-o", "b.png").code == 0
    assert read_metadata("b.png")["options"]["scheduler"] == scheduler


def test_another_model_beside_like_is_drawn_with(draw: Script, drawn: Path) -> None:
    assert draw("--like", drawn, "-m", "nano-fast", "-o", "b.png").code == 0
    assert read_metadata("b.png")["model"]["model_type"] == "nano-fast"


def test_like_says_if_the_picture_was_drawn_by_other_weights(
    draw: Script, drawn: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "model"))
    (path,) = (folder / "transformer").glob("*.safetensors")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert draw("--like", drawn, "-o", "same.png").lines == ["loading nano"]
    assert any("other weights" in line for line in draw("--like", drawn, "--model_path", folder, "-o", "b.png").lines)


def test_like_opens_no_file_that_the_picture_names(
    draw: Script, drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def locate(preset: Any, source: Any, parts: str) -> None:
        asked.append((preset.name, source.model_path))
        raise ValueError("far enough")

    monkeypatch.setattr("hi_diffusers.families.hidream.family.locate", locate)
    paths = {"model_path": "/elsewhere", "repo": "some/where", "path": "/elsewhere", "lora": "some/where"}
    picture = forged(tmp_path / "forged.png", drawn, model=paths)
    assert draw("--like", picture, "--model_path", "given").code == 2
    assert asked == [("nano", "given")]


@pytest.mark.parametrize(
    ("name", "content"),
    [("empty.png", b""), ("text.png", b"hello"), ("cut.png", b"\x89PNG\r\n\x1a\n"), ("none.png", None)],
)
def test_like_what_is_no_picture_is_refused(refused, name: str, content: bytes | None) -> None:
    if content is not None:
        Path(name).write_bytes(content)
    line = refused("--like", name)
    assert "--like" in line and name in line


def test_like_a_folder_is_refused(refused) -> None:
    Path("a.png").mkdir()
    line = refused("--like", "a.png")
    assert "--like" in line and "a.png" in line


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
def test_like_a_picture_of_other_software_is_refused(refused, suffix: str) -> None:
    Image.new("RGB", (64, 64)).save(f"foreign{suffix}")
    line = refused("--like", f"foreign{suffix}")
    assert "--like" in line and f"foreign{suffix}" in line and "no hi-diffusers metadata" in line


@pytest.mark.parametrize("name", ["giant", "", "../nano", None, 7, ["nano"], {"nano": 1}])
def test_like_a_model_that_is_not_known_is_refused(refused, drawn: Path, tmp_path: Path, name: Any) -> None:
    picture = forged(tmp_path / "a.png", drawn, model={"model_type": name})
    line = refused("--like", picture)
    assert "--like" in line and "--model_type" in line


def test_like_an_unknown_model_is_drawn_by_the_model_that_is_given(draw: Script, drawn: Path, tmp_path: Path) -> None:
    picture = forged(tmp_path / "a.png", drawn, model={"model_type": "giant"})
    assert draw("--like", picture, "-m", "nano", "-o", "b.png").code == 0


@pytest.mark.parametrize("section", ["options", "cache"])
def test_like_settings_that_are_not_known_are_refused_by_name(
    refused, drawn: Path, tmp_path: Path, section: str
) -> None:
    picture = forged(tmp_path / "a.png", drawn, **{section: {"wormhole": 1}})
    line = refused("--like", picture)
    assert "--like" in line and "wormhole" in line


@pytest.mark.parametrize(
    ("section", "name", "value"),
    [
        ("options", "prompt", 7),
        ("options", "prompt", None),
        ("options", "negative_prompt", ["a"]),
        ("options", "seed", -2),
        ("options", "seed", "7"),
        ("options", "seed", 2**70),
        ("options", "height", 10**9),
        ("options", "num_steps", 10**9),
        ("options", "num_steps", {}),
        ("options", "guidance", "3"),
        ("options", "scheduler", ["unipc"]),
        ("options", "scheduler", "os.system"),
        ("options", "shift", True),
        ("options", "max_sequence_length", 10**9),
        ("cache", "target", ["module"]),
        ("cache", "target", "attention"),
        ("cache", "basis", {}),
        ("cache", "basis", "../../evil"),
        ("cache", "schedule", "os"),
        ("cache", "fresh_threshold", 0),
        ("cache", "fresh_threshold", "4"),
        ("cache", "max_order", 10**9),
        ("cache", "first_enhance", None),
    ],
)
def test_like_values_out_of_their_domain_are_refused_by_name(
    refused, drawn: Path, tmp_path: Path, section: str, name: str, value: Any
) -> None:
    assert name in refused("--like", forged(tmp_path / "a.png", drawn, **{section: {name: value}}))


@pytest.mark.parametrize("code", ["\x1b[2J", "\x07", "\x9b2J", "\r"])
@pytest.mark.parametrize("place", ["fingerprint", "setting"])
def test_like_prints_no_control_characters_of_a_picture(
    draw: Script, drawn: Path, tmp_path: Path, place: str, code: str
) -> None:
    """They would let a stranger's picture write over the terminal."""
    changes = {"model": {"fingerprint": f"a{code}b"}} if place == "fingerprint" else {"options": {f"a{code}b": 1}}
    result = draw("--like", forged(tmp_path / "a.png", drawn, **changes), "-o", "b.png")
    assert f"a{code}b" not in result.err


# --compare.


def test_compare_writes_both_pictures_and_a_labelled_side_by_side(draw: Script, drawn: Path, tmp_path: Path) -> None:
    result = draw(PROMPT, "--compare", *ONE, "-o", "a.png")
    assert result.code == 0
    assert visible_files(tmp_path) == {"a.png", "a_uncached.png", "a_compare.png"}
    assert result.out.splitlines()[-3:] == ["a_uncached.png", "a.png", "a_compare.png"]
    assert Path("a.png").read_bytes() == drawn.read_bytes(), "compared is what is drawn without --compare"
    assert read_metadata("a_uncached.png") == read_metadata(drawn) | {"cache": {"target": "off"}}
    sheet = Image.open("a_compare.png")
    assert sheet.width > 2 * 64 and sheet.height > 64


def test_compare_prints_seconds_steps_and_fidelity(draw: Script) -> None:
    out = draw(PROMPT, "--compare", "-o", "a.png", "--fresh_threshold", "2").out
    uncached, cached, speedup, fidelity, *_ = out.splitlines()
    assert re.match(r"uncached: +64x64, seed 7, 3 steps: 3 full, 0 forecast, \d+\.\d\d s", uncached)
    assert re.match(r"cached: +64x64, seed 7, 3 steps: 2 full, 1 forecast, \d+\.\d\d s", cached)
    assert re.match(r"speedup: +\d+\.\d\dx .* 1\.50x\)", speedup), "3 steps / 2 full steps"
    pictures = Image.open("a_uncached.png"), Image.open("a.png")
    assert f"PSNR {psnr(*pictures):.2f} dB" in fidelity and f"SSIM {ssim(*pictures):.4f}" in fidelity


def test_compare_of_a_calibrated_model(
    nano_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A calibration fits its number of steps only, also in the warm-up."""
    monkeypatch.chdir(tmp_path)
    assert inference.main(["a red circle on a blue background", "--compare", "--device", "cpu", "-o", "a.png"]) == 0
    assert "50 steps: 13 full, 37 forecast" in capsys.readouterr().out
    assert read_metadata("a.png")["cache"]["target"] == "solver"


def test_compare_keeps_the_format_of_the_pictures(draw: Script, tmp_path: Path) -> None:
    assert draw(PROMPT, "--compare", *ONE, "-o", "a.jpg").code == 0
    assert visible_files(tmp_path) == {"a.jpg", "a_uncached.jpg", "a_compare.png"}


# Failure and interruption while running.


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> Callable[[BaseException], None]:
    """Let the second step of a drawing raise."""

    def break_with(error: BaseException) -> None:
        forward = HiDreamImageTransformer2DModel.forward
        calls = []

        def failing(*args: Any, **kwargs: Any) -> Any:
            calls.append(None)
            if len(calls) == 2:
                raise error
            return forward(*args, **kwargs)

        monkeypatch.setattr(HiDreamImageTransformer2DModel, "forward", failing)

    return break_with


def assert_ended(result: Run, code: int, said: str, folder: Path) -> None:
    assert result.code == code
    ours = [line for line in result.lines if line.startswith("inference.py: ")]
    assert ours == result.lines[-1:] and said in ours[0]
    assert "Traceback" not in result.err
    assert result.out == ""
    assert visible_files(folder) == set(), "a file was left behind"


def test_an_interrupt_ends_with_130_one_line_and_no_file(draw: Script, broken, tmp_path: Path) -> None:
    broken(KeyboardInterrupt())
    assert_ended(draw(PROMPT, "-o", "a.png", *TAYLORSEER), 130, "interrupted", tmp_path)


def test_a_failure_while_running_ends_with_1_one_line_and_no_file(draw: Script, broken, tmp_path: Path) -> None:
    broken(RuntimeError("out of\nmemory"))
    result = draw(PROMPT, "-o", "a.png", *TAYLORSEER)
    assert_ended(result, 1, "RuntimeError: out of memory", tmp_path)


def test_a_failure_while_loading_ends_with_1_and_one_line(
    draw: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hi_diffusers.engine.session.load_files", Calls(None, fail_at=1))
    assert_ended(draw(PROMPT, "-o", "a.png"), 1, "this call fails", tmp_path)


@pytest.mark.parametrize(
    ("error", "code", "said"), [(OSError("disk full"), 1, "disk full"), (KeyboardInterrupt(), 130, "interrupted")]
)
def test_a_failure_while_writing_leaves_no_file(
    draw: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, said: str
) -> None:
    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(os, "fsync", fail)
    assert_ended(draw(PROMPT, "-o", "a.png"), code, said, tmp_path)


@pytest.mark.parametrize(("error", "code"), [(OSError("disk full"), 1), (KeyboardInterrupt(), 130)])
def test_a_failure_while_writing_the_side_by_side_leaves_the_old_one(
    draw: Script, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int
) -> None:
    save = Image.SAVE["PNG"]

    def fail(image: Image.Image, file: Any, name: str) -> None:
        if image.width > 64:
            file.write(b"half")
            raise error
        save(image, file, name)

    Path("a_compare.png").write_bytes(b"old")
    monkeypatch.setitem(Image.SAVE, "PNG", fail)
    assert draw(PROMPT, "--compare", *ONE, "-o", "a.png").code == code
    assert Path("a_compare.png").read_bytes() == b"old"


def test_a_failure_shows_where_if_it_is_asked_for(draw: Script, broken, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HIDREAM_TRACEBACK", "1")
    broken(RuntimeError("here"))
    with pytest.raises(RuntimeError, match="here"):
        draw(PROMPT, *TAYLORSEER)


# Help, and the script as it is typed.


def test_help_shows_every_flag(script: Script) -> None:
    result = script("--help")
    assert (result.code, result.err) == (0, "")
    flags = {flag for action in inference.build_parser()._actions for flag in action.option_strings}
    assert {flag for flag in flags if flag not in result.out} == set()


def test_the_announced_flags_exist() -> None:
    flags = {flag for action in inference.build_parser()._actions for flag in action.option_strings}
    announced = """--model_type -m --prompt --negative_prompt --seed --width --height --resolution --num_steps
        --guidance --scheduler --shift --max_sequence_length --cache --target --fresh_threshold --max_order
        --first_enhance --device --dtype --output --model_path --compare --like"""
    assert set(announced.split()) <= flags


def test_every_flag_has_a_help_text() -> None:
    assert [action.dest for action in inference.build_parser()._actions if not action.help] == []


def test_a_bad_flag_is_refused_before_the_large_libraries_are_imported() -> None:
    code = """
import sys, inference
print(inference.main(["--num_steps", "0"]), sorted({"diffusers", "transformers"} & set(sys.modules)))
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.stdout == "2 []\n"
    assert len(result.stderr.splitlines()) == 1


def test_the_script_as_it_is_typed_says_nothing_but_what_concerns_the_picture(
    tiny_folder: Path, tmp_path: Path
) -> None:
    """From another folder, with the libraries as they come: their notes are not for the user."""
    argv = f"-m nano --model_path {tiny_folder} --num_steps 2 --guidance 0 --seed 7 --device cpu -o a.png".split()
    command = [sys.executable, ROOT / "inference.py", PROMPT, *argv, *TAYLORSEER]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert [line.split(",")[0] for line in result.stdout.splitlines()] == ["64x64", "a.png"]
    assert Run(0, result.stdout, result.stderr).lines == ["loading nano"]


# The bundled model.


def test_the_script_alone_draws_the_bundled_model_s_example(nano_folder: Path, script: Script, tmp_path: Path) -> None:
    result = script("--seed", "1")
    assert result.code == 0
    assert visible_files(tmp_path) == {"hidream-1.png"}
    metadata = read_metadata("hidream-1.png")
    assert metadata["options"]["prompt"] == PRESETS["nano"].example and metadata["model"]["model_type"] == "nano"
    assert "50 steps: 13 full, 37 forecast" in result.out
