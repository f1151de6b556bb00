"""A request to a pipeline of diffusers: what was asked for, and with everything filled in."""

import copy
import math
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from cache_functions import CacheConfig, CalibrationShelf, Resolution, resolve
from cache_functions.config import MAX_STEPS
from forecasting.generation import with_target
from forecasting.levels import Levels, sampler_of
from hi_diffusers.pictures.inputs import InputPicture, check_mask, check_white, read_picture
from hi_diffusers.request.options import LARGEST_SEED, MAX_SIDE, RANDOM_SEED, check_prompt
from hi_diffusers.stock.pipeline_class import TRUE_CFG_SCALE, PipelineClass
from hi_diffusers.stock.source import StockSource
from hi_diffusers.weights.source import read_json

MAX_FRAMES = 10_000


@dataclass(frozen=True)
class StockOptions:
    """Options of a drawing. None is the published value, else the pipeline's own.

    Attributes:
        prompt: what to draw; for pipelines that draw classes, a class's number or name.
        negative_prompt: what it should not show.
        seed: 0 to 2^64 - 1; -1 is None, a random one.
        width, height: pixels.
        num_steps: denoising steps.
        guidance: the argument guidance_scale, or the guider's scale.
        true_cfg: the argument true_cfg_scale.
        guidance_2: the argument guidance_scale_2, of a second expert.
        num_frames, fps: frames of a video, and frames per second.
        max_sequence_length: tokens per prompt.
        images: files of the pictures to start from.
        mask_image: file of a picture: what is white is drawn anew.
        strength: share of the steps that are drawn, of pipelines that begin with a picture.
    """

    prompt: str
    negative_prompt: str | None = None
    seed: int | None = None
    width: int | None = None
    height: int | None = None
    num_steps: int | None = None
    guidance: float | None = None
    true_cfg: float | None = None
    guidance_2: float | None = None
    num_frames: int | None = None
    fps: int | None = None
    max_sequence_length: int | None = None
    images: tuple[Path, ...] = ()
    mask_image: Path | None = None
    strength: float | None = None

    def __post_init__(self) -> None:
        check_prompt("prompt", self.prompt)
        check_prompt("negative_prompt", self.negative_prompt or "")
        if self.seed == RANDOM_SEED:
            object.__setattr__(self, "seed", None)
        whole = {
            "seed": (0, LARGEST_SEED),
            "width": (1, MAX_SIDE),
            "height": (1, MAX_SIDE),
            "num_steps": (1, MAX_STEPS),
            "num_frames": (1, MAX_FRAMES),
            "fps": (1, 240),
            "max_sequence_length": (1, 4096),
        }
        for name, (low, high) in whole.items():
            value = getattr(self, name)
            if value is not None and (type(value) is not int or not low <= value <= high):
                raise ValueError(f"{name} must be a whole number from {low} to {high}, got {value!r}")
        for name, most in {"guidance": 100.0, "true_cfg": 100.0, "guidance_2": 100.0, "strength": 1.0}.items():
            value = getattr(self, name)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= most:
                raise ValueError(f"{name} must be a number from 0 to {most:g}, got {value!r}")
            object.__setattr__(self, name, float(value))


@dataclass(frozen=True)
class StockRequest:
    """A drawing with nothing left open.

    Attributes:
        source: the pipeline.
        prompt, seed: the picture's.
        options: the other options by name, as they go into the metadata.
        images: the pictures to start from.
        mask: what of them is drawn anew is white; None: all of it.
        image_hashes: SHA-256 of the pictures' files.
        mask_hash: SHA-256 of the mask's file.
        label: number of the class to draw; None if prompts are drawn.
        cache: the cache as it was asked for; the session resolves it when the noise levels are known.
        shelf: where calibrations are.
        notices: sentences about choices made for the user.
    """

    source: StockSource
    prompt: str
    seed: int
    options: Mapping[str, Any]
    images: tuple[Image.Image, ...] = field(default=(), repr=False)
    mask: Image.Image | None = field(default=None, repr=False)
    image_hashes: tuple[str, ...] = ()
    mask_hash: str | None = None
    label: int | None = None
    cache: CacheConfig = field(default_factory=CacheConfig.off)
    shelf: CalibrationShelf | None = None
    notices: tuple[str, ...] = ()

    @property
    def num_steps(self) -> int:
        """Number of denoising steps of the whole schedule."""
        return int(self.options["num_steps"])

    @property
    def guidance(self) -> float:
        """Classifier-free guidance scale; 0 without."""
        return guidance_of(self.source.pipeline_class, self.options)

    def uncached(self) -> "StockRequest":
        """The same drawing with every step computed."""
        return replace(self, cache=CacheConfig.off(), notices=())

    def again(self, prompt: str, seed: int) -> "StockRequest":
        """The same settings with another prompt and seed."""
        label = find_label(self.source.pipeline_class, prompt) if self.source.pipeline_class.draws_classes else None
        return replace(self, prompt=prompt, seed=seed, label=label)

    def settings(self) -> dict[str, Any]:
        """All options of the drawing, JSON-able."""
        own: dict[str, Any] = {"prompt": self.prompt, "seed": self.seed, **self.options}
        own |= {"images": list(self.image_hashes)} if self.image_hashes else {}
        return own | ({"mask_image": self.mask_hash} if self.mask_hash else {})


