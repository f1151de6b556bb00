"""Errors of the command line say where the documentation helps."""

import importlib
import re
from pathlib import Path

import pytest

from hi_diffusers.console import BY_SETTING, BY_WORDS, SCRIPTS, SERVING, place_for

ROOT = Path(__file__).parents[1]
PLACES = {*BY_SETTING.values(), *(place for _, place in BY_WORDS), *SERVING.values()} - {"{serving}"}
REFUSED = [
    ("inference", "--full_steps 0", "README.md#the-cache"),
    ("inference", "--lora nothing.safetensors", "docs/models.md#lora"),
    ("inference", "--image nothing.png", "docs/pictures.md#what-is-refused"),
    ("inference", "--bogus", "docs/options.md#inferencepy"),
    ("inference", "--num_steps 0", "docs/options.md#inferencepy"),
    ("inference", "--fp8 --lora a.safetensors", "docs/models.md#speed-flags"),
    ("inference", "--quality high --num_steps 47", "docs/method.md#one-theory-a-run-with-k-evaluations-is-a-solver"),
    ("inference", "--model_path nowhere", "docs/models.md#what-is-refused-and-how"),
    ("inference", "--fps 3", "docs/families.md#what-is-refused-and-why"),
    ("sampling", "--prompt_file none.txt --output_dir out", "docs/sampling.md"),
    ("gradio_demo", "--host 0.0.0.0", "docs/demo.md#serving-others"),
    ("gradio_demo", "--host 0.0.0.0 --no_auth --allow_download", "docs/demo.md#serving-others"),
    ("serve", "--host 0.0.0.0", "docs/serving.md"),
    ("calibrate", "--full_steps 0", "README.md#the-cache"),
    ("compare", "none nowhere", "docs/options.md#comparepy"),
]


@pytest.mark.parametrize(("script", "flags", "place"), REFUSED, ids=str)
def test_a_refusal_names_the_part_that_helps(script, flags, place, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert importlib.import_module(f"hi_diffusers.commands.{script}").main(flags.split()) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"{script}.py: error: ") and last.endswith(f" (see {place})")


def anchors(path: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("place", sorted(PLACES | {f"docs/options.md#{one.replace('.', '')}" for one in SCRIPTS}))
def test_every_place_exists(place):
    name, _, anchor = place.partition("#")
    assert not anchor or anchor in anchors(ROOT / name)


def test_every_setting_is_a_flag():
    flags = set()
    for script in SCRIPTS:
        parser = importlib.import_module(f"hi_diffusers.commands.{script.removesuffix('.py')}").build_parser()
        flags |= {action.dest for action in parser._actions}
    assert {name for names in BY_SETTING for name in names.split()} - {"mask_image"} <= flags


def test_what_helps_is_told_by_words_where_no_setting_begins_the_sentence():
    assert place_for("a/b is gated: ask for access", "inference.py") == "docs/models.md#which-files"
    assert place_for("CUDA ran out of memory", "sampling.py") == "docs/models.md#memory"
    assert place_for("anything", "python -m benchmarks.quality") is None
