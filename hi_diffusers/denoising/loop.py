"""The denoising loop: noise, predict, step. The cache wraps predict, the corrector wraps step."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from cache_functions.state import StepKind


@dataclass(frozen=True)
class Estimate:
    """The prediction of one step. Shapes: B pictures, C latent channels.

    Attributes:
        x0: the denoised estimate [B,C,H,W], fp32.
        velocity: direction from x0 to the noise [B,C,H,W], fp32: (latents - x0) / sigma.
        kind: "full" if it was computed, "forecast" if it was forecast.
    """

    x0: Tensor
    velocity: Tensor
    kind: StepKind


Predict = Callable[[Tensor, int], Estimate]
"""(latents [B,C,H,W], step) -> the step's estimate."""
Step = Callable[[Estimate, int, Tensor], Tensor]
"""(estimate, step, latents) -> the latents after the step."""


def denoise(latents: Tensor, num_steps: int, predict: Predict, step: Step, watch: Step | None = None) -> Tensor:
    """Denoise latents step by step.

    Args:
        latents: noise [B,C,H,W], fp32.
        num_steps: number of denoising steps.
        predict, step: the prediction and the solver's update of one step.
        watch: called after every step; returns the latents that the next step starts from.

    Returns:
        Denoised latents [B,C,H,W].
    """
    for index in range(num_steps):
        estimate = predict(latents, index)
        latents = step(estimate, index, latents)
        if watch is not None:
            latents = watch(estimate, index, latents)
    return latents
