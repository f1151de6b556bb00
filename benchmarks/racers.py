"""Who takes part in benchmarks.peers: our pipeline, diffusers', and the caches that are made for diffusers'."""

import contextlib
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any

import diffusers
import torch
from diffusers.hooks import apply_taylorseer_cache
from diffusers.models.cache_utils import CacheMixin
from torch import Tensor

from benchmarks.sizes import Subject
from cache_functions import CacheConfig, StepRecord, planned_full_steps, resolve
from hi_diffusers.denoising.schedulers import make_scheduler
from hi_diffusers.families.hidream.fast_paths import FastPaths, set_fast_paths
from hi_diffusers.families.hidream.pipeline import HiDreamImagePipeline
from hi_diffusers.families.hidream.prompts import PromptEmbeds

THRESHOLD = 4
TARGETS = ("module", "residual", "velocity", "x0")
CACHED_MODULES = [r".*\.block\.attn1", r".*\.block\.ff_[it]"]


@dataclass(frozen=True)
class Settings:
    """How everybody is run.

    Attributes:
        rounds: of all contenders.
        pictures: that quality is judged by, size nano.
    """

    device: torch.device
    dtype: torch.dtype
    seed: int
    rounds: int
    pictures: int

    def __post_init__(self) -> None:
        for name, low in (("rounds", 1), ("pictures", 0)):
            if not low <= getattr(self, name) <= 1000:
                raise ValueError(f"{name} must be a whole number from {low} to 1000, got {getattr(self, name)}")


@dataclass(frozen=True)
class Lap:
    """One drawing.

    Attributes:
        latents: the result [1,C,H,W], fp32.
        seconds: of the denoising loop.
        records: of our own loop's steps; empty for others.
    """

    latents: Tensor
    seconds: float
    records: tuple[StepRecord, ...] = ()


@dataclass(frozen=True)
class Racer:
    """One way to draw.

    Attributes:
        name, what: of it, and in a phrase.
        full_steps: how many steps are computed whole.
        run: noise [1,C,H,W] and both branches' embeddings to a drawing.
        transformer: what it computes with.
        caches: whether it is a cache, to be held against the others at equal full steps.
        ours: whether it is our pipeline.
    """

    name: str
    what: str
    full_steps: int
    run: Callable[[Tensor, PromptEmbeds], Lap]
    transformer: torch.nn.Module
    caches: bool = False
    ours: bool = False


