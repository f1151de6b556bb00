"""sampling.py: a prompt file becomes a folder of pictures that can be stopped anywhere and goes on."""

import json
import os
import signal
import tracemalloc
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import ExifTags, Image

from hi_diffusers import HiDreamImagePipeline
from hi_diffusers.commands import sampling
from hi_diffusers.pictures.metadata import read_metadata
from hi_diffusers.pictures.metrics import psnr
from hi_diffusers.runs import worker
from hi_diffusers.runs.manifest import Manifest, read_manifests
from hi_diffusers.runs.units import Shard, Task
from hi_diffusers.runs.worker import Drawn
from tests.test_inference import Run
from tests.test_safety import write_classifier
from tests.tiny_folder import OTHER_PROMPT, PROMPT, Calls, visible_files

PROMPTS = [
    PROMPT,
    OTHER_PROMPT,
    "a dog",
    "a large red sun on a white background",
    "a small blue fish on a green background",
]

Draw = Callable[..., Run]


@pytest.fixture
def draw(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Draw:
    """Run the script on the tiny model with five prompts and few steps; the run's folder is `out`."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    for variable in ("RANK", "WORLD_SIZE", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(variable, raising=False)
    Path("prompts.txt").write_text("\n".join(PROMPTS), encoding="utf-8")

    def run(*argv: Any) -> Run:
        few = {
            "--prompt_file": "prompts.txt",
            "--output_dir": "out",
            "--num_steps": 3,
            "--guidance": 0,
            "--model_path": tiny_folder,
            "--device": "cpu",
        }
        given = [str(part) for part in argv]
        if not {"--cache", "--full_steps", "--speedup", "--schedule", "--fresh_threshold"} & set(given):
            few["--full_steps"] = 1  # a budget that nobody names would cache nothing in three steps
        if "--encode_only" in given and "--embeds" in given and "-m" not in given:
            del few["--output_dir"]
        more = [str(part) for flag in few.items() if flag[0] not in given for part in flag]
        capsys.readouterr()
        code = sampling.main([*given, *more])
        return Run(code, *capsys.readouterr())

    return run


def pictures(folder: str | Path = "out") -> dict[str, bytes]:
    """The files of a run by name, without what names times."""
    return {path.name: path.read_bytes() for path in sorted(Path(folder).rglob("*.png"))}


def lines(folder: str | Path = "out") -> list[dict[str, Any]]:
    """The manifest, the last line of each picture, in the pictures' order, without timings."""
    latest = {(line["index"], line["image"]): line for line in read_manifests(Path(folder))}
    timings = ("seconds", "time")
    return [{name: value for name, value in latest[key].items() if name not in timings} for key in sorted(latest)]


def refusal(result: Run) -> str:
    assert result.code == 2, result.err
    assert len(result.lines) == 1, result.err
    return result.err


# A run.


def test_every_prompt_has_its_pictures_and_its_lines(draw: Draw) -> None:
    result = draw("--num_images_per_prompt", 2, "--batch_size", 4)
    assert result.code == 0, result.err
    assert visible_files(Path("out")) == {
        "run.json",
        "manifest.jsonl",
        *(f"0000{i}_0{j}.png" for i in range(5) for j in range(2)),
    }
    assert [(line["index"], line["image"], line["prompt"]) for line in lines()] == [
        (index, image, prompt) for index, prompt in enumerate(PROMPTS) for image in range(2)
    ]
    line = lines()[0]
    assert (line["full_steps"], line["forecast_steps"], line["batch"], line["options"]["num_steps"]) == (1, 2, 4, 3)
    assert {"software", "torch", "diffusers", "transformers"} <= set(line["versions"])
    assert "10 of 10 pictures are finished in out" in result.out


def test_all_seeds_differ_and_the_base_seed_changes_all(draw: Draw) -> None:
    draw()
    draw("--output_dir", "other", "--seed", 1)
    seeds = [line["seed"] for folder in ("out", "other") for line in lines(folder)]
    assert len(set(seeds)) == 10


def test_the_script_says_how_many_prompts_the_bundled_model_does_not_know(draw: Draw) -> None:
    assert "1 of 5 prompts use words that nano does not know" in draw().err


def test_batching_hardly_changes_what_is_drawn(draw: Draw) -> None:
    draw("--output_dir", "one")
    draw("--output_dir", "four", "--batch_size", 4)
    for name in pictures("one"):
        assert psnr(Image.open(f"one/{name}"), Image.open(f"four/{name}")) >= 60


def test_lines_of_a_json_file_are_drawn_with_their_own_options(draw: Draw) -> None:
    own = [
        {"prompt": PROMPT, "seed": 5, "num_steps": 2},
        {"prompt": PROMPT, "seed": 5, "num_steps": 2, "width": 128, "height": 32},
        {"prompt": PROMPT, "guidance": 3, "negative_prompt": OTHER_PROMPT},
    ]
    Path("own.jsonl").write_text("".join(json.dumps(one) + "\n" for one in own), encoding="utf-8")
    assert draw("--prompt_file", "own.jsonl", "--batch_size", 3).code == 0
    assert [line["options"]["num_steps"] for line in lines()] == [2, 2, 3]
    assert [Image.open(f"out/{line['file']}").size for line in lines()] == [(64, 64), (128, 32), (64, 64)]
    assert [line["seed"] for line in lines()][:2] == [5, 5]
    assert lines()[2]["options"]["negative_prompt"] == OTHER_PROMPT


@pytest.mark.parametrize("format", ["png", "jpg", "webp"])
def test_metadata_is_embedded_when_it_is_asked_for_and_else_only_the_maker(draw: Draw, format: str) -> None:
    draw("--format", format, "--limit", 1, "--output_dir", "plain")
    draw("--format", format, "--limit", 1, "--add_sampling_metadata")
    options = read_metadata(f"out/00000_00.{format}")["options"]
    assert (options["prompt"], options["seed"]) == (PROMPT, lines()[0]["seed"])
    plain = Path(f"plain/00000_00.{format}")
    with pytest.raises(ValueError, match="carries no hi-diffusers metadata"):
        read_metadata(plain)
    exif = Image.open(plain).getexif()
    assert exif[ExifTags.Base.Software].startswith("hi-diffusers")
    assert exif[ExifTags.Base.Make] and exif[ExifTags.Base.Model] == "nano"
    assert PROMPT.encode() not in plain.read_bytes()


@pytest.mark.slow
def test_neither_start_nor_resume_holds_the_prompts_in_memory(draw: Draw, monkeypatch: pytest.MonkeyPatch) -> None:
    """A million prompts at HiDream's usual length would take half a gigabyte; here 20 MB of them pass."""

    def withhold_all(_: Any, units: Iterable[list[Task]]) -> Iterator[list[Drawn]]:
        for unit in units:
            lines = ({"index": task.line.index, "image": 0, "prompt": "", "seed": 0} for task in unit if task.wanted)
            yield [Drawn(line | {"file": "", "bytes": 0, "sha256": "", "time": 0.0}, b"") for line in lines]

    monkeypatch.setattr(sampling, "draw_here", withhold_all)
    monkeypatch.setattr(sampling, "MAX_LOOKED_AT", 10)
    Path("long.txt").write_text(f"{'a red circle and ' * 30}\n" * 40_000, encoding="utf-8")
    for more in (("--limit", 20_000), ()):
        tracemalloc.start()
        assert draw("--prompt_file", "long.txt", "--batch_size", 500, *more).code == 0
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 8_000_000
    assert sum(1 for _ in read_manifests(Path("out"))) == 40_000


def test_a_size_that_was_promised_is_drawn(draw: Draw) -> None:
    """Fitting a size twice can move a side by a patch: 72 x 56 would become 72 x 48."""
    draw("--resolution", "72x56", "--limit", 1)
    promised = json.loads(Path("out/run.json").read_text())["fixed"]["options"]
    assert Image.open("out/00000_00.png").size == (promised["width"], promised["height"])


def test_sizes_that_lines_do_not_get_are_said(draw: Draw) -> None:
    own = '{"prompt": "a", "width": 100, "height": 50}\n' * 3
    Path("own.jsonl").write_text(own, encoding="utf-8")
    result = draw("--prompt_file", "own.jsonl")
    assert "line 1 of own.jsonl: 100x50 is drawn as" in result.err
    assert "2 more lines have the same or a similar notice" in result.err


# Going on.


def test_the_same_command_goes_on_and_ends_with_the_same_bytes(draw: Draw) -> None:
    draw("--output_dir", "whole", "--batch_size", 2)
    draw("--batch_size", 2, "--limit", 3)
    assert len(pictures()) == 3
    result = draw("--batch_size", 2)
    assert pictures() == pictures("whole")
    assert lines() == lines("whole")
    assert "drawn: 2 pictures" in result.out


def test_a_finished_run_loads_no_model(draw: Draw, monkeypatch: pytest.MonkeyPatch) -> None:
    draw()
    monkeypatch.setattr(worker, "Worker", None)
    result = draw()
    assert (result.code, result.out) == (0, "5 of 5 pictures are finished in out\n")


def test_a_missing_picture_is_drawn_again_bit_by_bit(draw: Draw) -> None:
    draw("--batch_size", 2)
    before = pictures()
    Path("out/00003_00.png").unlink()
    Path("out/00000_00.png").write_bytes(b"short")
    draw("--batch_size", 2)
    assert pictures() == before


def test_verify_finds_a_picture_that_was_changed(draw: Draw) -> None:
    draw()
    before = pictures()
    path = Path("out/00001_00.png")
    path.write_bytes(before[path.name][:-1] + b"x")
    draw()
    assert pictures() != before
    draw("--verify")
    assert pictures() == before


def test_indices_choose_prompts(draw: Draw) -> None:
    draw("--indices", "1,3-4")
    assert [line["index"] for line in lines()] == [1, 3, 4]
    draw("--output_dir", "whole")
    assert pictures().items() <= pictures("whole").items()


def test_shards_draw_what_one_process_draws(draw: Draw, monkeypatch: pytest.MonkeyPatch) -> None:
    draw("--output_dir", "whole", "--batch_size", 2)
    draw("--batch_size", 2, "--shard", "1/2")
    assert [line["index"] for line in lines()] == [2, 3]
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "shard 0/2, set by RANK and WORLD_SIZE" in draw("--batch_size", 2).err
    assert pictures() == pictures("whole")
    assert lines() == lines("whole")
    assert {"manifest-0-of-2.jsonl", "manifest-1-of-2.jsonl"} <= visible_files(Path("out"))
    monkeypatch.delenv("RANK")
    assert draw("--batch_size", 2).out == "5 of 5 pictures are finished in out\n", "another split reads all manifests"


@pytest.mark.parametrize(
    ("flags", "difference"),
    [
        (("--seed", 1), "options.seed is 0 there and 1 here"),
        (("--num_steps", 4), "options.num_steps is 3 there and 4 here"),
        (("--batch_size", 2), "batch_size is 1 there and 2 here"),
        (("--cache", "off"), "cache.target is 'velocity' there and 'off' here"),
        (("--add_sampling_metadata",), "add_sampling_metadata is False there and True here"),
        (("--threads", 2), "threads is 1 there and 2 here"),
    ],
)
def test_other_settings_are_refused_with_the_difference(draw: Draw, flags: tuple[Any, ...], difference: str) -> None:
    draw("--limit", 1, "--threads", 1)
    before = visible_files(Path("out"))
    threads = () if "--threads" in flags else ("--threads", 1)
    assert difference in refusal(draw("-m", "nano", *flags, *threads))
    assert visible_files(Path("out")) == before


def test_a_prompt_file_that_was_changed_is_refused(draw: Draw) -> None:
    draw("--limit", 1)
    Path("prompts.txt").write_text("\n".join([*PROMPTS[:-1], "another"]), encoding="utf-8")
    assert "prompts.sha256 is" in refusal(draw())


def test_a_second_run_in_the_same_folder_is_refused(draw: Draw) -> None:
    draw("--limit", 1)
    with Manifest(Path("out"), Shard()):
        result = draw()
    assert result.code == 2 and "is in use" in result.lines[-1]
    assert draw().code == 0


def test_ctrl_c_finishes_the_batch_and_the_same_command_goes_on(draw: Draw, monkeypatch: pytest.MonkeyPatch) -> None:
    draw("--output_dir", "whole", "--batch_size", 2)
    stop = Calls(worker.draw_batch)

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        if stop.count == 0:
            os.kill(os.getpid(), signal.SIGINT)
        return stop(*args, **kwargs)

    monkeypatch.setattr(worker, "draw_batch", interrupted)
    result = draw("--batch_size", 2)
    assert result.code == 130
    assert "stopped with 3 pictures left; the same command resumes the run" in result.err
    assert len(lines()) == 2
    assert draw("--batch_size", 2).code == 0
    assert pictures() == pictures("whole")


def test_a_second_ctrl_c_stops_at_once(draw: Draw, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any, **__: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("the second one did nothing")

    monkeypatch.setattr(worker, "draw_batch", interrupted)
    assert draw().code == 130
    assert lines() == []


# What goes wrong.


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--prompt_file", "none.txt"), "--prompt_file must be a file, got none.txt"),
        (("--batch_size", 0), "--batch_size must be 1 to 1024, got 0"),
        (("--threads", 10**11), "--threads must be 1 to 1024, got 100000000000"),
        (("--output_dir", ""), "--output_dir must be a folder, or a new one in an existing folder, got '.'"),
        (("--output_dir", "prompts.txt"), "--output_dir must be a folder"),
        (("--shard", f"0/{'9' * 30}"), "--shard must be I/N"),
        (("--limit", 0), "--limit must be at least 1, got 0"),
        (("--indices", "9"), "--indices must be numbers"),
        (("--shard", "2/2"), "--shard must be I/N"),
        (("--shard", "x"), "--shard must be I/N such as 0/4, got 'x'"),
        (("--output_dir", "no/such/folder"), "--output_dir must be a folder, or a new one in an existing folder"),
        (("--guidance", "-1"), "--guidance must be a number from 0 to 100"),
        (("--encode_only", "--limit", 1), "--encode_only needs --embeds FOLDER"),
        (("--safety_threshold", "0.4"), "--safety_threshold has no effect without --use_nsfw_filter"),
        (("--embeds_cache_gb", "1", "--embeds", "x"), "--embeds_cache_gb has no effect with --embeds"),
        (("--encode_only", "--embeds", "x"), "--output_dir has no effect with --encode_only"),
        (
            ("--use_nsfw_filter", "--safety_checker", "./no/such/folder"),
            "--safety_checker ./no/such/folder cannot be loaded",
        ),
        (("--ray_workers", "2"), "--ray_workers has no effect without --engine ray"),
        (("--embeds_cache_gb", "-1"), "--embeds_cache_gb must not be negative"),
        (("--embeds", "nothing"), "--embeds must be a folder that --encode_only filled"),
    ],
)
def test_a_bad_flag_is_named_before_anything_is_written(
    draw: Draw, tmp_path: Path, flags: tuple[Any, ...], message: str
) -> None:
    before = visible_files(tmp_path)
    assert message in refusal(draw("-m", "nano", *flags))
    assert visible_files(tmp_path) == before


