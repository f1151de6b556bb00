"""A request as a command line, and a picture's metadata as the page's settings."""

import shlex
from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Any

from cache_functions import CacheConfig
from cache_functions.named import CACHES
from hi_diffusers.pictures.inputs import FITS, InputPicture
from hi_diffusers.request.options import ResolvedOptions, SamplingOptions
from hi_diffusers.service.offered import LORA_SCALES, LoraFolder, OfferedModel
from hi_diffusers.service.requests import OF_CACHE, Limits, Request, check

OF_SAMPLING = (
    "negative_prompt",
    "num_steps",
    "guidance",
    "scheduler",
    "shift",
    "max_sequence_length",
)
"""The settings that a command leaves out where they are the model's defaults."""
FIELDLESS = ("scheduler", "shift", "max_sequence_length")
"""The settings of a picture that the page has no fields for."""


def command_line(request: Request, loras: LoraFolder, number: int = 0) -> str:
    """The command that draws the same picture from the same model's files.

    Args:
        loras: the LoRAs that visitors know by name.
        number: number of the picture, from 0.
    """
    model, options = request.model, request.drawings[number].options
    words = ["python", "inference.py", *_prompt(options.prompt), "--model_type", model.preset.name]
    source = model.source
    for one in fields(source):
        if one.name not in ("quantization", "loras") and getattr(source, one.name) is not None:
            words += [f"--{one.name}", "..."]  # visitors must not learn the server's paths
    if source.quantization != "none":
        words += ["--quantization", source.quantization]
    for lora in source.loras:
        words += ["--lora", loras.told(lora) or "..."]
    words += ["--seed", str(options.seed)]
    words += _start(options)
    defaults = SamplingOptions(prompt="", image=options.image).resolve(model.preset)  # without a size it is the image's
    if (options.width, options.height) != (defaults.width, defaults.height):
        words += ["--width", str(options.width), "--height", str(options.height)]
    for name in OF_SAMPLING:
        value = getattr(options, name)
        if value != getattr(defaults, name):
            words += _flag(name, value)
    return shlex.join([*words, *_cache(request.asked)])


def _start(options: ResolvedOptions) -> list[str]:
    """The flags of a picture to start from, by the names that its files have for the visitor."""
    words = []
    for name, picture in (("image", options.image), ("mask", options.mask_image)):
        if picture is not None:
            words += _flag(name, picture.file.name if picture.file else "...")
    if options.image is not None:
        words += ["--strength", repr(options.strength).removesuffix(".0")]
        words += [] if options.fit == FITS[0] else ["--fit", str(options.fit)]
    return words


def _flag(name: str, value: object) -> list[str]:
    return [f"--{name}={value}"] if str(value).startswith("-") else [f"--{name}", str(value)]


def _prompt(prompt: str) -> list[str]:
    return [f"--prompt={prompt}"] if prompt.startswith("-") else [prompt]


def _cache(asked: CacheConfig) -> list[str]:
    """The flags that ask for this cache: one of CACHES, and its changed settings."""
    if asked.is_off:
        return ["--cache", "off"]
    own = {field.name: getattr(asked, field.name) for field in fields(CacheConfig)}
    for name, make in CACHES.items():
        base = make()
        different = {key: value for key, value in own.items() if value != getattr(base, key)}
        if set(different) <= {"target", "full_steps", "quality"} or (
            name != "best" and set(different) <= set(OF_CACHE)
        ):
            named = [word for key, value in different.items() for word in (f"--{key}", str(value))]
            return ["--cache", name, *named]
    raise AssertionError(f"the page cannot have asked for {asked}")


def values_of(
    metadata: Mapping[str, Any],
    limits: Limits,
    models: Mapping[str, OfferedModel],
    image: InputPicture | None = None,
    mask: InputPicture | None = None,
) -> tuple[dict[str, Any], str]:
    """The page's settings that draw a picture again, and a sentence if they only approximate it.

    The LoRA that a visitor chose is not among them: see `lora_of`.

    Args:
        metadata: metadata of a picture that is not trusted. Nothing in it is opened as a file.
        image, mask: the pictures to start from that are at hand.

    Raises:
        ValueError: if its settings cannot be used here.
    """
    known = {field.name for field in fields(SamplingOptions)}
    options, cache = metadata.get("options", {}), metadata.get("cache", {})
    values = {name: value for name, value in options.items() if name in known}
    for name, picture, hint in (
        ("image", image, "give that one under Start from a picture first"),
        ("mask_image", mask, "inference.py --like draws it"),
    ):
        sha256 = values.get(name)
        if sha256 is not None and (picture is None or picture.sha256 != sha256):
            which = "another picture" if name == "image" else "a mask"
            raise ValueError(f"it was drawn from {which}: {hint} (SHA-256 {sha256})")
        values[name] = None if sha256 is None else picture
    values["model"] = metadata.get("model", {}).get("model_type")
    wanted = {name: value for name, value in cache.items() if value is not None}
    for given in _candidates(wanted):
        try:
            request = check(values | given, limits, models)
        except (ValueError, TypeError):
            continue
        made = {name: value for name, value in request.cache.settings().items() if value is not None}
        if made == wanted or given == {"cache": "off"}:
            return values | given, ""
    check(values, limits, models)  # raises ValueError if these cannot be used either
    return values, "Its cache has settings that this page has no fields for; inference.py --like draws it exactly."


def lora_of(metadata: Mapping[str, Any], loras: LoraFolder, own: int) -> tuple[str, float, str]:
    """Name and scale of the LoRA that a visitor chose for a picture, and a sentence if it is not known here.

    Args:
        metadata: as in `values_of`.
        own: number of LoRAs that the model has without one.
    """
    given = metadata.get("model", {}).get("loras")
    added = given[own:] if isinstance(given, list) else []
    if not added:
        return "", 1.0, ""
    fingerprint, _, scale = str(added[0]).rpartition(":")
    name = loras.named(fingerprint) if len(added) == 1 else None
    least, most = LORA_SCALES
    try:
        if name is not None and least <= float(scale) <= most:
            return name, float(scale), ""
    except ValueError:
        pass
    return "", 1.0, "It was drawn with a LoRA that is not on this server; inference.py --lora adds it."


def missing_fields(options: ResolvedOptions, defaults: ResolvedOptions) -> str:
    """A sentence about settings of a picture that the page has no fields for; empty if there are none."""
    own = {name: getattr(options, name) for name in FIELDLESS}
    told = [f"{name} {value}" for name, value in own.items() if value != getattr(defaults, name)]
    return f"The page has no field for {', '.join(told)}; inference.py --like draws it exactly." if told else ""


def _candidates(wanted: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The page's settings that may ask for a cache, the shortest first."""
    if wanted.get("target") == "off":
        yield {"cache": "off"}
        return
    mask = wanted.get("mask")
    budgets: list[dict[str, Any]] = [{}]
    if isinstance(mask, list):
        budgets.append({"full_steps": len(mask)})
    budgets += [{name: wanted[name]} for name in ("full_steps", "fresh_threshold") if name in wanted]
    for name in ("best", "taylorseer", "hicache"):
        for budget in budgets:
            yield {"cache": name} | budget
            yield {"cache": name, "target": wanted.get("target")} | budget
    parts = {name: wanted[name] for name in OF_CACHE if name in wanted}
    for name in ("taylorseer", "hicache"):
        for drop in ((), ("full_steps",), ("fresh_threshold",)):
            yield {"cache": name} | {key: value for key, value in parts.items() if key not in drop}
