"""Checks visitors' requests. Every value comes from the network: none is trusted, and none names a file."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from cache_functions import CacheConfig, Calibration
from cache_functions.calibration import Choice, SolverChoice
from cache_functions.config import MAX_STEPS
from cache_functions.named import CACHES, cache_with
from hi_diffusers.request.drawing import Drawing, decide
from hi_diffusers.request.options import MAX_SEED, ResolvedOptions, SamplingOptions
from hi_diffusers.service.offered import OfferedModel
from hi_diffusers.weights.source import ModelSource

OF_CACHE = ("quality", "target", "basis", "schedule", "fresh_threshold", "full_steps", "max_order")
"""The settings of a cache that a visitor may give; none of them names a file."""
OF_START = ("image", "strength", "fit")
"""The settings of a picture to start from, as fields of the page; its mask is painted."""
WHOLE = ("seed", "width", "height", "num_steps", "max_sequence_length", "fresh_threshold", "full_steps", "max_order")


@dataclass(frozen=True)
class Limits:
    """What one request may take of the server.

    Attributes:
        prompt_chars: maximum characters of the prompt, and of the negative prompt; --max_prompt_chars.
        num_steps, num_images: maximum denoising steps and pictures; --max_steps and --max_images.
        upload_bytes, upload_pixels: maximum size of a picture that a visitor uploads.
    """

    prompt_chars: int = 2000
    num_steps: int = 100
    num_images: int = 4
    upload_bytes: int = 20 * 2**20
    upload_pixels: int = 16 * 2**20

    def __post_init__(self) -> None:
        for name, value, most in (
            ("max_prompt_chars", self.prompt_chars, 20_000),
            ("max_steps", self.num_steps, MAX_STEPS),
            ("max_images", self.num_images, 64),
        ):
            if not 1 <= value <= most:
                raise ValueError(f"{name} must be from 1 to {most}, got {value}")


@dataclass(frozen=True)
class Request:
    """A checked request.

    Attributes:
        model: the model that draws.
        drawings: the pictures; they differ only in their seeds.
        asked: the requested cache configuration.
    """

    model: OfferedModel
    drawings: tuple[Drawing, ...]
    asked: CacheConfig

    @property
    def options(self) -> ResolvedOptions:
        """The first picture's options."""
        return self.drawings[0].options

    @property
    def cache(self) -> CacheConfig:
        """The cache with nothing left open."""
        return self.drawings[0].cache

    @property
    def notices(self) -> tuple[str, ...]:
        """Sentences about what is drawn differently from what was asked."""
        return self.drawings[0].notices

    def expected(self, full_steps: int) -> Choice | SolverChoice | None:
        """What the calibration knows of a budget; None if there is none, or it does not know it."""
        calibration = self.cache.calibration
        return calibration.choices.get(full_steps) if isinstance(calibration, Calibration) else None

    def uncached(self) -> "Request":
        """The first picture alone, without the cache."""
        return replace(self, drawings=(self.drawings[0].uncached(),), asked=CacheConfig.off())

    def first(self) -> "Request":
        """The first picture alone."""
        return replace(self, drawings=self.drawings[:1])

    def key(self, number: int) -> tuple[str, ModelSource, ResolvedOptions, str]:
        """A key that is equal for equal pictures."""
        drawing, model = self.drawings[number], self.model
        return model.preset.name, model.source, drawing.options, json.dumps(drawing.cache.settings())


def check(values: Mapping[str, Any], limits: Limits, models: Mapping[str, OfferedModel]) -> Request:
    """Turn the values of a form or an API call into a request.

    Args:
        values: model, cache, num_images, OF_CACHE, and the fields of `SamplingOptions`; None and "" are defaults. A
            picture to start from is an `InputPicture`.
        limits: limits of one request.
        models: the offered models, by name.

    Raises:
        ValueError: naming the field, its value and what is allowed.
    """
    given = {name: value for name, value in values.items() if value is not None and (value != "" or name == "prompt")}
    model = find_model(given.pop("model", None), models)
    preset = model.preset
    num_images = whole("num_images", given.pop("num_images", 1), 1, limits.num_images)
    name = given.pop("cache", None)
    if name is not None and (not isinstance(name, str) or name not in CACHES):
        raise ValueError(f"cache must be one of {', '.join(CACHES)}, got {_shown(name)}")
    for key in ("prompt", "negative_prompt"):
        text = given.get(key, "")
        if not isinstance(text, str) or len(text) > limits.prompt_chars:
            got = f"{len(text)} characters" if isinstance(text, str) else _shown(text)
            raise ValueError(f"{key} must be text of at most {limits.prompt_chars} characters, got {got}")
    for key in WHOLE:
        if key in given:
            given[key] = whole(key, given[key], 0, MAX_SEED)
    unknown = sorted(set(given) - {field.name for field in fields(SamplingOptions)} - set(OF_CACHE))
    if unknown:
        raise ValueError(f"{_shown(unknown[0])} is not a setting of a picture")
    of_cache = {key: given.pop(key) for key in OF_CACHE if key in given}
    given["num_steps"] = whole("num_steps", given.get("num_steps", preset.num_steps), 1, limits.num_steps)
    asked = cache_with(name, CacheConfig.best(), of_cache)
    first = decide(preset, SamplingOptions(**({"prompt": preset.example} | given)), asked, model.calibrations)
    seeds = ((first.options.seed + number) % (MAX_SEED + 1) for number in range(num_images))
    drawings = tuple(first.again(first.options.prompt, seed) for seed in seeds)
    return Request(model, drawings, asked)


def find_model(name: object, models: Mapping[str, OfferedModel]) -> OfferedModel:
    """The offered model of that name, the first one for None; raises ValueError if there is none, or it lacks files."""
    present = [one for one, model in models.items() if not model.missing]
    name = present[0] if name is None else name
    if not isinstance(name, str) or name not in models:
        raise ValueError(f"model must be one of {', '.join(present)}, got {_shown(name)}")
    if models[name].missing:
        raise ValueError(f"model {name} is not on this server; available are {', '.join(present)}")
    return models[name]


def whole(name: str, value: object, low: int, high: int) -> int:
    """Convert to a whole number: a form sends 13.0 for 13, and a seed as text, since a browser is exact up to 2^53."""
    whole = int(value) if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 20 else value
    if isinstance(whole, float) and whole.is_integer():
        whole = int(whole)
    if isinstance(whole, bool) or not isinstance(whole, int) or not low <= whole <= high:
        raise ValueError(f"{name} must be a whole number from {low} to {high}, got {_shown(value)}")
    return whole


def _shown(value: object) -> str:
    """The value's representation, shortened to 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
