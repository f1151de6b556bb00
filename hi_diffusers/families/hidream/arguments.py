"""The arguments of a pipeline's call that are pictures, in every form that diffusers takes.

Shapes: B pictures, H x W pixels.
"""

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from hi_diffusers.pictures.inputs import Fitted, InputPicture, check_mask, check_white


@dataclass(frozen=True)
class Given:
    """Pictures to start from, and their masks.

    Attributes:
        images: each a picture, which is fitted to the size that is drawn, or an array [H,W,3], float32 in 0..1.
        masks: the same, arrays [H,W]; None without.
    """

    images: tuple[InputPicture | np.ndarray, ...]
    masks: tuple[InputPicture | np.ndarray, ...] | None

    @classmethod
    def of(cls, image: Any, mask_image: Any, strength: float) -> "Given | None":
        """The arguments of a call; None without an image.

        Args:
            image, mask_image: a PIL image, an array [H,W,3] or [B,H,W,3] (a mask's without channels), a tensor [3,H,W]
                or [B,3,H,W] (a mask's [H,W] or [B,1,H,W]), numbers from 0 to 1 or uint8, or a list of these.

        Raises:
            ValueError: for anything else, or what has no effect.
        """
        if image is None:
            if mask_image is not None or strength != 1.0:
                raise ValueError("mask_image and strength have no effect without an image: give one, or drop them")
            return None
        images = tuple(_each(image, "image"))
        if mask_image is None:
            return cls(images, None)
        masks = tuple(_each(mask_image, "mask_image"))
        if len(masks) not in (1, len(images)) and len(images) != 1:
            raise ValueError(f"mask_image must be one picture, or one for each of {len(images)}, got {len(masks)}")
        for size, mask in itertools.product({_size(one) for one in images}, masks):
            check_mask(size, _size(mask))
        return cls(images, masks)

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the first picture."""
        return _size(self.images[0])

    def fitted(self, count: int, width: int, height: int) -> Fitted:
        """The pictures of a batch of `count` drawings.

        Raises:
            ValueError: if their number does not divide the batch, or an array has another size.
        """
        masks = None if self.masks is None else _fill(self.masks, count, width, height, "mask_image")
        for one in () if masks is None else masks:
            check_white(one)
        return Fitted(_fill(self.images, count, width, height, "image"), masks)


def _each(given: Any, role: str) -> list[InputPicture | np.ndarray]:
    if isinstance(given, list | tuple):
        found = [one for part in given for one in _each(part, role)]
        if not found:
            raise ValueError(f"{role} must be one picture or more, got an empty list")
        return found
    if isinstance(given, Image.Image):
        return [InputPicture.of(given, role)]
    if isinstance(given, Tensor):
        array = given.detach().float().cpu().numpy() / (255 if given.dtype == torch.uint8 else 1)
        array = np.moveaxis(array, -3, -1) if array.ndim > 2 else array
    elif isinstance(given, np.ndarray):
        array = given.astype(np.float32) / (255 if given.dtype == np.uint8 else 1)
    else:
        raise ValueError(
            f"{role} must be a PIL image, an array, a tensor or a list of them, got {type(given).__name__}"
        )
    if array.size == 0 or not (array.min() >= 0 and array.max() <= 1):  # NaN is neither
        raise ValueError(f"{role} must hold numbers from 0 to 1")
    if role == "mask_image" and array.ndim > 2 and array.shape[-1] == 1:
        array = array[..., 0]
    wanted = 2 if role == "mask_image" else 3
    if array.ndim not in (wanted, wanted + 1) or (role == "image" and array.shape[-1] != 3):
        shapes = "[H,W] or [B,H,W]" if wanted == 2 else "[H,W,3] or [B,H,W,3], a tensor [3,H,W] or [B,3,H,W]"
        raise ValueError(f"{role} must have the shape {shapes}, got {list(given.shape)}")
    return list(array) if array.ndim == wanted + 1 else [array]


def _size(one: InputPicture | np.ndarray) -> tuple[int, int]:
    return one.size if isinstance(one, InputPicture) else (one.shape[1], one.shape[0])


def _fill(given: tuple[Any, ...], count: int, width: int, height: int, name: str) -> np.ndarray:
    if count % len(given):
        raise ValueError(f"{name} must be one picture, or one for each of {count}, got {len(given)}")
    found = []
    for one in given:
        if not isinstance(one, InputPicture) and _size(one) != (width, height):
            got = "x".join(map(str, _size(one)))
            raise ValueError(
                f"{name} must have {width}x{height} pixels, got {got}: a PIL image is fitted, arrays are not"
            )
        fitted = one.fitted(width, height, "cover") if isinstance(one, InputPicture) else one
        found += [fitted] * (count // len(given))  # as prompts are repeated: each one's pictures side by side
    return np.stack(found)
