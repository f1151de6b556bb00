"""The options of one drawing: as requested, and with all defaults filled in."""

import json
import math
import secrets
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from PIL import Image

from cache_functions import Sampler
from cache_functions.config import MAX_STEPS
from hi_diffusers.denoising.schedulers import RENOISING, SCHEDULERS, timed_scheduler
from hi_diffusers.denoising.start import first_step
from hi_diffusers.pictures.inputs import FITS, InputPicture, check_mask, check_white
from hi_diffusers.preset import ModelPreset, fit_size, is_fitted

MAX_SEED = 2**63 - 1  # largest seed that runs and the page make themselves
LARGEST_SEED = 2**64 - 1  # largest seed accepted, as other software writes it
RANDOM_SEED = -1  # asks for a random seed, as in other software
MAX_TOKENS = 218  # HiDream's authors: longer CLIP inputs than 77 work up to here
MAX_SIDE = 16384
MOSTLY = 0.98  # of a picture: what is cut off beyond is said
STRENGTH = 0.6  # of a picture that is drawn anew in whole
PICTURES = ("image", "mask_image", "strength", "fit")
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
        image: a picture to start from: its file, or a PIL image. The size is then the picture's, if none is given.
        mask_image: with `image`, of its size: what is white is drawn anew, what is black stays as it is.
        strength: with `image`: share of the steps that is drawn, above 0 to 1; by default STRENGTH, and with a mask 1.
        fit: with `image`: how a picture of another shape than the drawing's is fitted, one of FITS; "cover" by default.
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
    image: Path | Image.Image | InputPicture | None = None
    mask_image: Path | Image.Image | InputPicture | None = None
    strength: float | None = None
    fit: str | None = None

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
        self._check_pictures()

    def _check_pictures(self) -> None:
        for name in ("image", "mask_image"):
            value = getattr(self, name)
            if not isinstance(value, Path | Image.Image | InputPicture | None):  # text from elsewhere opens no file
                raise ValueError(f"{name} must be a pathlib.Path or a PIL image, got {value!r}")
        for name in ("mask_image", "strength", "fit"):
            if self.image is None and getattr(self, name) is not None:
                raise ValueError(f"{name} has no effect without an image: give one, or drop {name}")
        _check_number("strength", self.strength, 0.0, 1.0)
        if self.strength is not None:
            object.__setattr__(self, "strength", float(self.strength))
        if self.fit is not None and self.fit not in FITS:
            raise ValueError(f"fit must be one of {', '.join(FITS)}, got {self.fit!r}")

    def drawn_steps(self, preset: ModelPreset) -> int:
        """Number of steps that are drawn; raises ValueError if none are."""
        num_steps = self.num_steps or preset.num_steps
        return num_steps - (0 if self.image is None else first_step(num_steps, self._strength))

    @property
    def _strength(self) -> float:
        """The strength, with its default filled in."""
        return (STRENGTH if self.mask_image is None else 1.0) if self.strength is None else self.strength

    def resolve(self, preset: ModelPreset) -> "ResolvedOptions":
        """Fill in the preset's values, fit the size to the model, and check the pictures to start from.

        Raises:
            ValueError: if the size cannot be drawn, or a picture cannot be used.
        """
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        image, mask = _opened(self.image, "image"), _opened(self.mask_image, "mask_image")
        defaults = {
            name: getattr(preset, name) for name, value in given.items() if value is None and hasattr(preset, name)
        }
        side = math.isqrt(preset.area)
        asked = (self.width or side, self.height or side)
        if image is not None and self.width is None and self.height is None:
            asked = (image.width, image.height)
        grid = (preset.area, preset.multiple)
        size = asked if is_fitted(*asked, *grid) else fit_size(*asked, *grid)
        seed = secrets.randbelow(2**32) if self.seed is None else self.seed
        settings = given | defaults | {"width": size[0], "height": size[1], "seed": seed}
        if image is not None:
            if mask is not None:
                check_mask(image.size, mask.size)
                check_white(mask.fitted(*size, self.fit or FITS[0]))
            settings |= {"image": image, "mask_image": mask, "fit": self.fit or FITS[0], "strength": self._strength}
            self.drawn_steps(preset)
        resolved = ResolvedOptions(**settings, notices=())
        return replace(resolved, notices=tuple(self._notices(asked, resolved, preset)))

    def _notices(self, asked: tuple[int, int], resolved: "ResolvedOptions", preset: ModelPreset) -> Iterator[str]:
        if asked != (resolved.width, resolved.height):
            yield (
                f"{asked[0]}x{asked[1]} is drawn as {resolved.width}x{resolved.height}: {preset.name} draws about"
                f" {preset.area} pixels, in multiples of {preset.multiple}"
            )
        if resolved.image is not None and resolved.mask_image is None and not resolved.first_step:
            begins = f"at strength {resolved.strength:g} the drawing begins with noise alone"
            yield f"without a mask the picture has no effect: {begins}"
        if resolved.image is not None and resolved.fit == "cover":
            kept = covered(resolved.image, resolved.width, resolved.height)
            if kept < MOSTLY:
                size = f"{resolved.width}x{resolved.height}"
                yield f"{1 - kept:.0%} of the picture is cut off for {size}; fit pad keeps it"
        if self.negative_prompt and not resolved.guided:
            yield f"the negative prompt has no effect at guidance {resolved.guidance:g}; it needs guidance above 1"


@dataclass(frozen=True)
class ResolvedOptions:
    """`SamplingOptions` with all defaults filled in.

    Attributes:
        image, mask_image: the pictures to start from, checked; None without.
        strength, fit: as in `SamplingOptions`; None without an image.
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
    image: InputPicture | None
    mask_image: InputPicture | None
    strength: float | None
    fit: str | None
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
        return Sampler(name, *kind, has_branches=True, first_step=self.first_step)

    @property
    def first_step(self) -> int:
        """The first step of the schedule that is drawn; 0 without a picture to start from."""
        return 0 if self.strength is None else first_step(self.num_steps, self.strength)

    @property
    def drawn_steps(self) -> int:
        """Number of steps that are drawn."""
        return self.num_steps - self.first_step

    def timed_scheduler(self) -> Any:
        """A new scheduler of diffusers, for the steps that are drawn."""
        return timed_scheduler(self.scheduler, self.shift, self.num_steps, self.first_step)

    def shared(self) -> "ResolvedOptions":
        """What the pictures of a batch must have in common: these without prompt, seed, pictures and notices."""
        return replace(self, prompt="", seed=0, image=None, mask_image=None, notices=())

    def settings(self) -> dict[str, object]:
        """All settings of the picture, JSON-able; pictures to start from by their hash, and only if there are any."""
        found = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "notices"}
        for name in PICTURES:
            value = found.pop(name)
            if value is not None:
                found[name] = value.sha256 if isinstance(value, InputPicture) else value
        return found


def covered(image: InputPicture, width: int, height: int) -> float:
    """The share of a picture that is left if it is cut to a size."""
    scale = max(width / image.width, height / image.height)
    return width * height / (image.width * image.height * scale**2)


def _opened(given: Path | Image.Image | InputPicture | None, role: str) -> InputPicture | None:
    return given if given is None or isinstance(given, InputPicture) else InputPicture.of(given, role)


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
