"""Prompt in, picture out: what every script calls."""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import diffusers
import numpy as np
import torch
import transformers
from PIL import Image
from torch import Tensor

from cache_functions import CacheConfig, resolve
from hi_diffusers import __version__
from hi_diffusers.metadata import VERSION
from hi_diffusers.options import ResolvedOptions, SamplingOptions
from hi_diffusers.pipelines.hidream_image import HiDreamImagePipeline
from hi_diffusers.pipelines.prompts import PromptEmbeds, count_tokens
from hi_diffusers.pipelines.steps import Change, Interrupted, StepEnd, StepRecord
from hi_diffusers.schedulers import make_scheduler

OnStep = Callable[[StepRecord, Callable[[], Image.Image]], bool]


@dataclass(frozen=True)
class Seconds:
    """Wall-clock time of a batch's stages."""

    encode: float
    denoise: float
    decode: float

    @property
    def whole(self) -> float:
        """All stages."""
        return self.encode + self.denoise + self.decode


@dataclass(frozen=True)
class Generation:
    """One picture.

    Attributes:
        image: 8-bit RGB.
        pixels: [H,W,3], fp32 in 0..1, before rounding.
        metadata: what made the picture, JSON-able; the same for the same settings.
        trace: what each step did. Measured, so never part of the metadata.
        seconds: of the stages, for the whole batch that the picture was drawn in.
    """

    image: Image.Image
    pixels: np.ndarray
    metadata: dict[str, Any]
    trace: tuple[StepRecord, ...]
    seconds: Seconds


def generate(
    pipe: HiDreamImagePipeline,
    options: SamplingOptions,
    cache: CacheConfig | None = None,
    *,
    embeds: PromptEmbeds | None = None,
    on_step: OnStep | None = None,
) -> Generation:
    """Draw one picture.

    Args:
        pipe: what `load_pipeline` returned.
        options: what to draw.
        cache: how to cache; None is the preset's default, `CacheConfig.off()` computes every step.
        embeds: the encoded prompt, as `pipe.encode` returns it for these options; None encodes here.
        on_step: called after every step with its record and a function that makes a preview of the picture so far;
            False stops the drawing.

    Raises:
        ValueError: if options or cache cannot work, before anything is computed.
        Interrupted: if `on_step` stopped the drawing.
        RuntimeError: if what was denoised is not finite.
    """
    return generate_batch(pipe, [options], cache, embeds=embeds, on_step=on_step)[0]


def generate_batch(
    pipe: HiDreamImagePipeline,
    options: Sequence[SamplingOptions],
    cache: CacheConfig | None = None,
    *,
    embeds: PromptEmbeds | None = None,
    on_step: OnStep | None = None,
) -> list[Generation]:
    """Draw several pictures as one batch through the network. Arguments as in `generate`.

    Args:
        options: one for each picture; all but prompt and seed must be equal.
    """
    if not hasattr(pipe, "preset"):
        raise ValueError("pipe must come from load_pipeline, which says which model it is; got one without a preset")
    resolved = [one.resolve(pipe.preset) for one in options]
    _check_alike(resolved)
    cache = resolve(cache or pipe.preset.cache, resolved[0].sampler(pipe.preset), pipe.calibrations).config
    return draw_batch(pipe, resolved, cache, embeds=embeds, on_step=on_step)


def draw_batch(
    pipe: HiDreamImagePipeline,
    options: Sequence[ResolvedOptions],
    cache: CacheConfig,
    *,
    embeds: PromptEmbeds | None = None,
    on_step: OnStep | None = None,
) -> list[Generation]:
    """`generate_batch` for those who have resolved options and cache already; nothing is resolved again.

    Args:
        options: resolved, all but prompt and seed equal.
        cache: resolved for them.

    Raises:
        ValueError, Interrupted, RuntimeError: as in `generate`.
    """
    _check_alike(options)
    first = options[0]
    cache.check_batch(len(options))
    trace: list[StepRecord] = []

    def on_step_end(end: StepEnd) -> Change | None:
        trace.append(end.record)
        if on_step is not None and on_step(end.record, lambda: pipe.preview(end.x0)) is False:
            raise Interrupted(f"stopped after step {end.record.index + 1} of {first.num_steps}")
        return None

    started = time.perf_counter()
    if embeds is None:
        embeds = encode_prompts(pipe, options)
    encoded = time.perf_counter()
    latents = denoise_batch(pipe, options, cache, embeds, on_step_end)
    if not torch.isfinite(latents).all():
        raise RuntimeError("the drawing came to numbers that are none (NaN): weights, a LoRA or the dtype are at fault")
    denoised = time.perf_counter()
    try:
        pixels = pipe.decode(latents)
    finally:
        pipe.maybe_free_model_hooks()
    images = pipe.image_processor.numpy_to_pil(pixels)
    seconds = Seconds(encoded - started, denoised - encoded, time.perf_counter() - denoised)
    return [
        Generation(image, picture, _metadata(pipe, one, cache), tuple(trace), seconds)
        for image, picture, one in zip(images, pixels, options, strict=True)
    ]


