"""sampling.py --pipeline: manifests, resuming, columns, what lines may set."""

import functools
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from hi_diffusers.commands.compare import main as compare
from hi_diffusers.commands.sampling import main
from hi_diffusers.runs.manifest import read_manifests
from hi_diffusers.stock.drawing import StockModel
from tests.stock.conftest import sha256

NUM_KILLS = 8
ROOT = Path(__file__).resolve().parents[2]
FLUX = ("--resolution", "64x64", "--num_steps", "12", "--full_steps", "4")


def run(*argv: object) -> int:
    return main([str(one) for one in argv])


def lines(folder: Path) -> list[dict[str, Any]]:
    latest = {(line["index"], line["image"]): line for line in read_manifests(folder)}
    return [{k: v for k, v in latest[key].items() if k not in ("seconds", "time")} for key in sorted(latest)]


def write_lines(path: Path, content: list[dict[str, Any]]) -> Path:
    path.write_text("\n".join(map(json.dumps, content)) + "\n", encoding="utf-8")
    return path


def test_a_run_is_drawn_resumed_and_each_prompt_is_encoded_once(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    encoded: list[Any] = []
    once = StockModel._encode_once

    def counted(self: StockModel) -> None:
        encode = self.pipe.encode_prompt

        @functools.wraps(encode)
        def count(*args: Any, **kwargs: Any) -> Any:
            encoded.append(kwargs["prompt"])
            return encode(*args, **kwargs)

        self.pipe.encode_prompt = count
        once(self)

    monkeypatch.setattr(StockModel, "_encode_once", counted)
    prompts = write_lines(tmp_path / "p.jsonl", [{"prompt": "a star"}, {"prompt": "a fish", "num_steps": 6}])
    command = ("--pipeline", folders / "flux", *FLUX, "--prompt_file", prompts, "--num_images_per_prompt", 3)
    assert run(*command, "--output_dir", tmp_path / "whole") == 0
    assert encoded == ["a star", "a fish"]
    assert run(*command, "--output_dir", tmp_path / "parts", "--limit", 1) == 0
    assert run(*command, "--output_dir", tmp_path / "parts") == 0
    assert run(*command, "--output_dir", tmp_path / "parts") == 0
    assert "6 of 6 pictures are finished" in capsys.readouterr().out
    assert lines(tmp_path / "whole") == lines(tmp_path / "parts")
    for path in (tmp_path / "whole").glob("*.png"):
        assert path.read_bytes() == (tmp_path / "parts" / path.name).read_bytes()
    first, last = lines(tmp_path / "whole")[0], lines(tmp_path / "whole")[-1]
    assert (first["full_steps"], first["forecast_steps"], first["calls"]) == (4, 8, 4)
    assert last["options"]["num_steps"] == 6
    assert run(*command, "--output_dir", tmp_path / "parts", "--guidance", 5) == 2
    assert "holds another run" in capsys.readouterr().err


def test_a_batch_is_the_pictures_alone_nearly(folders: Path, tmp_path: Path) -> None:
    prompts = write_lines(tmp_path / "p.jsonl", [{"prompt": "a star"}, {"prompt": "a fish"}, {"prompt": "a tree"}])
    command = ("--pipeline", folders / "flux", *FLUX, "--prompt_file", prompts)
    assert run(*command, "--output_dir", tmp_path / "one") == 0
    assert run(*command, "--output_dir", tmp_path / "two", "--batch_size", 2) == 0
    assert [line["batch"] for line in lines(tmp_path / "two")] == [2, 2, 1]
    for path in (tmp_path / "one").glob("*.png"):
        one, other = (np.asarray(Image.open(folder / path.name)) for folder in (tmp_path / "one", tmp_path / "two"))
        assert np.abs(one.astype(int) - other).max() <= 2
    assert [line["seed"] for line in lines(tmp_path / "two")] == [line["seed"] for line in lines(tmp_path / "one")]


def test_videos_have_the_hash_of_their_frames(folders: Path, tmp_path: Path) -> None:
    prompts = write_lines(tmp_path / "p.jsonl", [{"prompt": "a star"}, {"prompt": "a fish", "num_frames": 9}])
    flags = ("--resolution", "32x32", "--num_frames", 5, "--num_steps", 8, "--full_steps", 3)
    out = tmp_path / "out"
    command = ("--pipeline", folders / "wan", *flags, "--prompt_file", prompts, "--format", "webp")
    assert run(*command, "--output_dir", out, "--add_sampling_metadata") == 0
    assert [line["frames"] for line in lines(out)] == [5, 9]
    beside = json.loads((out / "00000_00.webp.json").read_text())
    assert beside["frames_sha256"] == lines(out)[0]["frames_sha256"]
    assert run(*command, "--output_dir", tmp_path / "png", "--format", "png") == 2


@pytest.mark.parametrize("suffix", ["webp", "mp4"])
def test_two_runs_of_videos_are_compared_over_all_frames(
    folders: Path, tmp_path: Path, suffix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("imageio_ffmpeg")
    prompts = write_lines(tmp_path / "p.jsonl", [{"prompt": "a star"}, {"prompt": "a fish"}])
    flags = ("--resolution", "32x32", "--num_frames", 5, "--num_steps", 8, "--format", suffix)
    command = ("--pipeline", folders / "wan", *flags, "--prompt_file", prompts, "--output_dir")
    assert run(*command, tmp_path / "whole", "--cache", "off") == 0
    assert run(*command, tmp_path / "cached", "--full_steps", 3) == 0
    figures = tmp_path / "figures.json"
    assert compare([str(tmp_path / "whole"), str(tmp_path / "cached"), "--json", str(figures)]) == 0
    pairs = json.loads(figures.read_text())["pairs"]
    assert len(pairs) == 2 and all(5 < pair["psnr"] < 60 for pair in pairs)


def test_lines_name_pictures_beside_the_prompt_file(
    folders: Path, tmp_path: Path, picture: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in").mkdir()
    copy = tmp_path / "in" / "a.png"
    copy.write_bytes(picture.read_bytes())
    prompts = write_lines(tmp_path / "p.jsonl", [{"prompt": "make it blue", "image": "in/a.png"}])
    flags = ("--resolution", "64x64", "--num_steps", 4, "--full_steps", 2)
    command = ("--pipeline", folders / "qwen-image-edit", *flags, "--prompt_file", prompts, "--output_dir")
    assert run(*command, tmp_path / "out") == 0
    assert lines(tmp_path / "out")[0]["options"]["images"] == [sha256(picture)]
    for bad in ("../a.png", "/etc/passwd", "in/none.png"):
        write_lines(prompts, [{"prompt": "make it blue", "image": bad}])
        assert run(*command, tmp_path / "bad") == 2
        assert "line 1: image" in capsys.readouterr().err
        assert not (tmp_path / "bad").exists()


def test_bad_lines_are_named(folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cases = {
        "dit": ({"prompt": "cat"}, "line 1: prompt must be a class's number or name"),
        "flux": ({"prompt": "a", "num_frames": 5}, "line 1: num_frames is not taken by FluxPipeline"),
        "wan": ({"prompt": "a", "num_frames": 6}, "line 1: num_frames must be a multiple of 4"),
    }
    for name, (line, message) in cases.items():
        prompts = write_lines(tmp_path / "p.jsonl", [line])
        assert run("--pipeline", folders / name, "--prompt_file", prompts, "--output_dir", tmp_path / "out") == 2
        assert message in capsys.readouterr().err
    prompts = write_lines(tmp_path / "p.jsonl", [{"prompt": "1"}, {"prompt": "tench"}])
    assert run("--pipeline", folders / "dit", "--prompt_file", prompts, "--output_dir", tmp_path / "out") == 0
    assert run("--prompt_file", prompts, "--output_dir", tmp_path / "nano", "--format", "mp4") == 2
    assert "format" in capsys.readouterr().err


@pytest.mark.slow
def test_killed_at_any_moment_the_end_is_the_same_bit_by_bit(folders: Path, tmp_path: Path) -> None:
    prompts = write_lines(tmp_path / "p.jsonl", [{"prompt": f"a star number {i}"} for i in range(400)])
    flags = ("--pipeline", folders / "flux", *FLUX, "--prompt_file", prompts, "--threads", 1, "--batch_size", 3)
    command = [sys.executable, str(ROOT / "sampling.py"), *map(str, flags), "--output_dir"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "env": environment}
    subprocess.run([*command, str(tmp_path / "whole")], check=True, **quiet)
    folder = tmp_path / "killed"
    for _ in range(NUM_KILLS):
        before = len(list(folder.glob("*.png")))
        process = subprocess.Popen([*command, str(folder)], **quiet)
        while process.poll() is None and len(list(folder.glob("*.png"))) <= before:
            time.sleep(0.02)
        time.sleep(random.uniform(0.0, 0.4))
        assert process.poll() is None, "it ended before it was killed"
        process.send_signal(signal.SIGKILL)
        process.wait()
    subprocess.run([*command, str(folder)], check=True, **quiet)
    assert lines(tmp_path / "killed") == lines(tmp_path / "whole")
    for path in (tmp_path / "whole").glob("*.png"):
        assert path.read_bytes() == (tmp_path / "killed" / path.name).read_bytes()
    assert not list((tmp_path / "killed").glob(".*.tmp"))
