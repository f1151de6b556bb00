"""Prompt files: txt, csv, tsv and jsonl, read line by line, so that a million prompts need little memory.

A bad line is a ValueError that names the file, the line and what is wrong with it.
"""

import csv
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hi_diffusers.request.options import check_prompt

COLUMNS = ("prompt", "prompts", "caption", "text")
OVERRIDES = ("negative_prompt", "seed", "width", "height", "num_steps", "guidance", "image", "mask", "strength", "fit")
OF_PIPELINES = (*OVERRIDES[:-1], "true_cfg", "num_frames")  # pipelines fit pictures themselves
"""The options that a line may set for pipelines of diffusers."""
TEXTS = ("negative_prompt", "image", "mask", "fit")
NUMBERS = ("guidance", "strength", "true_cfg")  # the others are whole numbers
WIDE = {b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}  # byte order marks
_KINDS: dict[Any, str] = {str: "text", int | float: "a number", int: "a whole number"}


@dataclass(frozen=True)
class PromptLine:
    """One prompt of a file.

    Attributes:
        index: number of the prompt in the file, from 0; empty lines do not count.
        line: line number where it begins in the file, from 1.
        prompt: the text.
        overrides: options that the line sets, named as in `SamplingOptions`.
    """

    index: int
    line: int
    prompt: str
    overrides: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class PromptFile:
    """A file of prompts.

    Attributes:
        path: .txt, one prompt per line; .csv or .tsv with a column named as one of COLUMNS; .jsonl, objects with
            `prompt`. In the last three a line may set options, as columns or names. UTF-8, or UTF-16 with a
            byte order mark; any line ends.
        raw_lines: keep the lines of a .txt unchanged; else a line that is one quoted CSV field is unquoted.
        names: the options that a line may set.
    """

    path: Path
    raw_lines: bool = False
    names: tuple[str, ...] = OVERRIDES

    def __post_init__(self) -> None:
        if self.path.suffix.lower() not in _READERS:
            raise ValueError(f"prompt_file must end in {', '.join(_READERS)}, got {self.path}")
        if not self.path.is_file():
            raise ValueError(f"prompt_file must be a file, got {self.path}")

    def __iter__(self) -> Iterator[PromptLine]:
        """The prompts, in order.

        Raises:
            ValueError: if a line cannot be read.
            OSError: if the file cannot be opened.
        """
        found = _READERS[self.path.suffix.lower()](self)
        for index, (line, prompt, overrides) in enumerate(found):
            try:
                check_prompt("prompt", prompt)
                check_prompt("negative_prompt", overrides.get("negative_prompt", ""))
            except ValueError as error:
                raise self.complaint(line, str(error)) from None
            yield PromptLine(index, line, prompt, overrides)

    def unread_columns(self) -> tuple[str, ...]:
        """Names of a table's columns that are ignored; empty for other formats.

        Raises:
            ValueError: if its first line cannot be read.
        """
        kind = self.path.suffix.lower()
        if kind not in (".csv", ".tsv"):
            return ()
        for number, text in _lines(self):
            if text.strip():
                row = next(csv.reader([text])) if kind == ".csv" else [_unquoted(cell) for cell in text.split("\t")]
                return _Columns.of(self, number, row).others
        return ()

    def stamp(self) -> tuple[int, int]:
        """Size and time of the last change, to notice that the file was changed."""
        found = self.path.stat()
        return found.st_size, found.st_mtime_ns

    def sha256(self) -> str:
        """The SHA-256 of the file's bytes, in hexadecimal digits."""
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def complaint(self, line: int, message: str) -> ValueError:
        """An error that names the file and the line."""
        return ValueError(f"{self.path}, line {line}: {message}")


_Found = Iterator[tuple[int, str, dict[str, Any]]]


def _lines(file: PromptFile) -> Iterator[tuple[int, str]]:
    """Pairs (line number, text without line end), decoded one by one so that an error can name its line."""
    with file.path.open("rb") as stream:
        wide = WIDE.get(stream.read(2))
    if wide is not None:
        with file.path.open(encoding="utf-16", errors="surrogatepass", newline="") as wide_stream:
            number = 0
            try:
                for number, line in enumerate(wide_stream, start=1):
                    if any("\ud800" <= char <= "\udfff" for char in line):
                        raise file.complaint(number, "holds half a character")
                    yield from ((number, part) for part in line.rstrip("\r\n").split("\r"))
            except UnicodeDecodeError as error:
                raise file.complaint(number + 1, f"not UTF-16: {error.reason}") from None
        return
    with file.path.open("rb") as stream:
        for number, data in enumerate(stream, start=1):
            try:
                text = data.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise file.complaint(number, f"not UTF-8: {error.reason} at byte {error.start}") from None
            if "\0" in text:
                raise file.complaint(number, "holds a zero byte; is it a text file?")
            # a lone carriage return is a line end, too
            yield from ((number, part) for part in text.rstrip("\r\n").split("\r"))


