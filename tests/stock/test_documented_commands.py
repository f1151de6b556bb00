"""The commands of docs/families.md, on tiny folders instead of published models and at tiny sizes."""

import re
import shlex
from pathlib import Path

import pytest

from hi_diffusers.commands import calibrate, inference, sampling
from hi_diffusers.commands.gradio_demo import build_parser

SCRIPTS = {"inference.py": inference.main, "sampling.py": sampling.main, "calibrate.py": calibrate.main}
FOLDERS = {"flux": "flux", "FLUX": "flux", "qwen": "qwen-image-edit", "wan": "wan", "dit": "dit"}
SMALL = {
    "flux": ("--resolution", "64x64", "--num_steps", "12"),
    "qwen-image-edit": ("--resolution", "64x64", "--num_steps", "4"),
    "wan": ("--resolution", "32x32", "--num_frames", "5", "--num_steps", "24"),
    "dit": ("--num_steps", "24"),
}
FEW = ("--num_prompts", "4", "--num_held_out", "2", "--full_steps", "4", "--calibration_dir", "calibration")
PAGE = Path(__file__).resolve().parents[2] / "docs" / "families.md"


def commands() -> list[list[str]]:
    blocks = re.findall(r"```bash\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    return [shlex.split(line)[1:] for block in blocks for line in block.splitlines()]


@pytest.mark.parametrize("command", commands(), ids=lambda command: " ".join(command[:3]))
def test_a_documented_command_does_what_it_says(
    folders: Path, picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: list[str]
) -> None:
    script, *argv = command
    if script == "gradio_demo.py":
        assert build_parser().parse_args(argv).pipeline
        return
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("a star\na fish\n")
    (tmp_path / "in.png").write_bytes(picture.read_bytes())
    place = argv.index("--pipeline") + 1
    folder = next(name for start, name in FOLDERS.items() if start in argv[place])
    argv[place] = str(folders / folder)
    argv = ["goldfish" if one == "golden retriever" else one for one in argv]
    given = SMALL[folder] if "--resolution" not in argv else ("--resolution", "64x64", "--num_steps", "12")
    assert SCRIPTS[script]([*argv, *given, *(FEW if script == "calibrate.py" else ())]) == 0
    made = [path for path in tmp_path.rglob("*") if path.suffix in (".png", ".mp4", ".webp", ".json")]
    assert len(made) > 1
