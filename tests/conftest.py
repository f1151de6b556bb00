"""Tests marked `gpu` are skipped where torch sees no CUDA device. Models that many tests draw with are made once.

The imports stand in functions, so that a run of a few quick tests does not wait for torch.
"""

import os
from pathlib import Path
from typing import TYPE_CHECKING

os.environ["HF_HUB_OFFLINE"] = "1"  # no test asks the network; those of downloads have a hub of their own

import pytest

if TYPE_CHECKING:
    from hi_diffusers import HiDreamImagePipeline


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if not on_gpu:
        return
    import torch

    if not torch.cuda.is_available():
        for item in on_gpu:
            item.add_marker(pytest.mark.skip(reason="needs CUDA"))


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with random weights; tests copy it before they change it."""
    from hi_diffusers.console import quiet_libraries
    from tests.tiny_folder import write_folder

    quiet_libraries()
    return write_folder(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def tiny_pipe(tiny_folder: Path) -> "HiDreamImagePipeline":
    """The tiny model as the preset nano; tests leave it as they found it."""
    from hi_diffusers import load_pipeline

    return load_pipeline("nano", device="cpu", model_path=tiny_folder)


@pytest.fixture(scope="session")
def nano_folder() -> Path:
    """The bundled model."""
    from hi_diffusers.families.table import PRESETS

    folder = PRESETS["nano"].folder
    if not folder.is_dir():
        pytest.skip("the bundled model is not there")
    return folder
