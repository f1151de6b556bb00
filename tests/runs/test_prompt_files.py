"""Prompt files are read line by line; a bad line is named."""

import itertools
import tracemalloc
from pathlib import Path

import pytest

from hi_diffusers.request.options import MAX_PROMPT
from hi_diffusers.runs.prompt_files import PromptFile


def written(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def prompts(path: Path, *, raw_lines: bool = False) -> list[str]:
    return [line.prompt for line in PromptFile(path, raw_lines)]


def test_a_text_file_has_one_prompt_a_line_and_empty_lines_are_no_prompts(tmp_path: Path) -> None:
    path = written(tmp_path / "a.txt", "a cat\n\n   \n  a dog  \n")
    assert [(one.index, one.line, one.prompt) for one in PromptFile(path)] == [(0, 1, "a cat"), (1, 4, "a dog")]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_any_line_end_ends_a_line(tmp_path: Path, end: str) -> None:
    assert prompts(written(tmp_path / "a.txt", end.join(["a cat", "a dog", "ein Häuschen"]))) == [
        "a cat",
        "a dog",
        "ein Häuschen",
    ]


def test_a_byte_order_mark_is_no_part_of_the_first_prompt(tmp_path: Path) -> None:
    assert prompts(written(tmp_path / "a.txt", b"\xef\xbb\xbfa cat\na dog")) == ["a cat", "a dog"]


def test_csv_quotes_round_a_whole_line_are_undone_and_others_stay(tmp_path: Path) -> None:
    """42 of DrawBench's 200 lines are wrapped in quotes that are not part of the prompt."""
    path = written(tmp_path / "a.txt", '"A sign, ""Hi"", said"\nA sign that says "Hi"\n"one" and "two"\n')
    assert prompts(path) == ['A sign, "Hi", said', 'A sign that says "Hi"', '"one" and "two"']
    assert prompts(path, raw_lines=True)[0] == '"A sign, ""Hi"", said"'


def test_a_csv_table_has_a_prompt_column_and_quoted_line_ends(tmp_path: Path) -> None:
    path = written(tmp_path / "a.csv", 'Category,Prompts\nColors,"a red, round\nball"\nX,\nY,a cat\n')
    assert [(one.line, one.prompt) for one in PromptFile(path)] == [(2, "a red, round\nball"), (5, "a cat")]


def test_a_tsv_table_keeps_quotes_inside_a_cell(tmp_path: Path) -> None:
    path = written(tmp_path / "a.tsv", 'Prompt\tCategory\n"a" b\tx\n"a ""b"""\tx\n')
    assert prompts(path) == ['"a" b', 'a "b"']


def test_a_json_line_may_set_options(tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", '{"prompt": "a cat", "seed": 3, "width": null}\n{"prompt": "a dog"}\n')
    assert [dict(one.overrides) for one in PromptFile(path)] == [{"seed": 3}, {}]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"good\n\xff bad\n", "line 2: not UTF-8"),
        ("a.txt", b"good\n\0bad\n", "line 2: holds a zero byte"),
        ("a.txt", f"good\n\n{'x' * (MAX_PROMPT + 1)}\n", f"line 3: prompt may have at most {MAX_PROMPT} characters"),
        ("a.csv", 'Prompt\na\n"open\n', "line 3: unexpected end of data"),
        ("a.csv", "Text2\na\n", "line 1: a column must be named one of prompt"),
        ("a.csv", "x,prompt\na,b\nc\n", "line 3: has 1 columns"),
        ("a.jsonl", '{"prompt": "a"}\n{"prompt": \n', "line 2: not JSON"),
        ("a.jsonl", '["a"]\n', "line 1: must be an object with a text named prompt"),
        ("a.jsonl", '{"prompt": 3}\n', "line 1: must be an object with a text named prompt"),
        ("a.jsonl", '{"prompt": "a", "steps": 3}\n', "line 1: steps is not known; allowed are prompt, negative_prompt"),
        ("a.jsonl", "[" * 100_000, "line 1: not JSON"),
    ],
)
def test_a_bad_line_is_named_by_its_number(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    path = written(tmp_path / name, content)
    with pytest.raises(ValueError, match="a\\.") as refused:
        list(PromptFile(path))
    assert message in str(refused.value)


def test_another_kind_of_file_is_refused_by_its_suffix() -> None:
    with pytest.raises(ValueError, match=r"prompt_file must end in .*, got a\.yaml"):
        PromptFile(Path("a.yaml"))


def test_a_long_file_is_streamed(tmp_path: Path) -> None:
    """A million lines may not be held in memory: here 10 MB pass through less than one."""
    path = written(
        tmp_path / "a.txt", "a large red circle on a blue background, and more words than it needs\n" * 150_000
    )
    tracemalloc.start()
    count = sum(1 for _ in PromptFile(path))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert count == 150_000
    assert peak < 1_000_000
    first = next(itertools.islice(PromptFile(path), 100_000, None))
    assert first.line == 100_001
