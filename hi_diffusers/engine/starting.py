"""What a batch of drawings begins with: noise, or the pictures that they start from, noised."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from hi_diffusers.denoising.start import Start
from hi_diffusers.families.family import Model
from hi_diffusers.pictures.inputs import Fitted
from hi_diffusers.request.options import ResolvedOptions


@dataclass(frozen=True)
class Begun:
    """What a batch is drawn from. Shapes: B pictures, C latent channels.

    Attributes:
        latents: [B,C,H,W], fp32: noise, or noised pictures.
        start: the pictures; None without.
    """

    latents: Tensor
    start: Start | None


def begin(
    model: Model,
    options: Sequence[ResolvedOptions],
    generators: Sequence[Any],
    sigma: float,
    inputs: Fitted | None = None,
) -> Begun:
    """Draw a batch's noise, and noise the pictures that it starts from.

    Args:
        options: one per picture.
        generators: one per picture, for the noise.
        sigma: noise level of the first step that is drawn.
        inputs: the pictures to start from; None reads them here, if there are any.

    Raises:
        ValueError: if a picture's file was changed since it was checked.
    """
    first = options[0]
    noise = model.draw_noise(len(options), first.width, first.height, list(generators))
    inputs = inputs or inputs_of(options)
    if inputs is None:
        return Begun(noise, None)
    start = Start.of(model.encode_pictures(inputs.pictures), inputs.masks)
    return Begun(start.noised(noise, sigma) if first.first_step else noise, start)


def inputs_of(options: Sequence[ResolvedOptions]) -> Fitted | None:
    """The pictures that a batch starts from; None without.

    Args:
        options: one per picture; all have one to start from, or none has.

    Raises:
        ValueError: if a picture's file was changed since it was checked.
    """
    if options[0].image is None:
        return None
    pictures, masks = [], []
    for one in options:
        assert one.image is not None and one.fit is not None
        size = (one.width, one.height, one.fit)
        pictures.append(one.image.fitted(*size))
        white = np.ones((one.height, one.width), np.float32)
        masks.append(white if one.mask_image is None else one.mask_image.fitted(*size))
    masked = any(one.mask_image is not None for one in options)
    return Fitted(np.stack(pictures), np.stack(masks) if masked else None)
