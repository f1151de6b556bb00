"""What is installed: its parts, its extras, its version, its types."""

import ast
import importlib
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest

import hi_diffusers

ROOT = Path(__file__).resolve().parents[1]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SCRIPTS = ("inference", "sampling", "calibrate", "compare", "gradio_demo", "serve")


def specifiers(lines: list[str]) -> set[str]:
    return {line.strip() for line in lines if line.strip() and not line.startswith("#")}


def test_requirements_are_the_project_s_with_what_the_scripts_use() -> None:
    extras = PROJECT["project"]["optional-dependencies"]
    wanted = specifiers(PROJECT["project"]["dependencies"])
    for name in ("page", "serve", "metrics", "quantization", "lora", "video"):
        wanted |= specifiers(extras[name])
    assert specifiers((ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()) == wanted


def test_every_package_on_disk_is_installed() -> None:
    found = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for name in ("hi_diffusers", "forecasting", "cache_functions", "taylor_utils")
        for path in (ROOT / name).rglob("__init__.py")
    }
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == found | {"hi_diffusers.assets"}


def test_the_changelog_has_this_version() -> None:
    assert re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M)[0] == (
        hi_diffusers.__version__
    )


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_has_its_version(script: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert importlib.import_module(f"hi_diffusers.commands.{script}").main(["--version"]) == 0
    assert capsys.readouterr().out == f"{script}.py, hi-diffusers {hi_diffusers.__version__}\n"


def test_a_type_checker_follows_every_public_name() -> None:
    tree = ast.parse((ROOT / "hi_diffusers" / "__init__.py").read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    followed = {
        name.asname: node.module for node in block.body if isinstance(node, ast.ImportFrom) for name in node.names
    }
    assert followed == hi_diffusers._HOMES


@pytest.mark.parametrize(
    ("script", "argv", "module", "extra"),
    [
        ("gradio_demo", [], "gradio", "page"),
        ("gradio_demo", [], "skimage", "page"),
        ("serve", [], "prometheus_client", "serve"),
        ("compare", ["a", "b"], "skimage", "metrics"),
        ("inference", ["a prompt", "--compare"], "skimage", "metrics"),
        ("inference", ["a prompt", "--quantization", "nf4"], "bitsandbytes", "quantization"),
        ("sampling", ["--quantization", "nf4"], "bitsandbytes", "quantization"),
        ("inference", ["a prompt", "--lora", "a.safetensors"], "peft", "lora"),
        ("inference", ["a prompt", "--transformer", "a.gguf"], "gguf", "gguf"),
        ("sampling", ["--engine", "ray"], "ray", "ray"),
    ],
)
def test_what_lacks_an_extra_names_it(
    script: str,
    argv: list[str],
    module: str,
    extra: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, module, None)
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    (tmp_path / "prompts.txt").write_text("a red circle\n")
    run = ["--prompt_file", "prompts.txt", "--output_dir", "out"] if script == "sampling" else []
    assert importlib.import_module(f"hi_diffusers.commands.{script}").main([*argv, *run]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert f"needs {module}, which is not installed: pip install 'hi-diffusers[{extra}]'" in last


@pytest.mark.slow
def test_a_wheel_holds_what_it_should_and_draws_from_any_folder(tmp_path: Path) -> None:
    source = tmp_path / "source"
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, names.split("\0")):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "--no-input", "-q"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), str(source)]
    subprocess.run(build, check=True, timeout=300)
    (wheel,) = tmp_path.glob("hi_diffusers-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        held = archive.namelist()
    top = {name.partition("/")[0] for name in held if ".dist-info/" not in name}
    assert top == {"hi_diffusers", "cache_functions", "forecasting", "taylor_utils"}
    assert {f"{package}/py.typed" for package in top} <= set(held) and "hi_diffusers/demo/style.css" in held
    installed = tmp_path / "installed"
    subprocess.run([*pip, "install", "--no-deps", "--target", str(installed), str(wheel)], check=True, timeout=300)
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    variables = os.environ | {"PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    drawn = subprocess.run(
        [
            sys.executable,
            "-P",
            str(installed / "bin" / "hidream"),
            "draw",
            "--seed",
            "7",
            "--device",
            "cpu",
            "-o",
            "a.png",
        ],
        cwd=folder,
        env=variables,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert drawn.returncode == 0, drawn.stderr
    assert (folder / "a.png").is_file()