class Course:
    """One set of weights, and everybody who draws with it.

    Args:
        subject: both classes over the weights.
        pipe: our pipeline over them, with encoders and VAE where the size has them.
        guidance: classifier-free guidance scale.
    """

    def __init__(self, subject: Subject, pipe: HiDreamImagePipeline, guidance: float):
        self.subject, self.size, self.pipe, self.guidance = subject, subject.size, pipe, guidance
        self.num_steps = subject.size.steps

    def racers(self) -> Iterator[Racer]:
        """All that can be run here."""
        num_steps, plan = self.num_steps, self._plan()
        few = len(plan)
        yield self._diffusers("diffusers", "diffusers' pipeline, uncached", num_steps)
        yield self._ours("ours", "our pipeline, uncached", CacheConfig.off())
        yield self._plain("ours plain", "the same with every faster way turned off")
        for target in TARGETS:
            cache = CacheConfig(target=target, fresh_threshold=THRESHOLD)
            yield self._ours(f"ours {target}", f"our pipeline, taylor 1 on {target}", cache)
        if self.pipe.__dict__.get("calibrations") is not None:
            best = resolve(
                CacheConfig.best(few), self._options().sampler(self.size.preset), self.pipe.calibrations
            ).config
            yield self._ours("ours best", "our pipeline, its calibration's choice", best)
        yield self._diffusers_taylorseer(few)
        if find_spec("cache_dit") is not None:
            yield self._cache_dit("cache-dit", "DBCache, F1B0, at our full steps", plan, calibrates=False)
            yield self._cache_dit("cache-dit taylor", "the same with its TaylorSeer", plan, calibrates=True)
        yield self._diffusers("diffusers fewer", "diffusers' pipeline, fewer steps", few)
        yield self._ours("ours fewer", "our pipeline, fewer steps", CacheConfig.off(), few)

    def _plan(self) -> list[int]:
        return planned_full_steps(CacheConfig(target="x0", fresh_threshold=THRESHOLD), self.num_steps)

    def _options(self) -> Any:
        from hi_diffusers import SamplingOptions

        return SamplingOptions("", guidance=self.guidance).resolve(self.size.preset)

    def _ours(self, name: str, what: str, cache: CacheConfig, num_steps: int | None = None) -> Racer:
        steps = num_steps or self.num_steps
        preset = self.size.preset

        def run(noise: Tensor, embeds: PromptEmbeds) -> Lap:
            records: list[StepRecord] = []
            started = self._now()
            scheduler = make_scheduler(preset.scheduler, preset.shift)
            scheduler.set_timesteps(steps, device=noise.device)
            latents = self.pipe.denoise(
                noise,
                embeds,
                scheduler=scheduler,
                guidance=self.guidance,
                cache=cache,
                on_step_end=lambda end: records.append(end.record),
            )
            return Lap(latents, self._now() - started, tuple(records))

        full = steps if cache.is_off else len(planned_full_steps(cache, steps))
        return Racer(name, what, full, run, self.pipe.transformer, caches=not cache.is_off, ours=True)

    def _plain(self, name: str, what: str) -> Racer:
        fast = self._ours(name, what, CacheConfig.off())

        def run(noise: Tensor, embeds: PromptEmbeds) -> Lap:
            set_fast_paths(self.pipe.transformer, FastPaths.none())
            try:
                return fast.run(noise, embeds)
            finally:
                set_fast_paths(self.pipe.transformer, FastPaths())

        return replace(fast, run=run)

    def _diffusers(self, name: str, what: str, num_steps: int) -> Racer:
        pipe = self._their_pipe()
        return Racer(name, what, num_steps, lambda n, e: self._run_theirs(pipe, n, e, num_steps), pipe.transformer)

    def _diffusers_taylorseer(self, full_steps: int) -> Racer:
        pipe = self._their_pipe()
        apply_taylorseer_cache(  # what `enable_cache` does, which this class has not
            pipe.transformer,
            diffusers.TaylorSeerCacheConfig(
                cache_interval=THRESHOLD,
                disable_cache_before_step=1,  # steps 0, 2, 6, 10, ...: as many as ours
                max_order=1,
                taylor_factors_dtype=self.subject.dtype,
                cache_identifiers=CACHED_MODULES,
            ),
        )

        def run(noise: Tensor, embeds: PromptEmbeds) -> Lap:
            CacheMixin._reset_stateful_cache(pipe.transformer)
            context = CacheMixin.cache_context(pipe.transformer, "cond")  # diffusers' pipeline names none
            return self._run_theirs(pipe, noise, embeds, self.num_steps, context)

        what = "diffusers' TaylorSeer hook on attention and feed-forwards, order 1"
        return Racer("diffusers taylorseer", what, full_steps, run, pipe.transformer, caches=True)

    def _cache_dit(self, name: str, what: str, plan: list[int], calibrates: bool) -> Racer:
        import cache_dit

        pipe = self._their_pipe()
        mask = [int(step in plan) for step in range(self.num_steps)]
        config = cache_dit.DBCacheConfig(
            Fn_compute_blocks=1,
            Bn_compute_blocks=0,
            max_warmup_steps=0,
            enable_separate_cfg=False,
            num_inference_steps=self.num_steps,
            steps_computation_mask=mask,
            steps_computation_policy="static",
        )
        calibrator = cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=1) if calibrates else None
        with contextlib.redirect_stdout(None):
            cache_dit.enable_cache(pipe, cache_config=config, calibrator_config=calibrator)

        def run(noise: Tensor, embeds: PromptEmbeds) -> Lap:
            return self._run_theirs(pipe, noise, embeds, self.num_steps)

        return Racer(name, what, len(plan), run, pipe.transformer, caches=True)

    def _their_pipe(self) -> Any:
        """diffusers' pipeline over the same weights, in modules of its own, which a cache may change."""
        with torch.device("meta"):
            transformer = diffusers.HiDreamImageTransformer2DModel(**self.size.transformer).eval()
        transformer.load_state_dict(self.subject.transformers.ours.state_dict(), assign=True)
        names = ("vae", *(f"{kind}{n}" for kind in ("text_encoder", "tokenizer") for n in ("", "_2", "_3", "_4")))
        parts = {name: getattr(self.pipe, name, None) for name in names}
        scheduler = make_scheduler(self.size.preset.scheduler, self.size.preset.shift)
        pipe = diffusers.HiDreamImagePipeline(scheduler=scheduler, transformer=transformer, **parts)
        pipe.default_sample_size = self.subject.inputs.latents.shape[-1]
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def _run_theirs(
        self,
        pipe: Any,
        noise: Tensor,
        embeds: PromptEmbeds,
        num_steps: int,
        context: AbstractContextManager[Any] | None = None,
    ) -> Lap:
        side = noise.shape[-1] * pipe.vae_scale_factor
        (no_t5, t5), (no_pooled, pooled) = embeds.t5.chunk(2), embeds.pooled.chunk(2)
        no_llama, llama = embeds.llama.chunk(2, dim=1)
        started = self._now()
        with context or nullcontext():
            latents = pipe(
                height=side,
                width=side,
                num_inference_steps=num_steps,
                guidance_scale=self.guidance,
                prompt_embeds_t5=t5,
                negative_prompt_embeds_t5=no_t5,
                prompt_embeds_llama3=llama,
                negative_prompt_embeds_llama3=no_llama,
                pooled_prompt_embeds=pooled,
                negative_pooled_prompt_embeds=no_pooled,
                latents=noise.to(t5.dtype),
                output_type="latent",
            ).images
        return Lap(latents.float(), self._now() - started)

    def _now(self) -> float:
        """Seconds, the device waited for."""
        if self.subject.device.type == "cuda":
            torch.cuda.synchronize(self.subject.device)
        return time.perf_counter()
