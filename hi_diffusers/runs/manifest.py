"""A run's folder: which pictures are finished, and what they are.

    run.json                       the settings that determine the pictures, written once
    manifest.jsonl                 one line per picture, appended and synced; with shards manifest-I-of-N.jsonl
    00000_00.png ...               the pictures

An incomplete last line, left by a run that was killed while writing it, is cut off when the file is opened again.
If several lines are about one picture, in one file or several, the latest one counts.
"""

import fcntl
import hashlib
import json
import os
import re
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from hi_diffusers.pictures.metadata import write_atomically
from hi_diffusers.runs.units import Numbering, Shard

RUN_FILE = "run.json"
MANIFESTS = "manifest*.jsonl"
MAX_BYTES = 2**62
WHOLE, TEXT = ("index", "image", "seed", "bytes"), ("prompt", "file", "sha256")
FIELDS: dict[str, Any] = dict.fromkeys(WHOLE, int) | dict.fromkeys(TEXT, str) | {"time": float}
PICTURE = re.compile(r"(?:\d{5,}/)?\d{5,}_\d{2,}\.(?:png|jpg|webp|mp4)")
FOREIGN = re.compile(rf"manifest.*\.jsonl|{PICTURE.pattern}")
TORN = re.compile(r"\.(?:(?P<index>\d+)_(?P<image>\d+)\.\w+|run\.json)\.[0-9a-f]{16}\.tmp")


def manifest_name(shard: Shard) -> str:
    """The file that this shard alone appends to."""
    return "manifest.jsonl" if shard.count == 1 else f"manifest-{shard.index}-of-{shard.count}.jsonl"


