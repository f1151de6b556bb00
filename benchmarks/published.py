"""Caches of other papers that are no setting of ours, each as a prediction for the denoising loop.

All of them forecast the guided velocity from the full steps before. Shapes: B pictures, C latent channels.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from cache_functions import Current
from hi_diffusers.denoising.denoiser import Denoiser
from hi_diffusers.denoising.loop import Estimate, denoise
from hi_diffusers.denoising.schedulers import make_scheduler, solver_step
from hi_diffusers.engine.generation import encode_prompts
from hi_diffusers.families.hidream.pipeline import HiDreamImagePipeline
from hi_diffusers.request.options import ResolvedOptions
from taylor_utils import weighted_sum


@dataclass
class History:
    """What a run has computed so far.

    Attributes:
        sigmas: noise level of every step, and after the last one.
        full_steps: the schedule.
        steps, latents, velocities: of the full steps so far.
    """

    sigmas: Sequence[float]
    full_steps: Sequence[int]
    steps: list[int] = field(default_factory=list)
    latents: list[Tensor] = field(default_factory=list)
    velocities: list[Tensor] = field(default_factory=list)

    def end_of_interval(self) -> int:
        """The next full step, or the end."""
        return next((step for step in self.full_steps if step > self.steps[-1]), len(self.sigmas) - 1)


CHEBYSHEV_RIDGE = 0.1
Forecast = Callable[[History, Tensor, int], Tensor]
"""(history, latents, step) -> the velocity at a step."""


def spectrum(history: History, latents: Tensor, step: int) -> Tensor:
    """Spectrum (arXiv 2603.01623): ridge regression on Chebyshev polynomials over all full steps, and a Taylor step.

    Published settings: polynomials up to degree 4, ridge 0.1, and half of each.
    """
    degree, share = 4, 0.5
    last = len(history.sigmas) - 2
    places = 2 * np.array([*history.steps, step]) / last - 1
    basis = np.polynomial.chebyshev.chebvander(places, degree)
    known, asked = basis[:-1], basis[-1]
    weights = share * (asked @ np.linalg.solve(known.T @ known + CHEBYSHEV_RIDGE * np.eye(degree + 1), known.T))
    weights[-1] += 1 - share
    if len(history.steps) > 1:
        slope = (1 - share) * (step - history.steps[-1]) / (history.steps[-1] - history.steps[-2])
        weights[-1] += slope
        weights[-2] -= slope
    return weighted_sum(weights.tolist(), history.velocities)


def growing(num_steps: int, full_steps: int) -> tuple[int, ...]:
    """Spectrum's schedule: a warm-up, then gaps that grow by a constant, here the one that makes the budget."""
    warm_up = min(5, full_steps // 2 + 1)

    def plan(growth: float) -> list[int]:
        steps, gap = list(range(warm_up)), 2.0
        while steps[-1] + int(gap) < num_steps:
            steps.append(steps[-1] + int(gap))
            gap += growth
        return steps

    growths = np.linspace(0, num_steps, 20 * num_steps)
    best = min((plan(one) for one in growths), key=lambda steps: abs(len(steps) - full_steps))
    if len(best) < full_steps:  # even the first gap is too wide
        return tuple(round(place * (num_steps - 1) / (full_steps - 1)) for place in range(full_steps))
    return tuple(best[:full_steps])


def vde(history: History, latents: Tensor, step: int) -> Tensor:
    """VDE (arXiv 2605.23381): the velocity's parts along the latents and across them.

    Both lengths are extrapolated linearly in the noise level, for each picture; the direction across is reused.
    """
    lengths = []
    direction = torch.zeros_like(latents)
    for kept, velocity in zip(history.latents[-2:], history.velocities[-2:], strict=True):
        along = _dot(velocity, kept) / _dot(kept, kept)
        across = velocity - along * kept
        size = _dot(across, across).sqrt()
        direction = across / size.clamp(min=1e-12)
        lengths.append((along, size))
    (along, size), *_ = reversed(lengths)
    if len(lengths) > 1:
        earlier, later = (history.sigmas[one] for one in history.steps[-2:])
        share = (history.sigmas[step] - later) / (later - earlier)
        along, size = (new + share * (new - old) for old, new in zip(*lengths, strict=True))
    # across the latents as they are now
    moved = direction - _dot(direction, latents) / _dot(latents, latents) * latents
    return along * latents + size * moved / _dot(moved, moved).sqrt().clamp(min=1e-12)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(dim=(1, 2, 3), keepdim=True)


def mean_cache(history: History, latents: Tensor, step: int) -> Tensor:
    """MeanCache (arXiv 2601.19961): the mean velocity of the interval, by the slope between the last two full steps."""
    here = history.velocities[-1]
    if len(history.steps) < 2:
        return here
    earlier, later = (history.sigmas[one] for one in history.steps[-2:])
    slope = (here - history.velocities[-2]) / (later - earlier)
    return here + slope * (history.sigmas[history.end_of_interval()] - later) / 2


@dataclass(frozen=True)
class Published:
    """One published cache.

    Attributes:
        forecast: the velocity at the steps between.
        schedule: (steps, budget) -> the full steps.
        scheduler: sampler that it is drawn with; None is the block's.
        averages: whether the full step, too, is taken with the forecast.
    """

    forecast: Forecast
    schedule: Callable[[int, int], Sequence[int]]
    scheduler: str | None = None
    averages: bool = False

    @torch.no_grad()
    def draw(self, pipe: HiDreamImagePipeline, options: Sequence[ResolvedOptions], full_steps: int) -> np.ndarray:
        """Float pictures [B,H,W,3]."""
        first = options[0]
        scheduler = make_scheduler(self.scheduler or first.scheduler, first.shift)
        scheduler.set_timesteps(first.num_steps)
        scheduler.set_begin_index(0)
        history = History(scheduler.sigmas.tolist(), self.schedule(first.num_steps, full_steps))
        generators = [torch.Generator().manual_seed(one.seed) for one in options]
        noise = pipe.draw_noise(len(options), first.width, first.height, generators)
        denoiser = pipe.denoiser(encode_prompts(pipe, options), scheduler, first.guidance)
        denoiser.condition(noise)
        predict = self._predictor(denoiser, history)
        return pipe.decode(denoise(noise, first.num_steps, predict, solver_step(scheduler)))

    def _predictor(self, denoiser: Denoiser, history: History) -> Callable[[Tensor, int], Estimate]:
        def predict(latents: Tensor, step: int) -> Estimate:
            is_full = step in history.full_steps
            if is_full:
                velocity = denoiser(latents, step, None, Current(len(history.sigmas) - 1, step))
                history.steps.append(step)
                history.latents.append(latents)
                history.velocities.append(velocity)
            if not is_full or self.averages:
                velocity = self.forecast(history, latents, step)
            return Estimate(latents - history.sigmas[step] * velocity, velocity, "full" if is_full else "forecast")

        return predict


def even(num_steps: int, full_steps: int) -> Sequence[int]:
    """Evenly spaced full steps, the last one as far from the end as they are from each other."""
    return [round(place * num_steps / full_steps) for place in range(full_steps)]


PUBLISHED: dict[str, Published] = {
    "Spectrum: velocity, Chebyshev": Published(spectrum, growing),
    "Spectrum's forecasts, evenly spaced": Published(spectrum, even),
    "VDE: velocity along and across": Published(vde, even),
    "MeanCache: mean velocity, Euler": Published(mean_cache, even, scheduler="euler", averages=True),
}
