"""From a prompt to a picture: the functions that every script calls."""

import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import transformers
from PIL import Image
from torch import Tensor

from cache_functions import CacheConfig, StepRecord
from hi_diffusers import __version__
from hi_diffusers.denoising.steps import Change, Interrupted, StepEnd
from hi_diffusers.engine.orders import Draw
from hi_diffusers.engine.starting import begin, inputs_of
from hi_diffusers.families.family import Model
from hi_diffusers.pictures.inputs import Fitted
from hi_diffusers.pictures.metadata import VERSION, write_picture
from hi_diffusers.request.drawing import Drawing, decide
from hi_diffusers.request.options import ResolvedOptions, SamplingOptions

OnStep = Callable[[StepRecord, Callable[..., Image.Image]], bool]


@dataclass(frozen=True)
class Seconds:
    """Wall-clock seconds of a batch's stages."""

    encode: float
    denoise: float
    decode: float

    @property
    def whole(self) -> float:
        """Seconds of all stages."""
        return self.encode + self.denoise + self.decode


@dataclass(frozen=True)
class Generation:
    """One picture.

    Attributes:
        image: 8-bit RGB.
        pixels: [H,W,3], fp32 in 0..1, before rounding.
        metadata: all settings of the picture, JSON-able; equal settings give equal metadata.
        trace: record of each step. It is measured, so it is never part of the metadata.
        seconds: times of the stages, for the whole batch of the picture.
    """

    image: Image.Image
    pixels: np.ndarray
    metadata: dict[str, Any]
    trace: tuple[StepRecord, ...]
    seconds: Seconds

    def save(self, path: str | Path, *, quality: int = 95) -> None:
        """Write the picture with its metadata; `image.save` would write the pixels alone.

        Args:
            path: .png, .jpg or .webp; an existing file is replaced.
            quality: 1 to 100, for JPEG and WebP.
        """
        write_picture(self.image, path, self.metadata, quality=quality)


def generate(
    pipe: Model,
    options: SamplingOptions,
    cache: CacheConfig | None = None,
    *,
    embeds: Any = None,
    on_step: OnStep | None = None,
) -> Generation:
    """Draw one picture.

    Args:
        pipe: what `load_pipeline` returned.
        options: what to draw.
        cache: how to cache; None is the preset's default, `CacheConfig.off()` computes every step.
        embeds: the encoded prompt, as `pipe.encode` returns it for these options; None encodes it here.
        on_step: called after every step with its record and a function that makes a preview of the picture so far, of a
            batch's picture by its number; False stops the drawing.

    Raises:
        ValueError: if options or cache cannot work, before anything is computed.
        Interrupted: if `on_step` stopped the drawing.
        RuntimeError: if the denoised latents are not finite.
    """
    return generate_batch(pipe, [options], cache, embeds=embeds, on_step=on_step)[0]


def generate_batch(
    pipe: Model,
    options: Sequence[SamplingOptions],
    cache: CacheConfig | None = None,
    *,
    embeds: Any = None,
    on_step: OnStep | None = None,
) -> list[Generation]:
    """Draw several pictures as one batch through the network. Arguments as in `generate`.

    Args:
        options: one per picture; all but prompt, seed and pictures must be equal.
    """
    preset = getattr(pipe, "preset", None)
    if preset is None:
        raise ValueError("pipe must come from load_pipeline, which sets its preset; got one without a preset")
    if not options:
        raise ValueError("a batch needs at least one picture, got none")
    first = decide(preset, options[0], cache, pipe.calibrations)
    others = [replace(first, options=one.resolve(preset)) for one in options[1:]]
    if embeds is None:
        notices = (notice for one in (first, *others) for notice in prompt_notices(pipe, one.options))
        for notice in dict.fromkeys([*first.notices, *notices]):
            warnings.warn(notice, stacklevel=2 + (len(options) == 1))
    return draw_batch(pipe, [first, *others], embeds=embeds, on_step=on_step)


