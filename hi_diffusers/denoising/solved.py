"""A generation with a calibrated solver: K evaluations, and a weighted sum after each.

Shapes: B pictures, C latent channels.
"""

import itertools
from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from cache_functions import CacheConfig, Current, FeatureName, cache_init
from hi_diffusers.denoising.denoiser import Denoiser
from hi_diffusers.denoising.loop import Estimate, Step
from hi_diffusers.denoising.start import Start

OUTPUTS = (FeatureName("solver", place=0), FeatureName("solver", place=1))
"""The denoised estimate of the negative prompt, or the only one; and the guidance's direction."""


class SolverRun:
    """Evaluates the network at the full steps alone; what it returned is kept until the end.

    Args:
        denoiser: the network.
        cache: resolved configuration with target solver.
        sigmas: noise level of every step.
        num_steps: steps of the generation.
        start: the picture that is drawn anew in part; None: all is drawn.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        cache: CacheConfig,
        sigmas: Sequence[float],
        num_steps: int,
        start: Start | None = None,
    ):
        self.denoiser, self.solver, self.sigmas, self.num_steps = denoiser, cache.solver, sigmas, num_steps
        self.start = start
        cache_dic, self.current = cache_init(cache, num_steps, sigmas)
        assert cache_dic is not None
        self.cache_dic = cache_dic

    def __call__(self, latents: Tensor, watch: Step | None = None) -> Tensor:
        """Denoise latents [B,C,H,W]; `watch` is called for every step, for those between after the full one."""
        begun = latents
        for stage, (step, following) in enumerate(itertools.pairwise([*self.solver.full_steps, self.num_steps])):
            estimate = self.evaluate(latents, step)
            latents = self.advance(latents, stage)
            if self.start is not None:
                latents = self.start.held(latents, begun, self.sigmas[0], self.sigmas[following])
            if watch is not None:
                latents = watch(estimate, step, latents)
                for between in range(step + 1, following):
                    latents = watch(replace(estimate, kind="forecast"), between, latents)
        return latents

    def evaluate(self, latents: Tensor, step: int) -> Estimate:
        """Evaluate the network at a full step, and keep its outputs."""
        outputs = evaluate(self.denoiser, latents, step, self.sigmas[step], self.current)
        for name, output in zip(OUTPUTS, outputs, strict=False):
            self.cache_dic.keep(name, output)
        x0, *direction = outputs
        x0 = x0 + self.denoiser.guidance * direction[0] if direction else x0
        return Estimate(x0, (latents - x0) / self.sigmas[step], "full")

    def advance(self, latents: Tensor, stage: int) -> Tensor:
        """The latents at the next full step, or at the end: the weighted sum of the latents and all outputs."""
        share, weights = self.solver.weights(stage)
        total = share * latents
        for name, of_output in zip(OUTPUTS, weights, strict=False):
            total = total + self.cache_dic.forecast(name, of_output)
        return total

    def num_bytes(self) -> int:
        """Bytes of all outputs that are kept."""
        return self.cache_dic.num_bytes()

    def forget(self) -> None:
        """Drop all outputs."""
        self.cache_dic.free()


def evaluate(denoiser: Denoiser, latents: Tensor, step: int, sigma: float, current: Current) -> list[Tensor]:
    """The outputs of one evaluation, each [B,C,H,W]: see OUTPUTS.

    Args:
        latents: [B,C,H,W], fp32.
        step, sigma: index and noise level of the step.
        current: position that the network is told.
    """
    negative, *positive = denoiser.branches(latents, step, None, current)
    return [latents - sigma * negative, *(sigma * (negative - one) for one in positive)]