def decide(
    source: StockSource, options: StockOptions, cache: CacheConfig, calibration_dir: Path | None = None
) -> StockRequest:
    """Fill in what a request leaves open, and check that the pipeline can draw it. Weights are not read.

    Args:
        cache: how to cache.
        calibration_dir: folder that is searched for calibrations first.

    Raises:
        ValueError: naming the option that the pipeline does not take, or its value.
    """
    pipeline = source.pipeline_class
    given = {one.name: getattr(options, one.name) for one in fields(options)}
    for name, value in given.items():
        if name not in ("prompt", "seed") and value not in (None, ()) and not pipeline.takes(name):
            raise ValueError(
                f"{name} is not taken by {pipeline.class_name}, which takes {', '.join(pipeline.options())}"
            )
    filled = {}
    for name in pipeline.options():
        if name in ("prompt", "images", "mask_image"):
            continue
        value = given[name] if given[name] is not None else source.default(name)
        if value is not None:
            filled[name] = value
    if pipeline.traits.guided_by == TRUE_CFG_SCALE:
        _settle_guidance(source, given, filled)
    _check_size(pipeline, filled)
    notices = []
    if not guidance_of(pipeline, filled) and (given["negative_prompt"] or "").strip():
        notices.append("the negative prompt has no effect without classifier-free guidance")
    if pipeline.traits.needs_image and not options.images:
        raise ValueError(f"image must be given: {pipeline.class_name} starts from a picture")
    if pipeline.traits.needs_mask and options.mask_image is None:
        raise ValueError(f"mask_image must be given: {pipeline.class_name} draws a part of a picture")
    opened = [read_picture(path) for path in options.images]
    mask = None if options.mask_image is None else InputPicture.of(options.mask_image, "mask_image")
    white = None if mask is None else mask.pixels().convert("L")
    if mask is not None and white is not None:
        check_mask(opened[0][0].size if opened else None, mask.size)
        check_white(np.asarray(white))
    seed = secrets.randbelow(2**32) if options.seed is None else options.seed
    label = find_label(pipeline, options.prompt) if pipeline.draws_classes else None
    request = StockRequest(
        source,
        options.prompt,
        seed,
        filled,
        tuple(picture for picture, _ in opened),
        white,
        tuple(sha256 for _, sha256 in opened),
        None if mask is None else mask.sha256,
        label,
    )
    if not _needs_calibration(cache):
        check_cache(request, cache, CalibrationShelf(""))  # refused before a repository's weights are fetched
    shelf = source.shelf(guidance_text(pipeline, filled), calibration_dir)
    resolution = check_cache(request, cache, shelf)
    return replace(request, cache=cache, shelf=shelf, notices=(*notices, *resolution.notices))


def _settle_guidance(source: StockSource, given: Mapping[str, Any], filled: dict[str, Any]) -> None:
    """Of models with true_cfg_scale: the other scale needs a network that knows it, this one a negative prompt."""
    if "guidance" in filled and not read_json(source.part("transformer") / "config.json").get("guidance_embeds"):
        if given["guidance"] is not None:
            raise ValueError("guidance has no effect on this network, which does not read it: give true_cfg")
        del filled["guidance"]
    if filled.get("true_cfg", 0) > 1:
        filled.setdefault("negative_prompt", "")


def _needs_calibration(cache: CacheConfig) -> bool:
    looked_up = cache.basis == "learned" or (cache.schedule == "mask" and cache.mask is None)
    return looked_up or cache.calibration is not None


