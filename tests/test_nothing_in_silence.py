"""What would draw another picture than was asked for, or lose one, is said, refused or mended."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from cache_functions import CalibrationShelf
from cache_functions.calibration import Calibration
from hi_diffusers.commands import inference, sampling
from hi_diffusers.commands.inference import free_name
from hi_diffusers.engine.embeds import EmbedsCache
from hi_diffusers.families.hidream.prompts import PromptEmbeds
from hi_diffusers.pictures.metadata import read_metadata, write_picture
from hi_diffusers.runs.prompt_files import PromptFile
from hi_diffusers.runs.units import Shard, find_shard

PROMPT = "a red circle on a blue background"
LONG = "a large red circle to the left of a small blue square to the left of a green star on a white background"
FLAGS = ["--device", "cpu", "--num_steps", "2", "--cache", "off"]


# Pictures that were there before.


def test_a_name_that_was_not_given_never_replaces_a_picture(
    nano_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for prompt in (PROMPT, "a green star on a red background", "a blue ring on a white background"):
        assert inference.main([prompt, *FLAGS, "--seed", "7"]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hidream-7-2.png", "hidream-7-3.png", "hidream-7.png"]
    assert read_metadata("hidream-7.png")["options"]["prompt"] == PROMPT
    assert capsys.readouterr().out.splitlines()[1::2] == ["hidream-7.png", "hidream-7-2.png", "hidream-7-3.png"]


def test_what_compare_writes_beside_a_picture_counts_too(tmp_path: Path) -> None:
    (tmp_path / "a_uncached.png").touch()
    assert free_name(tmp_path / "a.png") == tmp_path / "a-2.png"
    assert free_name(tmp_path / "b.png") == tmp_path / "b.png"


def test_a_given_name_replaces_and_several_pictures_have_their_seeds_in_it(nano_folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "a.png"
    output.write_bytes(b"old")
    assert inference.main([PROMPT, *FLAGS, "--seed", "3", "-o", str(output)]) == 0
    assert read_metadata(output)["options"]["seed"] == 3
    assert inference.main([PROMPT, *FLAGS, "--seed", "3", "--num_images", "3", "-o", str(output)]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a-3.png", "a-4.png", "a-5.png", "a.png"]
    assert output.read_bytes() == (tmp_path / "a-3.png").read_bytes()


# Prompts that are cut.


def test_a_negative_prompt_that_is_cut_is_said(
    nano_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [PROMPT, *FLAGS, "--negative_prompt", LONG, "--max_sequence_length", "12", "-o", str(tmp_path / "a.png")]
    assert inference.main(argv) == 0
    assert "the negative prompt is cut at 12 tokens; lost: " in capsys.readouterr().err


def test_sampling_says_how_many_prompts_are_cut_and_notes_each(
    nano_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "p.txt").write_text(f"{PROMPT}\n{LONG}\n{LONG} and a pink house\n", encoding="utf-8")
    argv = ["--prompt_file", str(tmp_path / "p.txt"), "--output_dir", str(tmp_path / "out"), *FLAGS]
    assert sampling.main([*argv, "--max_sequence_length", "12"]) == 0
    assert "the prompts of 2 pictures were cut at 12 tokens; the first is prompt 1, whose prompt loses" in (
        capsys.readouterr().err
    )
    lines = [json.loads(line) for line in (tmp_path / "out" / "manifest.jsonl").read_text().splitlines()]
    assert [list(line.get("cut", ())) for line in lines] == [[], ["prompt"], ["prompt"]]


# Options of a line, whatever the format.

ROWS = [
    {"prompt": "a", "seed": 5, "guidance": 2.5},
    {"prompt": "b", "negative_prompt": "c, d", "width": 64},
    {"prompt": "e"},
]


def as_table(separator: str) -> str:
    names = ("prompt", "seed", "guidance", "negative_prompt", "width")
    quoted = [[f'"{row.get(name, "")}"' for name in names] for row in ROWS]
    return "\n".join(separator.join(cells) for cells in [list(names), *quoted])


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("p.csv", as_table(",")),
        ("p.tsv", as_table("\t")),
        ("p.jsonl", "\n".join(map(json.dumps, ROWS))),
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_line_has_the_same_options_in_every_format(name: str, text: str, encoding: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text, encoding=encoding)
    found = [{"prompt": line.prompt, **line.overrides} for line in PromptFile(tmp_path / name)]
    assert found == ROWS


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.csv", "prompt,seed\na,seven\n", "line 2: seed must be a whole number, got 'seven'"),
        ("p.csv", "prompt,guidance\na,much\n", "line 2: guidance must be a number, got 'much'"),
        ("p.tsv", "prompt\twidth\na\t6.5\n", "line 2: width must be a whole number, got '6.5'"),
        ("p.csv", "prompt,seed,seed\na,1,2\n", "line 1: has two columns named seed"),
        ("p.jsonl", '{"prompt": "a", "seed": "7"}', "line 1: seed must be a whole number, got '7'"),
        ("p.jsonl", '{"prompt": "a", "num_steps": true}', "line 1: num_steps must be a whole number, got 'True'"),
        ("p.jsonl", '{"prompt": "a", "negative_prompt": 7}', "line 1: negative_prompt must be text, got '7'"),
    ],
)
def test_an_option_of_a_wrong_kind_is_refused_with_its_line(name: str, text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        list(PromptFile(tmp_path / name))


def test_columns_that_are_not_read_are_named(
    nano_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "p.csv").write_text("Prompts,Category,seed\na red star,x,7\n", encoding="utf-8")
    argv = ["--prompt_file", str(tmp_path / "p.csv"), "--output_dir", str(tmp_path / "out"), *FLAGS]
    assert sampling.main(argv) == 0
    assert "p.csv that are ignored: category" in capsys.readouterr().err
    (line,) = (tmp_path / "out" / "manifest.jsonl").read_text().splitlines()
    assert json.loads(line)["seed"] == 7


# Embeddings that are not what was written.


@pytest.fixture
def entry(tmp_path: Path) -> tuple[EmbedsCache, Path, PromptEmbeds]:
    embeds = PromptEmbeds(torch.randn(1, 4, 8), torch.randn(2, 1, 4, 8), torch.randn(1, 6))
    cache = EmbedsCache(tmp_path / "embeds", PromptEmbeds, 4)
    cache.fill([PROMPT], lambda _: embeds)
    (path,) = (tmp_path / "embeds").iterdir()
    return cache, path, embeds


def rewritten(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        from safetensors import safe_open

        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        tensors = load_file(path)
        save_file(tensors | {"t5": change(tensors["t5"])}, path, metadata)

    return write


def flip(place: int) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[place] ^= 1
        path.write_bytes(data)

    return write


@pytest.mark.parametrize(
    "damage",
    [flip(-1), flip(-40), flip(-200), rewritten(torch.Tensor.half), rewritten(lambda t: t[:, :2].clone())],
    ids=["last bit", "a bit", "another bit", "dtype", "shape"],
)
def test_an_entry_that_is_not_as_it_was_written_is_made_again(
    damage: Callable[[Path], None], entry: tuple[EmbedsCache, Path, PromptEmbeds]
) -> None:
    cache, path, embeds = entry
    damage(path)
    found = cache.get([PROMPT], lambda _: embeds, torch.device("cpu"))
    assert torch.equal(found.t5, embeds.t5) and found.t5.dtype == torch.float32
    cache.fill([PROMPT], lambda _: embeds)
    assert torch.equal(
        cache.get([PROMPT], lambda _: pytest.fail("it was not made again"), embeds.t5.device).t5, embeds.t5
    )


# Shards that nobody draws.


@pytest.mark.parametrize(
    ("variables", "shard"),
    [
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, Shard()),  # sbatch without srun: one process runs
        ({"SLURM_PROCID": "2", "SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "4"}, Shard(2, 4)),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "1"}, Shard(0, 1)),
        ({"RANK": "1", "WORLD_SIZE": "2"}, Shard(1, 2)),
    ],
)
def test_a_shard_is_taken_from_what_runs(
    variables: dict[str, str], shard: Shard, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert find_shard(None)[0] == shard


def test_a_shard_says_which_others_have_drawn_nothing(
    nano_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "p.txt").write_text("a\nb\nc\n", encoding="utf-8")
    argv = ["--prompt_file", str(tmp_path / "p.txt"), "--output_dir", str(tmp_path / "out"), *FLAGS]
    assert sampling.main([*argv, "--shard", "0/3"]) == 0
    assert "nothing was drawn yet by shards 1, 2" in capsys.readouterr().err


# Calibrations that cannot be believed.


def write_edited(path: Path, source: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    content = json.loads(source.read_text(encoding="utf-8"))
    edit(content)
    path.write_text(json.dumps(content), encoding="utf-8")


def first_choice(content: dict[str, Any]) -> dict[str, Any]:
    choice: dict[str, Any] = next(iter(content["choices"].values()))
    return choice


EDITS: dict[str, Callable[[dict[str, Any]], None]] = {
    "NaN in the matrix": lambda c: c["gram"][3].__setitem__(4, float("nan")),
    "infinity in the matrix": lambda c: c["gram"][3].__setitem__(4, float("inf")),
    "a matrix that is none": lambda c: c["gram"][3].__setitem__(4, 99.0),
    "noise that rises": lambda c: c["sigmas"].reverse(),
    "steps of text": lambda c: c["key"].__setitem__("num_steps", "50"),
    "no steps": lambda c: c["key"].__setitem__("num_steps", 0),
    "a shift of text": lambda c: c["key"].__setitem__("shift", "3"),
    "a choice of other steps": lambda c: first_choice(c).__setitem__("full_steps", [0, 1]),
    "a choice that falls": lambda c: first_choice(c)["full_steps"].reverse(),
    "a choice of text": lambda c: first_choice(c).__setitem__("ridge", "0.1"),
    "an unknown prior": lambda c: first_choice(c).__setitem__("prior", "os"),
    "a huge order": lambda c: first_choice(c).__setitem__("max_order", 10**6),
    "no choice": lambda c: c["choices"].clear(),
}


@pytest.fixture(scope="module")
def good(nano_folder: Path) -> Path:
    return sorted((nano_folder / "calibration").glob("nano-unipc50-guidance2-x0*.json"))[0]


@pytest.mark.parametrize("edit", EDITS)
def test_a_calibration_that_does_not_hold_together_is_refused_by_name(edit: str, good: Path, tmp_path: Path) -> None:
    write_edited(tmp_path / "bad.json", good, EDITS[edit])
    with pytest.raises(ValueError, match=r"calibration .*bad\.json is not a calibration file: "):
        Calibration.read(tmp_path / "bad.json")


@pytest.mark.parametrize("text", ["[" * 100_000, '{"version": 1, "key": 1e999}', "", "\0", '{"version": 1}', "null"])
def test_a_bad_file_in_a_searched_folder_is_skipped_with_its_name(
    text: str, nano_folder: Path, good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(good, tmp_path / "good.json")
    (tmp_path / "bad.json").write_text(text, encoding="utf-8")
    shelf = CalibrationShelf("x", (tmp_path,))
    assert len(shelf.all()) == 1 and "bad.json" in shelf.faults()[0]
    argv = [PROMPT, "--device", "cpu", "--calibration_dir", str(tmp_path), "--full_steps", "5", "--cache", "best"]
    assert inference.main([*argv, "-o", str(tmp_path / "a.png")]) == 0
    assert "bad.json" in capsys.readouterr().err


# What a picture names.


@pytest.mark.parametrize("named", ["/dev/zero", "calibration.json", "../../etc/passwd", "//host/share"])
def test_a_picture_names_a_calibration_by_hash_alone(
    named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = {"target": "x0", "basis": "learned", "schedule": "cosine", "calibration": named}
    metadata = {"version": 1, "model": {"model_type": "nano"}, "options": {"prompt": PROMPT}, "cache": cache}
    write_picture(Image.fromarray(np.zeros((8, 8, 3), np.uint8)), tmp_path / "a.png", metadata)
    assert inference.main(["--like", str(tmp_path / "a.png"), "-o", str(tmp_path / "b.png")]) == 2
    assert "by a path, and only a hash is accepted" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["prompt", "negative_prompt"])
def test_a_picture_s_endless_prompt_is_refused(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = {"prompt": PROMPT} | {name: "a" * 300_000}
    metadata = {"version": 1, "model": {"model_type": "nano"}, "options": options, "cache": {}}
    write_picture(Image.fromarray(np.zeros((8, 8, 3), np.uint8)), tmp_path / "a.png", metadata)
    assert inference.main(["--like", str(tmp_path / "a.png"), "-o", str(tmp_path / "b.png")]) == 2
    assert f"{name} may have at most 10000 characters, got 300000" in capsys.readouterr().err
