"""The one table of models: where their files are and how they are drawn."""

from dataclasses import dataclass, field
from pathlib import Path

from cache_functions import CacheConfig

BUNDLED = "hidream-nano"
HIDREAM_EXAMPLE = 'A cat holding a sign that says "HiDream.ai".'
NANO_EXAMPLE = "a large yellow circle on a blue background"

# Pixels of the official pictures; other sizes are scaled to the same area.
HIDREAM_AREA = 1024 * 1024
HIDREAM_MULTIPLE = 16
HIDREAM_SIZES = ((1024, 1024), (1360, 768), (768, 1360), (1168, 880), (880, 1168), (1248, 832), (832, 1248))
NANO_AREA = 64 * 64
NANO_MULTIPLE = 8


@dataclass(frozen=True)
class ModelPreset:
    """How one model is found and drawn.

    Attributes:
        name: what --model_type takes.
        repo: hub repository of the pipeline without Llama; None for the bundled model.
        nf4_repo: the same with its transformer in nf4.
        llama_repo: hub repository of the Llama; None where the pipeline's folder holds it.
        gptq_llama_repo: the same in GPTQ-INT4, for which no account is needed.
        num_steps: denoising steps.
        guidance: classifier-free guidance scale; up to 1 there is none and the negative prompt is not read.
        shift: of the sampler's noise levels.
        scheduler: "unipc", "euler" or "lcm".
        max_sequence_length: tokens a prompt is padded or cut to.
        area: pixels that the model draws.
        multiple: pixels along a patch's side; widths and heights are multiples of it.
        example: a prompt that it draws well.
        cache: how it is cached unless asked otherwise.
    """

    name: str
    repo: str | None
    nf4_repo: str | None
    llama_repo: str | None
    gptq_llama_repo: str | None
    num_steps: int
    guidance: float
    shift: float
    scheduler: str
    max_sequence_length: int
    area: int
    multiple: int
    example: str
    cache: CacheConfig = field(default_factory=CacheConfig.best)

    @property
    def is_bundled(self) -> bool:
        """Whether its files come with the package."""
        return self.repo is None


def _hidream(name: str, variant: str, num_steps: int, guidance: float, shift: float, scheduler: str) -> ModelPreset:
    return ModelPreset(
        name=name,
        repo=f"HiDream-ai/HiDream-I1-{variant}",
        nf4_repo=f"azaneko/HiDream-I1-{variant}-nf4",
        llama_repo="meta-llama/Llama-3.1-8B-Instruct",
        gptq_llama_repo="hugging-quants/Meta-Llama-3.1-8B-Instruct-GPTQ-INT4",
        num_steps=num_steps,
        guidance=guidance,
        shift=shift,
        scheduler=scheduler,
        max_sequence_length=128,
        area=HIDREAM_AREA,
        multiple=HIDREAM_MULTIPLE,
        example=HIDREAM_EXAMPLE,
    )


def _nano(name: str, num_steps: int, guidance: float, shift: float, scheduler: str) -> ModelPreset:
    return ModelPreset(
        name=name,
        repo=None,
        nf4_repo=None,
        llama_repo=None,
        gptq_llama_repo=None,
        num_steps=num_steps,
        guidance=guidance,
        shift=shift,
        scheduler=scheduler,
        max_sequence_length=32,
        area=NANO_AREA,
        multiple=NANO_MULTIPLE,
        example=NANO_EXAMPLE,
    )


PRESETS = {
    preset.name: preset
    for preset in (
        _nano("nano", 50, 2.0, 3.0, "unipc"),
        _nano("nano-dev", 28, 0.0, 6.0, "lcm"),
        _nano("nano-fast", 16, 0.0, 3.0, "lcm"),
        _hidream("full", "Full", 50, 5.0, 3.0, "unipc"),
        _hidream("dev", "Dev", 28, 0.0, 6.0, "lcm"),
        _hidream("fast", "Fast", 16, 0.0, 3.0, "lcm"),
    )
}


def find_preset(name: str) -> ModelPreset:
    """The preset of that name.

    Raises:
        ValueError: if there is none.
    """
    if name not in PRESETS:
        raise ValueError(f"model_type must be one of {', '.join(PRESETS)}, got {name!r}")
    return PRESETS[name]


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
    return list(dict.fromkeys(fit_size(*size, preset.area, preset.multiple) for size in HIDREAM_SIZES))


def is_fitted(width: int, height: int, area: int, multiple: int) -> bool:
    """Whether a size is one that `fit_size` gives for some shape: fitting it again could move a side by a patch."""
    in_patches = width % multiple == 0 and height % multiple == 0
    return in_patches and width * height <= area < (width + multiple) * (height + multiple)


def bundled_folder() -> Path:
    """The folder of the bundled model: beside the packages in a clone, inside this one once installed."""
    package = Path(__file__).parent
    for assets in (package / "assets", package.parent / "assets"):
        if (assets / BUNDLED).is_dir():
            return assets / BUNDLED
    return package.parent / "assets" / BUNDLED


def calibration_prompts(preset: ModelPreset) -> Path:
    """The bundled list of prompts that the cache is calibrated with, one a line."""
    if preset.is_bundled:
        return bundled_folder() / "calibration" / "prompts.txt"
    return bundled_folder().parent / "calibration_prompts.txt"
