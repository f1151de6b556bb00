"""The options of one drawing: as requested, and with all defaults filled in."""

import json
import math
import secrets
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

from cache_functions import Sampler
from cache_functions.config import MAX_STEPS
from hi_diffusers.denoising.schedulers import RENOISING, SCHEDULERS
from hi_diffusers.preset import ModelPreset, fit_size, is_fitted

MAX_SEED = 2**63 - 1  # largest seed that runs and the page make themselves
LARGEST_SEED = 2**64 - 1  # largest seed accepted, as other software writes it
RANDOM_SEED = -1  # asks for a random seed, as in other software
MAX_TOKENS = 218  # HiDream's authors: longer CLIP inputs than 77 work up to here
MAX_SIDE = 16384
MAX_PROMPT = 10_000  # characters
MAX_PROMPT_BYTES = 30_000  # in UTF-8, as JSON: a JPEG comment's 64 KiB must hold the prompt and the negative prompt


def check_prompt(name: str, text: object) -> None:
    """Raise ValueError unless a prompt is Unicode text that a picture's metadata can hold.

    Args:
        name: name in error messages.
    """
    if not isinstance(text, str):
        raise ValueError(f"{name} must be text, got {text!r}")
    if len(text) > MAX_PROMPT:
        raise ValueError(f"{name} may have at most {MAX_PROMPT} characters, got {len(text)}")
    if any("\ud800" <= char <= "\udfff" for char in text):
        raise ValueError(f"{name} must be Unicode text, got half a character")
    num_bytes = len(json.dumps(text, ensure_ascii=False).encode())
    if num_bytes > MAX_PROMPT_BYTES:
        raise ValueError(f"{name} may have at most {MAX_PROMPT_BYTES} bytes, got {num_bytes}")


@dataclass(frozen=True)
class SamplingOptions:
    """Options of one drawing. None is the preset's value; a seed that is not given is random, and recorded.

    Attributes:
        prompt: what to draw.
        negative_prompt: what the picture should not show; read with guidance above 1.
        seed: 0 to 2^64 - 1; -1 is None.
        width, height: pixels; scaled to the model's area, keeping their shape.
        num_steps: denoising steps, 1 to 1000.
        guidance: classifier-free guidance scale, 0 to 100; 1 or less turns guidance off.
        scheduler: one of "unipc", "euler", "lcm".
        shift: shift of the scheduler's noise levels, 0.01 to 100.
        max_sequence_length: tokens per prompt, 8 to 218.
    """

    prompt: str
    negative_prompt: str = ""
    seed: int | None = None
    width: int | None = None
    height: int | None = None
    num_steps: int | None = None
    guidance: float | None = None
    scheduler: str | None = None
    shift: float | None = None
    max_sequence_length: int | None = None

    def __post_init__(self) -> None:
        check_prompt("prompt", self.prompt)
        check_prompt("negative_prompt", self.negative_prompt)
        if self.seed == RANDOM_SEED and not isinstance(self.seed, bool):
            object.__setattr__(self, "seed", None)
        _check_whole("seed", self.seed, 0, LARGEST_SEED)
        _check_whole("width", self.width, 1, MAX_SIDE)
        _check_whole("height", self.height, 1, MAX_SIDE)
        _check_whole("num_steps", self.num_steps, 1, MAX_STEPS)
        _check_number("guidance", self.guidance, 0.0, 100.0)
        _check_number("shift", self.shift, 0.01, 100.0)
        for name in ("guidance", "shift"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, float(getattr(self, name)))  # 2 and 2.0 make the same file
        if self.scheduler is not None and self.scheduler not in SCHEDULERS:
            raise ValueError(f"scheduler must be one of {', '.join(SCHEDULERS)}, got {self.scheduler!r}")
        _check_whole("max_sequence_length", self.max_sequence_length, 8, MAX_TOKENS)

    def resolve(self, preset: ModelPreset) -> "ResolvedOptions":
        """Fill in the preset's values, and fit the size to the model.

        Raises:
            ValueError: if the size cannot be drawn.
        """
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        defaults = {
            name: getattr(preset, name) for name, value in given.items() if value is None and hasattr(preset, name)
        }
        side = math.isqrt(preset.area)
        asked = (self.width or side, self.height or side)
        grid = (preset.area, preset.multiple)
        size = asked if is_fitted(*asked, *grid) else fit_size(*asked, *grid)
        seed = secrets.randbelow(2**32) if self.seed is None else self.seed
        settings = given | defaults | {"width": size[0], "height": size[1], "seed": seed}
        resolved = ResolvedOptions(**settings, notices=())
        return replace(resolved, notices=tuple(self._notices(asked, resolved, preset)))

    def _notices(self, asked: tuple[int, int], resolved: "ResolvedOptions", preset: ModelPreset) -> Iterator[str]:
        if asked != (resolved.width, resolved.height):
            yield (
                f"{asked[0]}x{asked[1]} is drawn as {resolved.width}x{resolved.height}: {preset.name} draws about"
                f" {preset.area} pixels, in multiples of {preset.multiple}"
            )
        if self.negative_prompt and not resolved.guided:
            yield f"the negative prompt has no effect at guidance {resolved.guidance:g}; it needs guidance above 1"


@dataclass(frozen=True)
class ResolvedOptions:
    """`SamplingOptions` with all defaults filled in.

    Attributes:
        notices: sentences about differences from the request.
    """

    prompt: str
    negative_prompt: str
    seed: int
    width: int
    height: int
    num_steps: int
    guidance: float
    scheduler: str
    shift: float
    max_sequence_length: int
    notices: tuple[str, ...]

    @property
    def renoises(self) -> bool:
        """Whether the sampler adds fresh noise at every step."""
        return self.scheduler in RENOISING

    @property
    def guided(self) -> bool:
        """Whether both guidance branches are evaluated."""
        return self.guidance > 1

    def sampler(self, preset: ModelPreset) -> Sampler:
        """The sampler's properties that the cache depends on."""
        name = f"the {self.scheduler} scheduler of {preset.name}"
        kind = (self.scheduler, self.num_steps, self.shift, self.guidance, self.renoises)
        return Sampler(name, *kind, has_branches=True)

    def settings(self) -> dict[str, object]:
        """All settings of the picture, JSON-able."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "notices"}


def _check_whole(name: str, value: int | None, low: int, high: int) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ValueError(f"{name} must be a whole number from {low} to {high}, got {value!r}")


def _check_number(name: str, value: float | None, low: float, high: float) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise ValueError(f"{name} must be a number from {low:g} to {high:g}, got {value!r}")


def parse_resolution(text: str) -> tuple[int, int]:
    """Width and height from a text such as 1360x768; raises ValueError for others."""
    width, _, height = text.lower().partition("x")
    if not (width.isascii() and width.isdigit() and height.isascii() and height.isdigit()):
        raise ValueError(f"resolution must be WIDTHxHEIGHT such as 1360x768, got {text!r}")
    return int(width), int(height)