def test_a_bad_line_is_named_before_anything_is_written(draw: Draw, tmp_path: Path) -> None:
    Path("own.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b", "num_steps": "x"}\n', encoding="utf-8")
    before = visible_files(tmp_path)
    assert "own.jsonl, line 2: num_steps must be a whole number" in refusal(draw("--prompt_file", "own.jsonl"))
    Path("own.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b", "num_steps": 2}\n', encoding="utf-8")
    message = refusal(draw("--prompt_file", "own.jsonl", "--full_steps", 3, "--schedule", "cosine"))
    assert "own.jsonl, line 2: full_steps" in message
    assert visible_files(tmp_path) == before


def test_a_folder_with_pictures_and_no_configuration_is_left_alone(draw: Draw) -> None:
    draw()
    before = pictures()
    Path("out/run.json").unlink()
    assert "but no run.json: give a new folder" in refusal(draw("-m", "nano", "--seed", 5))
    assert pictures() == before


def test_a_prompt_file_that_changes_while_it_is_drawn_ends_the_run(draw: Draw, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "UNITS_PER_CHUNK", 1)
    keep = sampling.keep

    def edit(*args: Any) -> None:
        keep(*args)
        Path("prompts.txt").write_text("\n".join(reversed(PROMPTS)), encoding="utf-8")

    monkeypatch.setattr(sampling, "keep", edit)
    result = draw()
    assert result.code == 1
    assert "prompts.txt was changed while it was drawn" in result.lines[-1]
    assert 0 < len(lines()) < 5


