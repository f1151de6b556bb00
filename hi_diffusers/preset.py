"""The presets' class: where a model's files are, and its default settings."""

import re
from collections.abc import Container
from dataclasses import dataclass, field
from pathlib import Path

from cache_functions import CacheConfig

# The official picture sizes of HiDream-I1, in pixels; other models draw the same shapes at their own area.
OFFICIAL_SIZES = ((1024, 1024), (1360, 768), (768, 1360), (1168, 880), (880, 1168), (1248, 832), (832, 1248))


@dataclass(frozen=True, kw_only=True)
class ModelPreset:
    """How one model is found and drawn.

    Attributes:
        name: value of --model_type.
        family: the folder of `hi_diffusers/families/` that loads it.
        repo: hub repository of the pipeline; None where its files come with the package, in `folder`.
        nf4_repo: hub repository with the transformer in nf4, or None.
        folder: folder of the files that come with the package; None for other models.
        num_steps: denoising steps.
        guidance: classifier-free guidance scale; 1 or less turns it off, and the negative prompt is not read.
        shift: shift of the scheduler's noise levels.
        scheduler: "unipc", "euler" or "lcm".
        max_sequence_length: tokens that a prompt is padded or cut to.
        area: pixels per picture in training.
        multiple: pixels along a patch's side; widths and heights are multiples of it.
        examples: prompts that it draws well; the first one is the default prompt.
        calibration_prompts: file of the prompts that the cache is calibrated with, one per line.
        vocabulary: the words that it was taught, lower case; None is no limit.
        world: what that vocabulary describes, in a few words.
        cache: the default cache configuration.
        measured: seconds per picture where they were measured, with hardware and source; empty: never.
    """

    name: str
    family: str
    repo: str | None = None
    nf4_repo: str | None = None
    folder: Path | None = None
    num_steps: int
    guidance: float
    shift: float
    scheduler: str
    max_sequence_length: int
    area: int
    multiple: int
    examples: tuple[str, ...]
    calibration_prompts: Path
    vocabulary: frozenset[str] | None = None
    world: str = ""
    cache: CacheConfig = field(default_factory=CacheConfig.best)
    measured: str = ""

    @property
    def example(self) -> str:
        """The default prompt."""
        return self.examples[0]


def assets_folder() -> Path:
    """The folder of the files that come with the package: inside the installed package, or beside it in a clone."""
    package = Path(__file__).parent
    return package / "assets" if (package / "assets").is_dir() else package.parent / "assets"


def fit_size(width: int, height: int, area: int, multiple: int) -> tuple[int, int]:
    """Scale a size to the model's pixel area, keeping its shape, and floor it to whole patches.

    Args:
        width, height: wanted size in pixels, > 0.
        area: pixels that the model draws.
        multiple: pixels along a patch's side.

    Returns:
        (width, height), as diffusers computes them.

    Raises:
        ValueError: if the shape is so long that a side would become 0.
    """
    scale = (area / (width * height)) ** 0.5
    fitted = (int(width * scale // multiple * multiple), int(height * scale // multiple * multiple))
    if min(fitted) < multiple:
        raise ValueError(f"width x height must not be as extreme as {width}x{height}: a side would become 0 pixels")
    return fitted


def sizes_of(preset: ModelPreset) -> list[tuple[int, int]]:
    """(width, height) of the official pictures, at the model's own area."""
    return list(dict.fromkeys(fit_size(*size, preset.area, preset.multiple) for size in OFFICIAL_SIZES))


def is_fitted(width: int, height: int, area: int, multiple: int) -> bool:
    """Whether `fit_size` gives this size for some shape; fitting it once more could change a side by a patch."""
    in_patches = width % multiple == 0 and height % multiple == 0
    return in_patches and width * height <= area < (width + multiple) * (height + multiple)


def unknown_words(prompt: str, vocabulary: Container[str]) -> list[str]:
    """The prompt's words and punctuation marks outside the vocabulary, in order, each once."""
    words = re.findall(r"[^\W_]+|[^\w\s]|_+", prompt)
    return list(dict.fromkeys(word for word in words if word.lower() not in vocabulary))
