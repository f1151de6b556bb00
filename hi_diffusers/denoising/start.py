"""Where a drawing begins: with noise, or in the middle of the schedule, with a picture that is noised.

Shapes: B pictures, C latent channels, H x W latent pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hi_diffusers.denoising.loop import Estimate, Predict


def first_step(num_steps: int, strength: float) -> int:
    """The first step that is drawn: round(num_steps (1 - strength)).

    Args:
        num_steps: steps of the whole schedule.
        strength: share of them that is drawn, above 0 to 1.

    Raises:
        ValueError: if no step is left, or the strength is out of its range.
    """
    if isinstance(strength, bool) or not isinstance(strength, int | float) or not 0 <= strength <= 1:
        raise ValueError(f"strength must be a number above 0 to 1, got {strength!r}")
    first = round(num_steps * (1 - strength))
    if first >= num_steps:
        raise ValueError(f"strength {strength:g} leaves none of {num_steps} steps to draw: give more of either")
    return first


def begin_at(scheduler: Any, first: int) -> None:
    """Cut off a scheduler's first steps; the others count from 0.

    Args:
        scheduler: a scheduler of diffusers, with its timesteps set.
        first: the first step that is drawn.
    """
    scheduler.timesteps, scheduler.sigmas = scheduler.timesteps[first:], scheduler.sigmas[first:]
    scheduler.num_inference_steps = len(scheduler.timesteps)


@dataclass(frozen=True)
class Start:
    """A picture that is drawn anew, in whole or in part.

    Attributes:
        latents: the picture's [B,C,H,W], fp32.
        drawn: 1 for each latent pixel that is drawn anew, 0 for the others, [B,1,H,W], fp32; None: all are.
    """

    latents: Tensor
    drawn: Tensor | None = None

    @classmethod
    def of(cls, latents: Tensor, masks: np.ndarray | None) -> "Start":
        """A picture with its mask.

        Args:
            latents: the picture's [B,C,H,W], fp32.
            masks: the share of each pixel that is drawn anew, [B,height,width], float32 in 0..1; None: all of it.
        """
        if masks is None:
            return cls(latents)
        # a latent pixel that is white in part is drawn in whole: the rest is put back into the decoded picture
        white = F.max_pool2d(torch.from_numpy(masks)[:, None], masks.shape[-1] // latents.shape[-1]) > 0
        return cls(latents, white.to(latents))

    def noised(self, noise: Tensor, sigma: float) -> Tensor:
        """The picture at a noise level, [B,C,H,W]: a straight line from the picture to the noise [B,C,H,W]."""
        return (1 - sigma) * self.latents + sigma * noise

    def holding(self, predict: Predict, sigmas: Sequence[float]) -> Predict:
        """A prediction whose denoised estimate is the picture itself wherever nothing is drawn anew.

        So every solver leads those pixels along the line from noise to the picture, and a sampler that adds noise adds
        it to the picture. What the cache keeps is the network's own.

        Args:
            predict: the network's prediction, computed or forecast.
            sigmas: noise level of every step.
        """
        if self.drawn is None:
            return predict
        drawn, held = self.drawn, 1 - self.drawn

        def predict_held(latents: Tensor, index: int) -> Estimate:
            estimate = predict(latents, index)
            x0 = drawn * estimate.x0 + held * self.latents
            velocity = drawn * estimate.velocity + held * (latents - self.latents) / sigmas[index]
            return Estimate(x0, velocity, estimate.kind)

        return predict_held

    def held(self, latents: Tensor, begun: Tensor, first: float, sigma: float) -> Tensor:
        """Latents whose pixels that are not drawn anew are on the line from noise to the picture.

        Args:
            latents: [B,C,H,W], at noise level `sigma`.
            begun: the latents that the drawing began with, at noise level `first`.
        """
        if self.drawn is None:
            return latents
        on_line = self.latents + (begun - self.latents) * (sigma / first)
        return self.drawn * latents + (1 - self.drawn) * on_line
