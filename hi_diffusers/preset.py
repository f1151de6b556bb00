"""What one model is: where its files are, and how it is drawn unless asked otherwise."""

import re
from collections.abc import Container
from dataclasses import dataclass, field
from pathlib import Path

from cache_functions import CacheConfig

# The official pictures of HiDream-I1, in pixels; other models draw the same shapes at their own area.
OFFICIAL_SIZES = ((1024, 1024), (1360, 768), (768, 1360), (1168, 880), (880, 1168), (1248, 832), (832, 1248))


@dataclass(frozen=True, kw_only=True)
class ModelPreset:
    """How one model is found and drawn.

    Attributes:
        name: what --model_type takes.
        family: the folder of `hi_diffusers/families/` that loads it.
        repo: hub repository of the pipeline; None where its files come with the package, in `folder`.
        nf4_repo: the same with its transformer in nf4.
        folder: of a model whose files come with the package; None elsewhere.
        num_steps: denoising steps.
        guidance: classifier-free guidance scale; up to 1 there is none and the negative prompt is not read.
        shift: of the scheduler's noise levels.
        scheduler: "unipc", "euler" or "lcm".
        max_sequence_length: tokens that a prompt is padded or cut to.
        area: pixels of the pictures that it was trained on.
        multiple: pixels along a patch's side; widths and heights are multiples of it.
        examples: prompts that it draws well; the first one is drawn where none is given.
        calibration_prompts: file of the prompts that the cache is calibrated with, one per line.
        vocabulary: the words that it was taught, lower case; None is a language.
        world: what can be said with that vocabulary, in a few words.
        cache: how it is cached unless asked otherwise.
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

    @property
    def example(self) -> str:
        """The prompt that is drawn where none is given."""
        return self.examples[0]


def assets_folder() -> Path:
    """The folder of the files that come with the package: inside it once installed, beside it in a clone."""
    package = Path(__file__).parent
    return package / "assets" if (package / "assets").is_dir() else package.parent / "assets"


def fit_size(width: int, height: int, area: int, multiple: int) -> tuple[int, int]:
    """Scale a size to the model's pixel area, keeping its shape, and floor it to whole patches.

    Args:
        width, height: wanted, in pixels, > 0.
        area: pixels that the model draws.
        multiple: pixels along a patch's side.

    Returns:
        (width, height), as diffusers computes them.

    Raises:
        ValueError: if the shape is so extreme that a side would vanish.
    """
    scale = (area / (width * height)) ** 0.5
    fitted = (int(width * scale // multiple * multiple), int(height * scale // multiple * multiple))
    if min(fitted) < multiple:
        raise ValueError(f"width x height must not be as extreme as {width}x{height}: a side would vanish")
    return fitted


def sizes_of(preset: ModelPreset) -> list[tuple[int, int]]:
    """(width, height) of the official pictures, at the model's own area."""
    return list(dict.fromkeys(fit_size(*size, preset.area, preset.multiple) for size in OFFICIAL_SIZES))


def is_fitted(width: int, height: int, area: int, multiple: int) -> bool:
    """Whether a size is one that `fit_size` gives for some shape: fitting it again could move a side by a patch."""
    in_patches = width % multiple == 0 and height % multiple == 0
    return in_patches and width * height <= area < (width + multiple) * (height + multiple)


def unknown_words(prompt: str, vocabulary: Container[str]) -> list[str]:
    """The prompt's words and marks that are not among the taught ones, in order, each once."""
    words = re.findall(r"[^\W_]+|[^\w\s]|_+", prompt)
    return list(dict.fromkeys(word for word in words if word.lower() not in vocabulary))