def test_files_of_others_are_not_swept_up(draw: Draw) -> None:
    draw("--limit", 1)
    foreign = [Path("out/.notes.tmp"), Path("out/mine/.important.tmp"), Path("out/.00001_00.png.x.tmp")]
    foreign[1].parent.mkdir()
    for path in foreign:
        path.touch()
    draw()
    assert all(path.exists() for path in foreign)


def test_a_latest_line_in_another_shards_manifest_counts(draw: Draw) -> None:
    """Else a picture that was drawn again with other bytes is drawn at every command."""
    draw("--indices", "0")
    stale = Path("out/manifest.jsonl").read_text().replace('"bytes": ', '"bytes": 1')
    Path("out/manifest.jsonl").write_text(stale, encoding="utf-8")
    assert "drawn: 1 pictures" in draw("--shard", "0/2", "--indices", "0").out
    assert "drawn" not in draw("--shard", "0/2", "--indices", "0").out


def test_an_empty_prompt_file_is_refused(draw: Draw) -> None:
    Path("empty.txt").write_text("\n  \n", encoding="utf-8")
    assert "--prompt_file must hold at least one prompt, got empty.txt, which has none" in refusal(
        draw("--prompt_file", "empty.txt")
    )


def test_a_folder_that_cannot_be_written_is_refused(draw: Draw, monkeypatch: pytest.MonkeyPatch) -> None:
    def read_only(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("hi_diffusers.runs.manifest.write_atomically", read_only)
    assert "Permission denied" in refusal(draw("-m", "nano"))


def test_a_full_disk_ends_in_one_line_and_nothing_finished_is_lost(draw: Draw, monkeypatch: pytest.MonkeyPatch) -> None:
    write = Calls(sampling.write_atomically)

    def full(path: Path, data: bytes) -> None:
        if write.count == 2:
            raise OSError(28, "No space left on device")
        write(path, data)

    monkeypatch.setattr(sampling, "write_atomically", full)
    result = draw()
    assert result.code == 1
    assert "No space left on device" in result.lines[-1]
    assert [line["index"] for line in lines()] == [0, 1]


def test_out_of_memory_halves_the_batch_and_marks_the_rows(draw: Draw, monkeypatch: pytest.MonkeyPatch) -> None:
    draw_batch = worker.draw_batch

    def little_memory(model: Any, drawings: Any, **kwargs: Any) -> Any:
        if len(drawings) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return draw_batch(model, drawings, **kwargs)

    monkeypatch.setattr(worker, "draw_batch", little_memory)
    result = draw("--batch_size", 4)
    assert "out of memory with 4 pictures per batch: continuing with 2" in result.err
    assert [(line["batch"], line.get("halved")) for line in lines()] == [(2, True)] * 4 + [(1, True)]


def test_out_of_memory_with_one_picture_is_a_failure(draw: Draw, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(worker, "draw_batch", no_memory)
    result = draw("--batch_size", 4)
    assert result.code == 1
    assert "out of memory" in result.lines[-1]


# Embeddings and the safety checker.


def test_prompts_are_encoded_once_for_all_runs(draw: Draw, monkeypatch: pytest.MonkeyPatch) -> None:
    encode = Calls(HiDreamImagePipeline.encode)
    monkeypatch.setattr(HiDreamImagePipeline, "encode", lambda *args, **kwargs: encode(*args, **kwargs))
    draw("--num_images_per_prompt", 2, "--output_dir", "one")
    assert encode.count == 6, "five prompts and the negative one"
    draw("--seed", 3)
    assert encode.count == 6


def test_encoding_and_drawing_can_be_two_commands(draw: Draw, tiny_folder: Path, tmp_path: Path) -> None:
    draw("--output_dir", "whole")
    result = draw("--encode_only", "--embeds", "embeds")
    assert (result.code, result.out) == (0, "embeds\n")
    assert not Path("out").exists()
    without_encoders = tmp_path / "without"
    without_encoders.mkdir()
    for part in ("model_index.json", "scheduler", "transformer", "vae"):
        (without_encoders / part).symlink_to(tiny_folder / part)
    assert draw("--embeds", "embeds", "--model_path", without_encoders).code == 0
    assert pictures() == pictures("whole")


def test_a_prompt_that_was_not_encoded_is_named(draw: Draw) -> None:
    draw("--encode_only", "--embeds", "embeds", "--limit", 3)
    assert draw("--embeds", "embeds", "--limit", 3).code == 0, "what is not asked for need not be there"
    assert "--embeds embeds lacks the prompt in line 4 of prompts.txt" in refusal(
        draw("-m", "nano", "--embeds", "embeds")
    )


def test_flagged_pictures_are_withheld_with_a_line(draw: Draw, tmp_path: Path) -> None:
    checker = write_classifier(tmp_path / "checker", {0: "normal", 1: "nsfw"})
    result = draw("--use_nsfw_filter", "--safety_checker", checker, "--limit", 2)
    assert result.code == 0
    assert pictures() == {}
    assert [(line["file"], line["withheld"]) for line in lines()] == [("", "nsfw")] * 2
    assert "withheld: 2 of them" in result.out
    assert draw("--use_nsfw_filter", "--safety_checker", checker, "--limit", 2).out.startswith("2 of 5")
    draw(
        "--use_nsfw_filter",
        "--safety_checker",
        checker,
        "--safety_threshold",
        0.9,
        "--output_dir",
        "shown",
        "--limit",
        1,
    )
    assert len(pictures("shown")) == 1
