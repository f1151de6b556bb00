"""What needs no model imports neither diffusers nor transformers, which take seconds of silence."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROGRAM = """
import sys
from hi_diffusers.commands import {script}
code = {script}.main({argv!r})
print("slow:", sorted({{"diffusers", "transformers"}} & set(sys.modules)), "code:", code)
"""


@pytest.mark.parametrize(
    ("script", "argv", "code"),
    [
        *(
            (script, ["--help"], 0)
            for script in ("inference", "sampling", "calibrate", "compare", "gradio_demo", "serve")
        ),
        ("inference", ["--plan", "-m", "full", "--quantization", "nf4"], 0),
        ("inference", ["--plan"], 0),
        ("inference", ["a prompt", "--num_steps", "0"], 2),
        ("inference", ["a prompt", "--full_steps", "60"], 2),
        ("inference", ["a prompt", "--output", "nowhere/a.png"], 2),
        ("inference", ["a prompt", "--model_path", "nowhere"], 2),
        ("sampling", ["--prompt_file", "none.txt", "--output_dir", "out"], 2),
        ("calibrate", ["--num_prompts", "0"], 2),
        ("compare", ["none", "none"], 2),
        ("gradio_demo", ["--port", "0"], 2),
        ("serve", ["--port", "0"], 2),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else str(value),
)
def test_what_needs_no_model_imports_no_large_library(script: str, argv: list[str], code: int, tmp_path: Path) -> None:
    program = PROGRAM.format(script=script, argv=argv)
    environment = {"PYTHONPATH": str(ROOT), "PATH": "", "HOME": str(tmp_path)}
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, env=environment, check=False
    )
    assert result.stdout.splitlines()[-1] == f"slow: [] code: {code}", result.stderr