def _read_txt(file: PromptFile) -> _Found:
    for number, text in _lines(file):
        prompt = text if file.raw_lines else _unquoted(text.strip())
        if prompt.strip():
            yield number, prompt, {}


def _unquoted(text: str) -> str:
    """The text without its quotes if it is one quoted CSV field, else unchanged."""
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

    columns = None
    try:
        for row in csv.reader(texts(), strict=True):
            first = consumed[0]
            consumed.clear()
            if not any(cell.strip() for cell in row):
                continue
            if columns is None:
                columns = _Columns.of(file, first, row)
            elif prompt := columns.prompt_of(file, first, row):
                yield first, prompt, columns.overrides_of(file, first, row)
    except csv.Error as error:
        raise file.complaint(consumed[0] if consumed else 1, str(error)) from error


def _read_tsv(file: PromptFile) -> _Found:
    """Read a .tsv: every tab ends a cell, and quotes are removed only around a whole cell."""
    columns = None
    for number, text in _lines(file):
        row = [_unquoted(cell) for cell in text.split("\t")]
        if not text.strip():
            continue
        if columns is None:
            columns = _Columns.of(file, number, row)
        elif prompt := columns.prompt_of(file, number, row):
            yield number, prompt, columns.overrides_of(file, number, row)


@dataclass(frozen=True)
class _Columns:
    """Where a table's columns are.

    Attributes:
        prompt: index of the prompts' column.
        overrides: option -> index of its column.
        others: names of the columns that are ignored.
    """

    prompt: int
    overrides: Mapping[str, int]
    others: tuple[str, ...]

    @classmethod
    def of(cls, file: PromptFile, line: int, header: list[str]) -> "_Columns":
        names = [name.strip().lower() for name in header]
        twice = sorted({name for name in names if names.count(name) > 1 and name in (*COLUMNS, *file.names)})
        if twice:
            raise file.complaint(line, f"has two columns named {twice[0]}")
        prompt = next((name for name in COLUMNS if name in names), None)
        if prompt is None:
            raise file.complaint(
                line, f"a column must be named one of {', '.join(COLUMNS)}, got {', '.join(header)[:80]}"
            )
        overrides = {name: names.index(name) for name in file.names if name in names}
        return cls(names.index(prompt), overrides, tuple(one for one in names if one not in (prompt, *overrides)))

    def prompt_of(self, file: PromptFile, line: int, row: list[str]) -> str:
        if self.prompt >= len(row):
            raise file.complaint(line, f"has {len(row)} columns, and the prompt is in column {self.prompt + 1}")
        return row[self.prompt].strip()

    def overrides_of(self, file: PromptFile, line: int, row: list[str]) -> dict[str, Any]:
        """The options that a row sets; an empty cell sets none."""
        found: dict[str, Any] = {}
        for name, index in self.overrides.items():
            text = row[index].strip() if index < len(row) else ""
            if not text:
                continue
            try:
                found[name] = text if name in TEXTS else float(text) if name in NUMBERS else int(text)
            except ValueError:
                kind = "a number" if name in NUMBERS else "a whole number"
                raise file.complaint(line, f"{name} must be {kind}, got {text[:60]!r}") from None
        return found


def _read_jsonl(file: PromptFile) -> _Found:
    allowed = ("prompt", *file.names)
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
                raise file.complaint(number, f"{name[:60]} is not known; allowed are {', '.join(allowed)}")
            kinds = str if name in ("prompt", *TEXTS) else int | float if name in NUMBERS else int
            if value is not None and (isinstance(value, bool) or not isinstance(value, kinds)):
                raise file.complaint(number, f"{name} must be {_KINDS[kinds]}, got {str(value)[:60]!r}")
        yield number, content.pop("prompt"), {name: value for name, value in content.items() if value is not None}


_READERS = {".txt": _read_txt, ".csv": _read_csv, ".tsv": _read_tsv, ".jsonl": _read_jsonl}
