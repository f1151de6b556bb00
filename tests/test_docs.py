"""What the documentation shows is run."""

import importlib
import re
from pathlib import Path

import pytest

import cache_functions.schedules
import taylor_utils.bases
from cache_functions import CacheConfig, planned_full_steps
from taylor_utils import basis_weights

ROOT = Path(__file__).parent.parent


def code(page: str, name: str) -> str:
    """The page's Python block of that name."""
    blocks = dict(re.findall(r"^```python (\w+)\n(.*?)^```$", (ROOT / page).read_text(encoding="utf-8"), re.M | re.S))
    return blocks[name]


def test_the_basis_of_extending_md_is_added_by_its_file_alone(tmp_path, monkeypatch):
    (tmp_path / "mean.py").write_text(code("docs/extending.md", "basis"), encoding="utf-8")
    monkeypatch.setattr(taylor_utils.bases, "__path__", [*taylor_utils.bases.__path__, str(tmp_path)])
    assert basis_weights("mean", [0, 4, 8], 10, 2) == [0.0, 0.5, 0.5]
    assert basis_weights("mean", [0], 3, 2) == [1.0]
    assert CacheConfig(basis="mean").basis == "mean"


def test_the_schedule_of_extending_md_is_added_by_its_file_alone(tmp_path, monkeypatch):
    (tmp_path / "first_half.py").write_text(code("docs/extending.md", "schedule"), encoding="utf-8")
    monkeypatch.setattr(cache_functions.schedules, "__path__", [*cache_functions.schedules.__path__, str(tmp_path)])
    config = CacheConfig(schedule="first_half", fresh_threshold=2)
    assert planned_full_steps(config, 10) == [0, 1, 2, 3, 4, 5, 7, 9]


def run(name: str) -> dict[str, object]:
    """What a block of extending.md leaves behind."""
    result: dict[str, object] = {}
    exec(compile(code("docs/extending.md", name), f"extending.md:{name}", "exec"), result)
    return result


def test_the_own_rules_of_extending_md_reach_weights_plan_and_metadata():
    found = run("own")
    slope = 0.9**2 * 2 / 4
    assert found["weights"] == [-slope, 1 + slope] and found["steps"] == [0, 4, 8, 12, 16]
    settings = found["config"].settings()
    assert settings["basis"].endswith(":damped") and settings["extras"] == {"decay": 0.9}


def test_the_cache_in_a_model_of_one_s_own_computes_a_quarter_and_draws_nearly_the_same():
    found = run("model")
    assert [block.calls for block in found["blocks"]] == [25] * 3, "20 uncached steps, and 5 of 20 cached ones"
    assert found["drawn"][False].allclose(found["drawn"][True], atol=0.05)
    assert not found["drawn"][False].equal(found["drawn"][True])


@pytest.mark.parametrize("name", ["loop", "hooks"])
def test_the_programs_of_extending_md_run(name):
    assert run(name)["picture"].size == (64, 64)


def test_every_file_that_the_readme_links_to_exists():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#]+)", text) if "://" not in link]
    assert links
    missing = [link for link in links if not (ROOT / link).exists()]
    assert not missing, f"README.md links to files that are not there: {missing}"


@pytest.mark.parametrize("script", ["inference", "sampling", "compare", "calibrate", "gradio_demo", "serve"])
def test_every_option_is_in_the_docs_with_what_help_says(script: str) -> None:
    parser = importlib.import_module(f"hi_diffusers.commands.{script}").build_parser()
    text = (ROOT / "docs" / "options.md").read_text(encoding="utf-8")
    section = text.partition(f"## {script}.py\n")[2].partition("\n## ")[0]
    shares = script in ("sampling", "gradio_demo", "serve")
    shared = text.partition("## inference.py\n")[2].partition("\n## ")[0] if shares else ""
    for action in parser._actions:
        if "--help" in action.option_strings:
            continue
        name = action.option_strings[-1] if action.option_strings else (action.metavar or action.dest)
        said = (action.help or "") % {"default": action.default}
        rows = [row for row in (section + shared).splitlines() if f"`{name}`" in row.partition(" | ")[0]]
        assert rows, f"docs/options.md lacks {name} of {script}.py"
        assert any(said.replace("|", "\\|") in row for row in rows), f"docs/options.md says something else of {name}"


def test_no_page_has_a_gap_left():
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        assert not re.findall(r"@[A-Z]+@", page.read_text(encoding="utf-8")), (
            f"{page.name} has a figure to be filled in"
        )
