"""From a request to pictures or frames, with the cache from outside."""

import inspect
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import diffusers
import numpy as np
import torch
import transformers
from PIL import Image

from cache_functions import CacheConfig, StepRecord
from forecasting import StepSeen, forecast
from forecasting.levels import renoises
from forecasting.session import find_denoisers
from hi_diffusers import __version__
from hi_diffusers.denoising.steps import Interrupted
from hi_diffusers.pictures.metadata import VERSION
from hi_diffusers.request.options import MAX_SEED
from hi_diffusers.stock.request import StockRequest
from hi_diffusers.stock.source import StockSource, open_pipeline

OnStep = Callable[[StepRecord, int], bool]
"""(record of a step, number of steps that are drawn) -> whether to go on."""
MAX_ENCODED = 16  # prompts whose embeddings are kept, a few MB each


@dataclass(frozen=True)
class StockResult:
    """One picture or one video.

    Attributes:
        pixels: [H,W,3] of a picture, [F,H,W,3] of a video, fp32 in 0..1, before rounding.
        audio: [channels, samples] in -1..1, of pipelines that make sound; else None.
        audio_rate: samples per second.
        metadata: all settings, JSON-able; equal settings give equal metadata.
        trace: record of each step; it is measured, so it is never part of the metadata.
        notices: sentences about choices that were made when the noise levels were known.
        denoise_seconds, seconds: times of the steps, and of the whole call, for the whole batch.
    """

    pixels: np.ndarray
    audio: np.ndarray | None
    audio_rate: int
    metadata: dict[str, Any]
    trace: tuple[StepRecord, ...]
    notices: tuple[str, ...]
    denoise_seconds: float
    seconds: float

    @property
    def is_video(self) -> bool:
        """Whether it is a video."""
        return self.pixels.ndim == 4

    @property
    def frames(self) -> list[Image.Image]:
        """Its pictures, 8-bit RGB; one, if it is no video."""
        rounded = (self.pixels * 255).round().astype(np.uint8)
        return [Image.fromarray(one) for one in (rounded if self.is_video else rounded[None])]