def denoise_batch(
    pipe: HiDreamImagePipeline,
    options: Sequence[ResolvedOptions],
    cache: CacheConfig,
    embeds: PromptEmbeds,
    on_step_end: Callable[[StepEnd], Change | None] | None = None,
) -> Tensor:
    """From a batch's seeds to its denoised latents [B,C,H,W], fp32.

    Args:
        pipe: what `load_pipeline` returned.
        options: resolved, all but prompt and seed equal.
        cache: resolved.
        embeds: what `encode_prompts` returned.
        on_step_end: see `HiDreamImagePipeline.denoise`.
    """
    first = options[0]
    generators = [torch.Generator().manual_seed(one.seed) for one in options]
    scheduler = make_scheduler(first.scheduler, first.shift)
    scheduler.set_timesteps(first.num_steps, device=pipe._execution_device)
    return pipe.denoise(
        pipe.draw_noise(len(options), first.width, first.height, generators),
        embeds,
        scheduler=scheduler,
        guidance=first.guidance,
        cache=cache,
        generator=generators,
        on_step_end=on_step_end,
    )


def encode_prompts(pipe: HiDreamImagePipeline, options: Sequence[ResolvedOptions]) -> PromptEmbeds:
    """The embeddings that a batch of these options is drawn from."""
    negative = [one.negative_prompt for one in options] if options[0].guided else None
    return pipe.encode([one.prompt for one in options], options[0].max_sequence_length, negative)


def prompt_notices(pipe: HiDreamImagePipeline, options: ResolvedOptions) -> list[str]:
    """Sentences about what of the prompt the model does not get to see."""
    notices = []
    count = count_tokens(_tokenizers(pipe), options.prompt, options.max_sequence_length, pipe.preset.is_bundled)
    if count.lost:
        notices.append(f"the prompt is cut at {count.limit} tokens; lost: {count.lost!r}")
    if count.unknown:
        notices.append(
            f"{pipe.preset.name} does not know {', '.join(map(repr, count.unknown))}: it knows a little world of"
            f" shapes, such as {pipe.preset.example!r}"
        )
    return notices


def _tokenizers(pipe: HiDreamImagePipeline) -> tuple[Any, ...]:
    return (pipe.tokenizer, pipe.tokenizer_2, pipe.tokenizer_3, pipe.tokenizer_4)


def _check_alike(resolved: Sequence[ResolvedOptions]) -> None:
    if not resolved:
        raise ValueError("a batch needs at least one picture, got none")
    first = resolved[0]
    for one in resolved[1:]:
        if replace(one, prompt=first.prompt, seed=first.seed) != first:
            raise ValueError("the options of a batch must be equal but for prompt and seed")


def _metadata(pipe: HiDreamImagePipeline, options: ResolvedOptions, cache: CacheConfig) -> dict[str, Any]:
    return {
        "version": VERSION,
        "software": f"hi-diffusers {__version__}",
        "model": {
            **asdict(pipe.identity),
            "loras": list(pipe.identity.loras),  # JSON knows lists only
            "dtype": str(pipe.transformer.dtype).removeprefix("torch."),
            "device": pipe._execution_device.type,
            **({"fp8": True} if pipe.fp8 else {}),
        },
        "options": options.settings(),
        "cache": {"target": "off"} if cache.is_off else cache.settings(),
        "versions": {
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "transformers": transformers.__version__,
        },
    }
