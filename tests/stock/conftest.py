"""Folders of tiny pipelines with random weights, written once."""

import hashlib
from pathlib import Path

import pytest
from PIL import Image

from tests.tiny_pipelines.folders import write_folders


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """flux, qwen-image-edit, wan, dit."""
    out = tmp_path_factory.mktemp("pipelines")
    write_folders(out)
    return out


@pytest.fixture(scope="session")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A picture to start from."""
    path = tmp_path_factory.mktemp("pictures") / "in.png"
    Image.effect_mandelbrot((64, 64), (-2, -1.5, 1, 1.5), 50).convert("RGB").save(path)
    return path


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
