"""A family is a folder: one that is added draws by name, with the cache, and nothing outside of it knows its name."""

import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from cache_functions import CacheConfig
from hi_diffusers import SamplingOptions, families, generate, generate_batch, load_pipeline
from hi_diffusers.commands import inference, sampling
from hi_diffusers.families.table import PRESETS, find_family
from hi_diffusers.pictures.metadata import read_metadata

ROOT = Path(__file__).parents[2]
# Names of HiDream's parts. The product's name, and nano's, may stand anywhere.
PARTS = re.compile(
    r"\b(t5|llama\w*|clip_[lg]|text_encoder\w*|(double|single)_stream\w*|HiDreamImage\w*|caption_proj\w*|adaLN\w*)\b",
    re.I,
)


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The toy's folder, beside those of the families that are there."""
    shutil.copytree(Path(__file__).parent / "toy", tmp_path / "wings" / "toy")
    monkeypatch.setattr(families, "__path__", [*families.__path__, str(tmp_path / "wings")])
    yield tmp_path / "wings" / "toy"
    for name in [name for name in sys.modules if name.startswith("hi_diffusers.families.toy")]:
        del sys.modules[name]


def test_a_family_that_is_added_is_drawn_with_through_generate(toy: Path) -> None:
    model = load_pipeline("toy", device="cpu")
    picture = generate(
        model, SamplingOptions("grey!!!!", seed=1), CacheConfig(target="x0", full_steps=4, schedule="cosine")
    )
    assert model.denoiser.num_evaluations == 4
    assert picture.pixels.shape == (32, 32, 3) and np.allclose(picture.pixels.mean(), 0.5, atol=0.02)
    assert picture.metadata["model"]["model_type"] == "toy"


def test_a_batch_of_it_draws_what_its_pictures_draw_alone(toy: Path) -> None:
    model, cache = load_pipeline("toy", device="cpu"), CacheConfig(target="velocity", fresh_threshold=3)
    options = [SamplingOptions("a", seed=1), SamplingOptions("abcdef", seed=2)]
    for together, one in zip(generate_batch(model, options, cache), options, strict=True):
        assert np.allclose(together.pixels, generate(model, one, cache).pixels, atol=1e-6)


def test_the_scripts_draw_with_it(toy: Path, tmp_path: Path) -> None:
    output = tmp_path / "toy.png"
    flags = ["--device", "cpu", "--cache", "off"]
    assert inference.main(["grey", "-m", "toy", *flags, "--output", str(output)]) == 0
    assert read_metadata(output)["options"]["num_steps"] == 8
    (tmp_path / "prompts.txt").write_text("grey\nmore grey\n", encoding="utf-8")
    argv = ["--prompt_file", str(tmp_path / "prompts.txt"), "--output_dir", str(tmp_path / "out"), "-m", "toy", *flags]
    assert sampling.main(argv) == 0
    assert len(list((tmp_path / "out").glob("*.png"))) == 2


def test_without_its_folder_there_is_no_such_model() -> None:
    assert "toy" not in PRESETS
    assert find_family(PRESETS["nano"]).__name__ == "hi_diffusers.families.hidream.family"


def test_at_most_four_files_outside_its_wing_name_a_part_of_hidream() -> None:
    wing = ROOT / "hi_diffusers" / "families" / "hidream"
    files = [
        file
        for package in ("hi_diffusers", "cache_functions", "taylor_utils")
        for file in (ROOT / package).rglob("*.py")
    ]
    naming = [
        str(file.relative_to(ROOT))
        for file in files
        if wing not in file.parents and PARTS.search(file.read_text(encoding="utf-8"))
    ]
    assert sorted(naming) == [
        "hi_diffusers/__init__.py",
        "hi_diffusers/engine/loading.py",
        "hi_diffusers/flags.py",
        "hi_diffusers/weights/source.py",
    ]
