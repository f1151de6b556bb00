"""The denoising loop: noise, predict, step. The cache wraps predict, the corrector wraps step."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from cache_functions.state import StepKind


@dataclass(frozen=True)
class Estimate:
    """What one step predicts of the picture. Shapes: B pictures, C latent channels.

    Attributes:
        x0: the denoised estimate [B,C,H,W], fp32.
        velocity: what leads from there to the noise [B,C,H,W], fp32: (latents - x0) / sigma.
        kind: whether it was computed or forecast.
    """

    x0: Tensor
    velocity: Tensor
    kind: StepKind


Predict = Callable[[Tensor, int], Estimate]
"""(latents [B,C,H,W], step) -> what is predicted."""
Step = Callable[[Estimate, int, Tensor], Tensor]
"""(estimate, step, latents) -> the latents after the step."""


def denoise(latents: Tensor, num_steps: int, predict: Predict, step: Step, watch: Step | None = None) -> Tensor:
    """From noise to latents, step by step.

    Args:
        latents: noise [B,C,H,W], fp32.
        num_steps: of the generation.
        predict, step: of one step.
        watch: sees every step, and returns what the next one starts from.

    Returns:
        Denoised latents [B,C,H,W].
    """
    for index in range(num_steps):
        estimate = predict(latents, index)
        latents = step(estimate, index, latents)
        if watch is not None:
            latents = watch(estimate, index, latents)
    return latents
