"""A run's folder says what is finished, whatever happened to the run."""

import itertools
import json
import os
from pathlib import Path
from typing import Any

import pytest

from hi_diffusers.runs.manifest import (
    Manifest,
    claim_folder,
    finished,
    manifest_name,
    read_manifests,
    read_run,
    sha256_of,
    sweep,
)
from hi_diffusers.runs.units import Numbering, Shard

CLOCK = itertools.count(1.5)
RUN = Numbering(num_prompts=3, num_images=2, base_seed=0, suffix=".png", unit_size=2)


def entry(number: int, data: bytes = b"picture") -> dict[str, Any]:
    index, image = divmod(number, 2)
    made = {"index": index, "image": image, "prompt": "a", "seed": 1, "file": RUN.file_name(number)}
    return made | {"bytes": len(data), "sha256": sha256_of(data), "time": next(CLOCK)}


def draw(folder: Path, *numbers: int, data: bytes = b"picture") -> None:
    with Manifest(folder, Shard()) as manifest:
        for number in numbers:
            (folder / RUN.file_name(number)).write_bytes(data)
            manifest.append([entry(number, data)])


def test_a_picture_with_a_line_and_its_file_is_finished(tmp_path: Path) -> None:
    draw(tmp_path, 0, 3)
    assert finished(tmp_path, RUN).tolist() == [True, False, False, True, False, False]


def test_a_missing_or_shorter_file_is_not_finished(tmp_path: Path) -> None:
    draw(tmp_path, 0, 1)
    (tmp_path / RUN.file_name(0)).unlink()
    (tmp_path / RUN.file_name(1)).write_bytes(b"pic")
    assert not finished(tmp_path, RUN).any()


def test_verify_sees_other_bytes_of_the_same_length(tmp_path: Path) -> None:
    draw(tmp_path, 0)
    (tmp_path / RUN.file_name(0)).write_bytes(b"pictUre")
    assert finished(tmp_path, RUN)[0]
    assert not finished(tmp_path, RUN, verify=True)[0]


def test_a_withheld_picture_is_finished_without_a_file(tmp_path: Path) -> None:
    with Manifest(tmp_path, Shard()) as manifest:
        manifest.append([entry(0) | {"file": "", "bytes": 0, "sha256": ""}])
    assert finished(tmp_path, RUN, verify=True)[0]


def test_of_two_lines_about_a_picture_the_last_one_counts(tmp_path: Path) -> None:
    draw(tmp_path, 0)
    draw(tmp_path, 0, data=b"another picture")
    assert finished(tmp_path, RUN, verify=True)[0]


def test_a_torn_last_line_is_passed_over_and_cut_off(tmp_path: Path) -> None:
    draw(tmp_path, 0, 1)
    path = tmp_path / manifest_name(Shard())
    path.write_bytes(path.read_bytes()[:-9])
    assert finished(tmp_path, RUN).tolist()[:2] == [True, False]
    draw(tmp_path, 2)
    assert [line["index"] for line in read_manifests(tmp_path)] == [0, 1]


def test_a_manifest_that_is_one_torn_line_becomes_empty(tmp_path: Path) -> None:
    path = tmp_path / manifest_name(Shard())
    path.write_bytes(b"{" * 200_000)
    with Manifest(tmp_path, Shard()):
        pass
    assert path.read_bytes() == b""


@pytest.mark.parametrize("line", ["{nonsense", "[]", '{"index": 0}', json.dumps(entry(0) | {"index": "0"})])
def test_a_line_that_was_edited_is_named(tmp_path: Path, line: str) -> None:
    (tmp_path / "manifest.jsonl").write_text(f"{json.dumps(entry(1))}\n{line}\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"manifest\.jsonl, line 2: not a manifest line .*; was it edited\?"):
        finished(tmp_path, RUN)


@pytest.mark.parametrize("change", [{"index": 3}, {"image": -1}, {"file": "../../secret.png"}])
def test_a_line_about_no_picture_of_the_run_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    (tmp_path / "manifest.jsonl").write_text(json.dumps(entry(0) | change) + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match="was it edited"):
        finished(tmp_path, RUN)


def test_a_second_run_of_the_same_shard_is_refused_and_another_shard_is_not(tmp_path: Path) -> None:
    with Manifest(tmp_path, Shard(0, 2)), Manifest(tmp_path, Shard(1, 2)):
        with pytest.raises(ValueError, match="is in use: another run draws the same pictures"):
            Manifest(tmp_path, Shard(0, 2))
        with pytest.raises(ValueError, match="is in use"):
            Manifest(tmp_path, Shard())  # split otherwise: the same pictures again
    with Manifest(tmp_path, Shard()):
        pass


def test_all_shards_manifests_are_read_together(tmp_path: Path) -> None:
    for index in range(2):
        with Manifest(tmp_path, Shard(index, 2)) as manifest:
            manifest.append([entry(index)])
    assert [line["image"] for line in read_manifests(tmp_path)] == [0, 1]


def test_a_disk_that_is_full_leaves_the_manifest_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw(tmp_path, 0)
    before = (tmp_path / "manifest.jsonl").read_bytes()

    def no_space(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with Manifest(tmp_path, Shard()) as manifest, pytest.raises(OSError, match="No space left"):
        manifest.append([entry(1)])
    assert (tmp_path / "manifest.jsonl").read_bytes() == before


def test_the_first_command_claims_the_folder_and_a_different_one_is_refused_with_the_difference(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    first = {"fixed": {"seed": 0, "options": {"width": 64}}, "first": {"software": "1"}}
    claim_folder(folder, first)
    claim_folder(folder, first | {"first": {"software": "2"}})
    assert read_run(folder) == first
    with pytest.raises(ValueError, match=r"options\.width is 64 there and 128 here; seed is 0 there and 1 here"):
        claim_folder(folder, {"fixed": {"seed": 1, "options": {"width": 128}}, "first": {}})
    assert [path.name for path in folder.iterdir()] == ["run.json"]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"fixed": 3}'])
def test_a_configuration_that_was_edited_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "run.json").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"run\.json .*was it edited\?"):
        claim_folder(tmp_path, {"fixed": {}, "first": {}})


def test_what_a_killed_shard_left_is_swept_and_what_another_writes_is_not(tmp_path: Path) -> None:
    names = ("00000_00.png", "00001_00.png", "run.json", "foreign.png")
    files = [tmp_path / f".{name}.0123456789abcdef.tmp" for name in names]
    for path in files:
        path.touch()
    sweep(tmp_path, RUN, Shard(0, 3))
    assert [path.exists() for path in files] == [False, True, False, True]
    files[2].touch()
    sweep(tmp_path, RUN, Shard(1, 3))
    assert [path.exists() for path in files] == [False, False, True, True]