def check_cache(request: StockRequest, cache: CacheConfig, shelf: CalibrationShelf) -> Resolution:
    """Resolve the cache for the pipeline's scheduler as its files configure it, to refuse early what cannot work.

    The noise levels may depend on what is drawn, so the session resolves it again when it knows them.

    Raises:
        ValueError: if the cache cannot work.
    """
    if cache.is_off:
        return Resolution(cache)
    if cache.target == "residual":
        raise ValueError("target must be velocity, x0 or module, got 'residual', which HiDream's own transformer knows")
    scheduler = find_scheduler(request.source)
    sampler = sampler_of(scheduler, drawn_steps(request, scheduler), request.guidance)
    if sampler.renoises and cache.target is None and not has_levels(scheduler):
        raise ValueError(
            f"cache must be off with {sampler.name}: it adds noise at every step, and its noise levels are not known"
        )
    return resolve(with_target(cache, sampler.renoises), sampler, shelf)


def drawn_steps(request: StockRequest, scheduler: Any) -> int:
    """Number of steps that are drawn; a scheduler of second order takes more than are asked for."""
    strength, steps = request.options.get("strength", 1.0), request.num_steps
    drawn = max(1, min(steps, math.ceil(steps * strength)))
    own = copy.deepcopy(scheduler)
    try:
        own.set_timesteps(steps)
    except Exception:  # flow schedulers with a shift that depends on the size take as many as are asked for
        return drawn
    return drawn if drawn < steps else len(own.timesteps)


def has_levels(scheduler: Any) -> bool:
    """Whether a scheduler's noise levels are known."""
    own = copy.deepcopy(scheduler)
    try:
        own.set_timesteps(4)
        Levels.of(own)
    except ValueError as error:
        return "are not known" not in str(error)
    except Exception:
        return True  # they depend on what is drawn
    return True


def find_scheduler(source: StockSource) -> Any:
    """The pipeline's scheduler, as its files configure it; raises ValueError if there is none that is known."""
    import diffusers

    name = source.index.get("scheduler", [None, None])[1]
    scheduler_class = getattr(diffusers, str(name), None)
    folder = source.part("scheduler")
    if scheduler_class is None or not folder.is_dir():
        raise ValueError(f"pipeline {source.where} has no scheduler that diffusers knows, got {name!r}")
    try:
        return scheduler_class.from_pretrained(str(folder))
    except Exception as error:  # libraries raise anything for files that they do not expect
        raise ValueError(f"{folder} holds no scheduler that can be made: {type(error).__name__}: {error}") from error


def guidance_of(pipeline: PipelineClass, options: Mapping[str, Any]) -> float:
    """The classifier-free guidance scale among the options; 0 without."""
    name = pipeline.guided_option
    scale = 0.0 if name is None else options.get(name, 0.0)
    return float(scale) if scale > 1 else 0.0


def guidance_text(pipeline: PipelineClass, options: Mapping[str, Any]) -> str:
    """All guidance options but the classifier-free scale, as text: a calibration must share them."""
    names = {"guidance", "true_cfg", "guidance_2"} & set(options) - {pipeline.guided_option}
    others = {name: options[name] for name in sorted(names)}
    return ",".join(f"{name}={value:g}" for name, value in others.items())


def find_label(pipeline: PipelineClass, prompt: str) -> int:
    """The number of a class, given by number or name.

    Raises:
        ValueError: if there is no such class.
    """
    text = prompt.strip()
    names = {part.strip().lower(): number for number, joined in pipeline.labels.items() for part in joined.split(",")}
    number = int(text) if text.isdecimal() and len(text) < 7 else names.get(text.lower())
    if number is None or (pipeline.labels and number not in pipeline.labels):
        some = ", ".join(repr(name) for name in list(names)[:5])
        raise ValueError(f"prompt must be a class's number or name, such as {some}, got {prompt!r}")
    return number


def _check_size(pipeline: PipelineClass, options: Mapping[str, Any]) -> None:
    name, multiple, frames = pipeline.class_name, pipeline.traits.multiple, pipeline.traits.frames
    for side in ("width", "height"):
        value = options.get(side)
        if value is not None and value % multiple:
            raise ValueError(f"{side} must be a multiple of {multiple} for {name}, got {value}")
    count = options.get("num_frames")
    if count is not None and count % frames != 1:
        raise ValueError(f"num_frames must be a multiple of {frames}, plus one, for {name}, got {count}")