def sha256_of(data: bytes) -> str:
    """The SHA-256 of the data, in hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


class Manifest:
    """The manifest that one process appends to; it is locked, so that a second process is refused.

    Args:
        folder: the run's folder.
        shard: the shard that writes the manifest.

    Raises:
        ValueError: if another process draws these pictures.
        OSError: if it cannot be opened.
    """

    def __init__(self, folder: Path, shard: Shard):
        path = folder / manifest_name(shard)
        if path.is_symlink():
            raise ValueError(f"{path} is a symbolic link, but a manifest must be a regular file")
        self.file = path.open("a+b", buffering=0)
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for other in folder.glob(MANIFESTS):
                if not other.stem.endswith(f"-of-{shard.count}") and other != path:
                    _check_idle(other)
        except BlockingIOError:
            self.file.close()
            raise ValueError(f"output_dir {folder} is in use: another run draws the same pictures into it") from None
        self._cut_torn_line()

    def append(self, lines: Iterable[dict[str, Any]]) -> None:
        """Add lines and wait until they are on the disk; all of them or, with an OSError, none."""
        text = "".join(json.dumps(line, ensure_ascii=False, sort_keys=True) + "\n" for line in lines)
        data = memoryview(text.encode())
        end = self.file.seek(0, os.SEEK_END)
        try:
            while data:
                data = data[self.file.write(data) :]
            os.fsync(self.file.fileno())
        except OSError:
            self.file.truncate(end)
            raise

    def __enter__(self) -> "Manifest":
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def _cut_torn_line(self) -> None:
        size = end = self.file.seek(0, os.SEEK_END)
        while end:
            start = max(0, end - 65536)
            self.file.seek(start)
            newline = self.file.read(end - start).rfind(b"\n")
            if newline >= 0:
                end = start + newline + 1
                break
            end = start
        if end < size:
            self.file.truncate(end)


def _check_idle(manifest: Path) -> None:
    """Raise BlockingIOError if a run with another number of shards is writing."""
    with manifest.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)


def read_manifests(folder: Path) -> Iterator[dict[str, Any]]:
    """The lines of all manifests of a run, file after file; an incomplete last line is skipped.

    Raises:
        ValueError: if a line is not a manifest line, naming file and line.
    """
    for path in sorted(folder.glob(MANIFESTS)):
        with path.open("rb") as file:
            for number, data in enumerate(file, start=1):
                if not data.endswith(b"\n"):
                    break  # incomplete, or still being written
                yield _parse_line(data, path, number)


def _parse_line(data: bytes, path: Path, number: int) -> dict[str, Any]:
    try:
        line = json.loads(data.decode())
        for name, kind in FIELDS.items():
            if not isinstance(line[name], kind):
                raise TypeError(f"{name} must be {kind.__name__}")
        if line["file"] and not PICTURE.fullmatch(line["file"]):
            raise ValueError("file must be the name of a picture")
        bytes.fromhex(line["sha256"])
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(f"{path}, line {number}: not a manifest line ({error}); was it edited?") from error
    return line


def finished(folder: Path, numbering: Numbering, *, verify: bool = False) -> np.ndarray:
    """Which pictures are finished, [num_pictures], bool: they have a line, and a file of the line's size.

    A withheld picture has a line and no file.

    Args:
        verify: also compare the files' hashes.

    Raises:
        ValueError: if a line is not a manifest line, or is about a picture that the run does not have.
    """
    sizes, times = np.full(numbering.num_pictures, -1, np.int64), np.zeros(numbering.num_pictures)
    now = time.time()
    hashes = np.zeros((numbering.num_pictures if verify else 0, 32), np.uint8)
    for line in read_manifests(folder):
        index, image = line["index"], line["image"]
        number = index * numbering.num_images + image
        known = 0 <= index < numbering.num_prompts and 0 <= image < numbering.num_images
        if not known or line["file"] not in ("", numbering.file_name(number)):
            raise ValueError(
                f"{folder}: its manifest names {line['file']!r} as image {image} of prompt {index}; was it edited?"
            )
        moment = line["time"] if line["time"] <= now else 0.0  # a wrong clock's future time counts as the oldest
        if moment < times[number]:
            continue
        times[number] = moment
        sizes[number] = max(1, min(line["bytes"], MAX_BYTES)) if line["file"] else 0
        if verify and line["file"]:
            hashes[number] = np.frombuffer(bytes.fromhex(line["sha256"]), np.uint8)
    done = sizes >= 0
    for number in np.flatnonzero(sizes > 0):
        path = folder / numbering.file_name(int(number))
        try:
            done[number] = path.stat().st_size == sizes[number] and (
                not verify or hashlib.sha256(path.read_bytes()).digest() == hashes[number].tobytes()
            )
        except FileNotFoundError:
            done[number] = False
    return done


def claim_folder(folder: Path, configuration: dict[str, Any]) -> None:
    """Write a run's configuration into its folder, or check that the folder already holds the same one.

    Args:
        folder: made if it does not exist; its parent must exist.
        configuration: JSON values; "fixed" must be equal, "first" describes the run's first command.

    Raises:
        ValueError: if the folder holds another run, naming the settings that differ.
        OSError: if the folder cannot be written.
    """
    folder.mkdir(exist_ok=True)
    path = folder / RUN_FILE
    foreign = next((one for one in folder.iterdir() if FOREIGN.fullmatch(one.name)), None)
    if not path.exists() and foreign is not None:
        raise ValueError(f"output_dir {folder} holds {foreign.name} but no {RUN_FILE}: give a new folder")
    text = json.dumps(configuration, indent=1, ensure_ascii=False, sort_keys=True) + "\n"
    if not path.exists():
        write_atomically(path, text.encode(), replace=False)
    there = read_run(folder)
    differences = sorted(
        _differences(there["fixed"], json.loads(text)["fixed"]),
        key=lambda one: None in one,  # settings that only one of them has come last
    )
    if differences:
        shown = "; ".join(f"{name} is {its!r} there and {mine!r} here" for name, its, mine in differences[:4])
        raise ValueError(f"output_dir {folder} holds another run: {shown}. Give those settings, or a new folder")


def read_run(folder: Path) -> dict[str, Any]:
    """A run's configuration.

    Raises:
        ValueError: if the folder has none, or it cannot be read.
    """
    path = folder / RUN_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{folder} holds no run: there is no {path}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}; was it edited?") from error
    if not isinstance(content, dict) or not isinstance(content.get("fixed"), dict):
        raise ValueError(f"{path} is not the configuration of a run; was it edited?")
    return content


def _differences(there: Any, here: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    if isinstance(there, dict) and isinstance(here, dict):
        for key in sorted({*there, *here}):
            yield from _differences(there.get(key), here.get(key), f"{name}.{key}".lstrip("."))
    elif there != here:
        yield name, there, here


def sweep(folder: Path, numbering: Numbering, shard: Shard) -> None:
    """Remove the temporary files that killed runs of this shard left; the first shard also those of run.json."""
    mine = numbering.of_shard(shard)
    for path in (*folder.glob(".*.tmp"), *folder.glob("[0-9]*/.*.tmp")):
        torn = TORN.fullmatch(path.name)
        if torn is None:
            continue
        if torn["index"] is None:  # left from writing run.json, which exists before any sweep
            is_mine = shard.index == 0
        else:
            number = int(torn["index"]) * numbering.num_images + int(torn["image"])
            is_mine = number < len(mine) and bool(mine[number])
        if is_mine:
            path.unlink(missing_ok=True)
