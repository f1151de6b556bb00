"""Prompt files: txt, csv, tsv and jsonl, read line by line, so that a million of them cost no memory.

A bad line is a ValueError that names the file, the line and what is wrong with it.
"""

import csv
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

COLUMNS = ("prompt", "prompts", "caption", "text")
OVERRIDES = ("negative_prompt", "seed", "width", "height", "num_steps", "guidance")
MAX_PROMPT = 10_000  # characters; a JPEG's 64 KiB of metadata must hold it and the negative prompt in UTF-16


@dataclass(frozen=True)
class PromptLine:
    """One prompt of a file.

    Attributes:
        index: among the file's prompts, from 0; empty lines do not count.
        line: where it begins in the file, from 1.
        prompt: its text.
        overrides: options that the line gives itself, names as in `SamplingOptions`.
    """

    index: int
    line: int
    prompt: str
    overrides: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class PromptFile:
    """A file of prompts.

    Attributes:
        path: .txt, one prompt a line; .csv or .tsv with a column named as one of COLUMNS; .jsonl, objects with `prompt`
            and, if they like, OVERRIDES. UTF-8, with or without a byte order mark, any line ends.
        raw_lines: take the lines of a .txt as they are; else a line that is one quoted CSV field is unquoted.
    """

    path: Path
    raw_lines: bool = False

    def __post_init__(self) -> None:
        if self.path.suffix.lower() not in _READERS:
            raise ValueError(f"prompt_file must end in {', '.join(_READERS)}, got {self.path}")
        if not self.path.is_file():
            raise ValueError(f"prompt_file must be a file, got {self.path}")

    def __iter__(self) -> Iterator[PromptLine]:
        """The prompts, in order.

        Raises:
            ValueError: for a line that cannot be read.
            OSError: if the file cannot be opened.
        """
        found = _READERS[self.path.suffix.lower()](self)
        for index, (line, prompt, overrides) in enumerate(found):
            if len(prompt) > MAX_PROMPT:
                raise self.complaint(line, f"a prompt may have {MAX_PROMPT} characters, got {len(prompt)}")
            yield PromptLine(index, line, prompt, overrides)

    def stamp(self) -> tuple[int, int]:
        """What changes when the file does: size and time of the last change."""
        found = self.path.stat()
        return found.st_size, found.st_mtime_ns

    def sha256(self) -> str:
        """Of the file's bytes."""
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def complaint(self, line: int, message: str) -> ValueError:
        """An error about one line."""
        return ValueError(f"{self.path}, line {line}: {message}")


_Found = Iterator[tuple[int, str, dict[str, Any]]]


def _lines(file: PromptFile) -> Iterator[tuple[int, str]]:
    """(number, text without its end), decoded one by one so that a bad byte has a line."""
    with file.path.open("rb") as stream:
        for number, data in enumerate(stream, start=1):
            try:
                text = data.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise file.complaint(number, f"not UTF-8: {error.reason} at byte {error.start}") from None
            if "\0" in text:
                raise file.complaint(number, "holds a zero byte; is it a text file?")
            # a lone carriage return ended lines long ago
            yield from ((number, part) for part in text.rstrip("\r\n").split("\r"))


def _read_txt(file: PromptFile) -> _Found:
    for number, text in _lines(file):
        prompt = text if file.raw_lines else _unquoted(text.strip())
        if prompt.strip():
            yield number, prompt, {}


def _unquoted(text: str) -> str:
    """A text that is one quoted CSV field, without its quotes."""
    inner = text[1:-1]
    if len(text) >= 2 and text[0] == text[-1] == '"' and '"' not in inner.replace('""', ""):
        return inner.replace('""', '"')
    return text


def _read_csv(file: PromptFile) -> _Found:
    consumed: list[int] = []

    def texts() -> Iterator[str]:
        for number, text in _lines(file):
            consumed.append(number)
            yield text + "\n"

    column = None
    try:
        for row in csv.reader(texts(), strict=True):
            first = consumed[0]
            consumed.clear()
            if not any(cell.strip() for cell in row):
                continue
            if column is None:
                column = _prompt_column(file, first, row)
            elif prompt := _cell(file, first, row, column):
                yield first, prompt, {}
    except csv.Error as error:
        raise file.complaint(consumed[0] if consumed else 1, str(error)) from error


def _read_tsv(file: PromptFile) -> _Found:
    """A tab ends a cell whatever stands before it: quotes are undone only around a whole cell."""
    column = None
    for number, text in _lines(file):
        row = [_unquoted(cell) for cell in text.split("\t")]
        if not text.strip():
            continue
        if column is None:
            column = _prompt_column(file, number, row)
        elif prompt := _cell(file, number, row, column):
            yield number, prompt, {}


def _prompt_column(file: PromptFile, line: int, header: list[str]) -> int:
    names = [name.strip().lower() for name in header]
    for wanted in COLUMNS:
        if wanted in names:
            return names.index(wanted)
    raise file.complaint(line, f"a column must be named {', '.join(COLUMNS)}, got {', '.join(header)[:80]}")


def _cell(file: PromptFile, line: int, row: list[str], column: int) -> str:
    if column >= len(row):
        raise file.complaint(line, f"has {len(row)} columns, and the prompt is in column {column + 1}")
    return row[column].strip()


def _read_jsonl(file: PromptFile) -> _Found:
    allowed = ("prompt", *OVERRIDES)
    for number, text in _lines(file):
        if not text.strip():
            continue
        try:
            content = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise file.complaint(number, f"not JSON: {error}") from None
        if not isinstance(content, dict) or not isinstance(content.get("prompt"), str):
            raise file.complaint(number, "must be an object with a text named prompt")
        for name, value in content.items():
            if name not in allowed:
                raise file.complaint(number, f"{name} is not known; allowed are {', '.join(allowed)}")
            if isinstance(value, str) and any("\ud800" <= char <= "\udfff" for char in value):
                raise file.complaint(number, f"{name} holds half a character")
        if len(content.get("negative_prompt") or "") > MAX_PROMPT:
            raise file.complaint(number, f"a negative prompt may have {MAX_PROMPT} characters")
        yield number, content.pop("prompt"), {name: value for name, value in content.items() if value is not None}


_READERS = {".txt": _read_txt, ".csv": _read_csv, ".tsv": _read_tsv, ".jsonl": _read_jsonl}
