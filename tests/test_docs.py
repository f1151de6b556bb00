"""What the documentation shows is run."""

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


@pytest.mark.parametrize("name", ["loop", "hooks"])
def test_the_programs_of_extending_md_run(name):
    result: dict[str, object] = {}
    exec(compile(code("docs/extending.md", name), f"extending.md:{name}", "exec"), result)
    assert result["picture"].size == (64, 64)


def test_every_file_that_the_readme_links_to_exists():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#]+)", text) if "://" not in link]
    assert links
    missing = [link for link in links if not (ROOT / link).exists()]
    assert not missing, f"README.md links to files that are not there: {missing}"
