"""A generation with the cache: the denoising loop with cached predictions.

Shapes: B pictures, C latent channels.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from cache_functions import (
    CacheConfig,
    FeatureName,
    StepRecord,
    cache_init,
    cal_type,
    compute_or_forecast,
)
from cache_functions.solver import SOLVER
from forecasting import Corrector, Levels
from hi_diffusers.denoising.denoiser import Denoiser
from hi_diffusers.denoising.loop import Estimate, Step, denoise
from hi_diffusers.denoising.schedulers import solver_step
from hi_diffusers.denoising.solved import SolverRun
from hi_diffusers.denoising.start import Start
from hi_diffusers.denoising.steps import Change, StepEnd

X0, VELOCITY = FeatureName("x0"), FeatureName("velocity")


class CachedPredictor:
    """Predicts a step: computes it, or forecasts it from the last full steps.

    Args:
        denoiser: the network.
        cache: resolved configuration.
        sigmas: noise level of every step.
    """

    def __init__(self, denoiser: Denoiser, cache: CacheConfig, sigmas: Sequence[float], num_steps: int):
        self.denoiser, self.sigmas = denoiser, sigmas
        self.forecasts_x0 = cache.target == "x0"
        self.cache_dic, self.current = cache_init(cache, num_steps, sigmas)
        if self.cache_dic is not None:
            self.cache_dic.sum_over_ranks = getattr(denoiser, "sum_over_ranks", None)

    def __call__(self, latents: Tensor, index: int) -> Estimate:
        sigma, kind = self.sigmas[index], cal_type(self.cache_dic, self.current)

        def compute() -> tuple[Tensor, Tensor]:
            velocity = self.denoiser(latents, index, self.cache_dic, self.current)
            x0 = latents - sigma * velocity
            return (x0, velocity) if self.forecasts_x0 else (velocity, x0)

        name = X0 if self.forecasts_x0 else VELOCITY
        feature, rest = compute_or_forecast(self.cache_dic, self.current, name, compute)
        if self.forecasts_x0:
            return Estimate(feature, (latents - feature) / sigma if rest is None else rest, kind)
        return Estimate(latents - sigma * feature if rest is None else rest, feature, kind)

    def num_bytes(self) -> int:
        """Bytes of all features that the cache keeps."""
        return self.cache_dic.num_bytes() if self.cache_dic is not None else 0

    def forget(self) -> None:
        """Drop all kept features; the next step is full."""
        if self.cache_dic is not None:
            self.cache_dic.free()


class Watch:
    """Calls an observer after every step, and makes the changes that it returns.

    Args:
        tell: the observer.
        timesteps: the scheduler's timesteps.
        predictor, corrector: they drop their state when the observer changes latents or embeddings.
    """

    def __init__(
        self,
        tell: Callable[[StepEnd], Change | None],
        timesteps: Tensor,
        predictor: CachedPredictor | SolverRun,
        corrector: Corrector | None = None,
    ):
        self.tell, self.timesteps, self.predictor, self.corrector = tell, timesteps, predictor, corrector
        self.started = time.perf_counter()

    def __call__(self, estimate: Estimate, index: int, latents: Tensor) -> Tensor:
        if latents.device.type == "cuda":
            torch.cuda.synchronize(latents.device)
        denoiser, seconds = self.predictor.denoiser, time.perf_counter() - self.started
        evaluations = 0 if estimate.kind == "forecast" else 2 if denoiser.guidance > 1 else 1
        record = StepRecord(index, estimate.kind, seconds, evaluations, self.predictor.num_bytes())
        change = self.tell(StepEnd(record, self.timesteps[index], latents, estimate.x0, denoiser.embeds))
        if change is not None:
            latents = self._obey(change, denoiser, latents)
        self.started = time.perf_counter()
        return latents

    def _obey(self, change: Change, denoiser: Denoiser, latents: Tensor) -> Tensor:
        changes = change.embeds is not None or change.guidance not in (None, denoiser.guidance)
        if changes and isinstance(self.predictor, SolverRun):
            raise ValueError(
                "the solver is fitted to one guidance and needs all outputs of one prompt, so neither may change while"
                " it draws: take target velocity"
            )
        after = latents if change.latents is None else change.latents
        moved = after is not latents
        if (moved or change.embeds is not None) and self.corrector is not None:
            self.corrector.forget()
        if change.guidance is not None:
            denoiser.guidance = change.guidance
        if change.embeds is not None:
            denoiser.embeds = change.embeds
            self.predictor.forget()  # features of other texts, or of another number of branches, cannot forecast these
            denoiser.condition(after)
        return after


def denoise_with_cache(
    latents: Tensor,
    denoiser: Denoiser,
    scheduler: Any,
    cache: CacheConfig,
    generator: Any = None,
    on_step_end: Callable[[StepEnd], Change | None] | None = None,
    start: Start | None = None,
) -> Tensor:
    """Run the denoising loop with the cache. All kept features are freed at the end, also after an error.

    Args:
        latents: noise [B,C,H,W], or a noised picture.
        denoiser: the network, with its embeddings.
        scheduler: a scheduler of diffusers, with its timesteps set.
        cache: resolved configuration.
        generator: one or B generators for schedulers that add noise.
        on_step_end: called after every step; may change what the next one starts from.
        start: the picture that is drawn anew in part; None: all is drawn.

    Returns:
        Denoised latents [B,C,H,W], fp32.

    Raises:
        ValueError: if the cache's schedule can draw only one picture at a time, and there are several.
    """
    cache.check_batch(len(latents))
    latents, timesteps, sigmas = latents.float(), scheduler.timesteps, scheduler.sigmas.tolist()
    if cache.target == SOLVER:
        return _solved(latents, denoiser, scheduler, cache, on_step_end, start)
    scheduler.set_begin_index(0)  # UniPC's timesteps are whole numbers, and it would begin at the second of two equal
    predictor, step = CachedPredictor(denoiser, cache, sigmas, len(timesteps)), solver_step(scheduler, generator)
    corrector = Corrector(scheduler, Levels.flow(sigmas), cache.corrector_from) if cache.corrector else None
    try:
        denoiser.condition(latents)
        step = step if corrector is None else _corrected(step, corrector)
        watch = None if on_step_end is None else Watch(on_step_end, timesteps, predictor, corrector)
        predict = predictor if start is None else start.holding(predictor, sigmas)
        return denoise(latents, len(timesteps), predict, step, watch)
    finally:
        predictor.forget()


def _solved(
    latents: Tensor,
    denoiser: Denoiser,
    scheduler: Any,
    cache: CacheConfig,
    on_step_end: Callable[[StepEnd], Change | None] | None,
    start: Start | None,
) -> Tensor:
    """`denoise_with_cache` with target solver: the scheduler only tells timesteps and noise levels."""
    run = SolverRun(denoiser, cache, scheduler.sigmas.tolist(), len(scheduler.timesteps), start)
    try:
        denoiser.condition(latents)
        return run(latents, None if on_step_end is None else Watch(on_step_end, scheduler.timesteps, run))
    finally:
        run.forget()


def _corrected(step: Step, corrector: Corrector) -> Step:
    """Wrap a solver's step so that a full step first redoes the interval that ends there."""

    def solve(velocity: Tensor, index: int, latents: Tensor) -> Tensor:
        return step(Estimate(latents, velocity, "forecast"), index, latents)

    def corrected(estimate: Estimate, index: int, latents: Tensor) -> Tensor:
        if estimate.kind == "full":
            latents, velocity = corrector.at_full_step(index, latents, estimate.x0, estimate.velocity, solve)
            estimate = replace(estimate, velocity=velocity)
        return step(estimate, index, latents)

    return corrected
