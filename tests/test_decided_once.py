"""A request is decided once: a command resolves options and cache, finds files and hashes weights one time."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hi_diffusers.commands import inference, sampling
from hi_diffusers.families.hidream import family
from hi_diffusers.request import drawing
from hi_diffusers.request.options import SamplingOptions
from hi_diffusers.weights import identity

PROMPT = "a red circle on a blue background"


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each of the four is done."""
    found: Counter[str] = Counter()

    def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            found[name] += 1
            return function(*args, **kwargs)

        return call

    for owner, name in ((SamplingOptions, "resolve"), (family, "locate"), (identity, "fingerprint")):
        monkeypatch.setattr(owner, name, counted(name, getattr(owner, name)))
    monkeypatch.setattr(drawing, "resolve", counted("cache", drawing.resolve))
    return found


def test_for_one_picture(calls: Counter[str], nano_folder: Path, tmp_path: Path) -> None:
    assert inference.main([PROMPT, "--device", "cpu", "--num_steps", "4", "-o", str(tmp_path / "a.png")]) == 0
    assert calls == {"resolve": 1, "cache": 1, "locate": 1, "fingerprint": 1}


@pytest.mark.parametrize("own", ["", ', "num_steps": 5'])
def test_for_three_prompts(own: str, calls: Counter[str], nano_folder: Path, tmp_path: Path) -> None:
    lines = [f'{{"prompt": "{PROMPT}"}}', f'{{"prompt": "a"{own}}}', f'{{"prompt": "b"{own}}}']
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines), encoding="utf-8")
    argv = ["--prompt_file", str(tmp_path / "prompts.jsonl"), "--output_dir", str(tmp_path / "out")]
    assert sampling.main([*argv, "--device", "cpu", "--num_steps", "4"]) == 0
    decided = 2 if own else 1  # two lines ask for the same
    assert calls == {"resolve": decided, "cache": decided, "locate": 1, "fingerprint": 1}