def draw_batch(
    model: Model,
    drawings: Sequence[Drawing],
    *,
    embeds: Any = None,
    on_step: OnStep | None = None,
) -> list[Generation]:
    """Draw decided drawings as one batch.

    Args:
        model: the model that was loaded for the drawings' preset.
        drawings: one per picture; all but prompt, seed and pictures must be equal.
        embeds, on_step: as in `generate`.

    Raises:
        ValueError, Interrupted, RuntimeError: as in `generate`.
    """
    _check_alike(drawings)
    first, trace = drawings[0], list[StepRecord]()
    first.cache.check_batch(len(drawings))
    ranks = model.ranks

    def on_step_end(end: StepEnd) -> Change | None:
        trace.append(end.record)
        is_stopped = True  # by an error, too
        try:
            if on_step is None or on_step(end.record, lambda number=0: model.preview(end.x0[number:])) is not False:
                is_stopped = False
        finally:
            if ranks is not None:
                ranks.stop(is_stopped)
        if is_stopped:
            raise Interrupted(f"stopped after step {end.record.index + 1} of {first.options.drawn_steps}")
        return None

    started = time.perf_counter()
    if embeds is None:
        embeds = encode_prompts(model, [one.options for one in drawings])
    encoded = time.perf_counter()
    inputs = inputs_of([one.options for one in drawings])
    with nullcontext() if ranks is None else ranks.in_step():
        if ranks is not None:
            ranks.share(Draw(tuple(drawings), embeds.to(torch.device("cpu")), inputs))
        latents = denoise_batch(model, drawings, embeds, on_step_end, inputs)
    _check_finite(latents)
    denoised = time.perf_counter()
    try:
        pixels = model.decode(latents)
    finally:
        model.release()
    pixels = pixels if inputs is None else inputs.keep_rest(pixels)
    seconds = Seconds(encoded - started, denoised - encoded, time.perf_counter() - denoised)
    return [
        Generation(_to_image(picture), picture, _metadata(model, one), tuple(trace), seconds)
        for picture, one in zip(pixels, drawings, strict=True)
    ]


def denoise_batch(
    model: Model,
    drawings: Sequence[Drawing],
    embeds: Any,
    on_step_end: Callable[[StepEnd], Change | None] | None = None,
    inputs: Fitted | None = None,
) -> Tensor:
    """Draw a batch's noise, noise the pictures that it starts from, and denoise them to latents [B,C,H,W], fp32.

    Args:
        model, drawings: as in `draw_batch`.
        embeds: the result of `encode_prompts`.
        on_step_end: called after every step.
        inputs: the pictures to start from; None reads them here, if there are any.
    """
    generators = [torch.Generator().manual_seed(one.options.seed) for one in drawings]
    scheduler = drawings[0].options.timed_scheduler()
    begun = begin(model, [one.options for one in drawings], generators, float(scheduler.sigmas[0]), inputs)
    return model.denoise(
        begun.latents,
        embeds,
        scheduler=scheduler,
        guidance=drawings[0].options.guidance,
        cache=drawings[0].cache,
        generator=generators,
        on_step_end=on_step_end,
        start=begun.start,
    )


def encode_prompts(model: Model, options: Sequence[ResolvedOptions]) -> Any:
    """The embeddings that a batch of these options is drawn from."""
    negative = [one.negative_prompt for one in options] if options[0].guided else None
    return model.encode([one.prompt for one in options], options[0].max_sequence_length, negative)


def prompt_notices(model: Model, options: ResolvedOptions) -> list[str]:
    """Sentences about words that are cut off or that the model does not know."""
    assert model.preset is not None
    notices = [] if options.prompt.strip() else ["the prompt is empty: the model draws what it likes"]
    count = model.count_tokens(options.prompt, options.max_sequence_length)
    if count.lost:
        notices.append(f"the prompt is cut at {count.limit} tokens; lost: {count.lost!r}")
    if options.guided and options.negative_prompt:
        lost = model.count_tokens(options.negative_prompt, options.max_sequence_length).lost
        if lost:
            notices.append(f"the negative prompt is cut at {count.limit} tokens; lost: {lost!r}")
    if count.unknown:
        notices.append(
            f"{model.preset.name} does not know {', '.join(map(repr, count.unknown))}: it was taught"
            f" {model.preset.world}, such as {model.preset.example!r}"
        )
    return notices


def _check_alike(drawings: Sequence[Drawing]) -> None:
    first = drawings[0].options
    for one in drawings[1:]:
        if one.options.shared() != first.shared():
            raise ValueError("the options of a batch must be equal except prompt, seed and pictures")


def _check_finite(latents: Tensor) -> None:
    if not torch.isfinite(latents).all():
        raise RuntimeError(
            "the denoised latents contain NaN or infinity: check the weights and LoRA, or try --dtype fp32"
        )


def _to_image(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray((pixels * 255).round().astype(np.uint8))


def _metadata(model: Model, drawing: Drawing) -> dict[str, Any]:
    assert model.identity is not None
    return {
        "version": VERSION,
        "software": f"hi-diffusers {__version__}",
        "model": {
            **asdict(model.identity),
            "loras": list(model.identity.loras),  # JSON knows lists only
            "dtype": str(model.drawing_dtype).removeprefix("torch."),
            "device": model.drawing_device.type,
            **({"fp8": True} if model.fp8 else {}),
        },
        "options": drawing.options.settings(),
        "cache": {"target": "off"} if drawing.cache.is_off else drawing.cache.settings(),
        "versions": {
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "transformers": transformers.__version__,
        },
    }