@dataclass
class StockModel:
    """A loaded pipeline.

    Attributes:
        source: where it came from.
        pipe: the pipeline.
        notices: sentences about how it is kept.
    """

    source: StockSource
    pipe: Any
    notices: tuple[str, ...] = ()
    _encoded: dict[str, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def open(cls, source: StockSource) -> "StockModel":
        """Load it; raises ValueError as `open_pipeline` does."""
        pipe, notices = open_pipeline(source)
        model = cls(source, pipe, tuple(notices))
        model._encode_once()
        return model

    def draw(
        self,
        requests: Sequence[StockRequest],
        on_step: OnStep | None = None,
        observe: Callable[[StepSeen], None] | None = None,
    ) -> list[StockResult]:
        """Draw requests as one batch; all but prompt and seed must be equal, and pictures to start from allow one.

        Args:
            on_step: called after every step; False stops the drawing.
            observe: gets the tensors of every step.

        Raises:
            ValueError: if the cache cannot work with this pipeline; found at its first step at the latest.
            Interrupted: if `on_step` stopped the drawing.
            RuntimeError: if the result is not finite.
        """
        first = requests[0]
        if len(requests) > 1 and renoises(self.pipe.scheduler):  # a batch shares the scheduler's random numbers
            return [self.draw([one], on_step, observe)[0] for one in requests]
        self._set_guider(first)

        def tell(seen: StepSeen) -> None:
            assert session.generation is not None
            if observe is not None:
                observe(seen)
            if on_step is not None and on_step(seen.record, session.generation.num_steps) is False:
                raise Interrupted(f"stopped after step {seen.record.index + 1}")

        started = time.perf_counter()
        try:
            with (
                forecast(
                    self.pipe, first.cache, guidance=first.guidance, calibrations=first.shelf, on_step=tell
                ) as session,
                torch.random.fork_rng(range(torch.cuda.device_count())),
            ):
                torch.manual_seed(first.seed & MAX_SEED)  # some schedulers take no generator
                output = self.pipe(**self.arguments(requests))
                config = session.resolved
        finally:
            free = getattr(self.pipe, "maybe_free_model_hooks", None)
            if free is not None:
                free()
        seconds = time.perf_counter() - started
        found = getattr(output, "frames", None)
        pixels = np.asarray(output.images if found is None else found, dtype=np.float32)
        if not np.isfinite(pixels).all():
            raise RuntimeError("the result contains NaN or infinity: check the weights, or try --dtype fp32")
        audio = getattr(output, "audio", None)
        denoise = sum(record.seconds for record in session.trace)
        return [
            StockResult(
                pixels=pixels[place],
                audio=None if audio is None else np.asarray(audio[place].float().cpu()),
                audio_rate=0 if audio is None else int(self.pipe.vocoder.config.output_sampling_rate),
                metadata=self.metadata(request, config, len(requests)),
                trace=tuple(session.trace),
                notices=session.notices,
                denoise_seconds=denoise,
                seconds=seconds,
            )
            for place, request in enumerate(requests)
        ]

    def arguments(self, requests: Sequence[StockRequest]) -> dict[str, Any]:
        """The arguments of the pipeline's call."""
        first, pipeline = requests[0], self.source.pipeline_class
        arguments: dict[str, Any] = {"output_type": "np"}
        for name, value in first.options.items():
            argument = pipeline.argument(name)
            if argument is not None:
                arguments[argument] = value
        generators = [torch.Generator().manual_seed(one.seed) for one in requests]
        alone = len(requests) == 1
        arguments["generator"] = generators[0] if alone else generators
        if pipeline.draws_classes:
            arguments["class_labels"] = [one.label for one in requests]
            return arguments
        arguments["prompt"] = first.prompt if alone else [one.prompt for one in requests]
        if not alone and "negative_prompt" in arguments:
            arguments["negative_prompt"] = [arguments["negative_prompt"]] * len(requests)
        if first.images:
            arguments["image"] = first.images[0] if len(first.images) == 1 else list(first.images)
        if first.mask is not None:
            arguments["mask_image"] = first.mask
        return arguments

    def metadata(self, request: StockRequest, config: CacheConfig, batch: int = 1) -> dict[str, Any]:
        """All settings of a picture that was drawn in a batch of that size."""
        denoiser = find_denoisers(self.pipe)[0]
        dtype = next(iter(denoiser.parameters())).dtype
        device = self.pipe._execution_device.type
        return {
            "version": VERSION,
            "software": f"hi-diffusers {__version__}",
            "model": {
                "pipeline": self.source.name,
                "class": self.source.pipeline_class.class_name,
                "fingerprint": self.source.fingerprint,
                "files": self.source.files_fingerprint,
                "loras": self.source.lora_hashes,
                **({"batch": batch} if batch > 1 else {}),
                "dtype": str(dtype).removeprefix("torch."),
                "device": device,
            },
            "options": request.settings(),
            "cache": {"target": "off"} if config.is_off else config.settings(),
            "versions": {
                "torch": torch.__version__,
                "diffusers": diffusers.__version__,
                "transformers": transformers.__version__,
            },
        }

    def _set_guider(self, request: StockRequest) -> None:
        """The guidance of pipelines whose guider holds it."""
        if self.source.pipeline_class.traits.guided_by == "guider" and "guidance" in request.options:
            self.pipe.guider = self.pipe.guider.new(guidance_scale=request.options["guidance"])

    def _encode_once(self) -> None:
        """Let the pipeline keep what its text encoders made of a prompt: several pictures of it are common."""
        encode = getattr(self.pipe, "encode_prompt", None)
        if encode is None:
            return
        signature = inspect.signature(encode)

        def encode_once(*args: Any, **kwargs: Any) -> Any:
            bound = signature.bind(*args, **kwargs).arguments
            if not all(map(_is_plain, bound.values())):
                return encode(*args, **kwargs)
            key = repr(sorted(bound.items()))
            if key not in self._encoded:
                if len(self._encoded) >= MAX_ENCODED:
                    self._encoded.pop(next(iter(self._encoded)))
                self._encoded[key] = encode(*args, **kwargs)
            return self._encoded[key]

        self.pipe.encode_prompt = encode_once


def _is_plain(value: Any) -> bool:
    """Whether a value's text says all of it."""
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, str | int | float | bool | torch.device | torch.dtype)
