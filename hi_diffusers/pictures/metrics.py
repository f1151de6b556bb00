"""PSNR and SSIM of two pictures, always computed in floating point."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from cache_functions.calibration import merit

# Wang et al. 2004: an 11 x 11 Gaussian window, which scikit-image makes of sigma 1.5.
SSIM_SIGMA = 1.5
SSIM_WINDOW = 11
CAP_DB = 100.0  # means and percentiles count a larger PSNR, of identical or nearly identical pictures, as this


def _unit_pixels(picture: Any, name: str) -> np.ndarray:
    """The picture as float64 in [0, 1]: integers are divided before any subtraction could wrap around."""
    if isinstance(picture, Image.Image):
        picture = picture.convert("RGB")
    pixels = np.asarray(picture)
    if pixels.dtype == np.uint8:
        return pixels / 255.0
    if not np.issubdtype(pixels.dtype, np.floating):
        raise ValueError(f"{name} has dtype {pixels.dtype}; uint8 or a float in [0, 1] is allowed")
    low, high = (pixels.min(), pixels.max()) if pixels.size else (0.0, 0.0)
    if not (low >= 0 and high <= 1):  # in this form NaN is refused, too
        raise ValueError(f"{name} has values from {low:g} to {high:g}; float pictures lie in [0, 1]")
    return pixels.astype(np.float64)


def _pair(a: Any, b: Any) -> tuple[np.ndarray, np.ndarray]:
    first, second = _unit_pixels(a, "a"), _unit_pixels(b, "b")
    if first.shape != second.shape:
        raise ValueError(f"pictures of different shapes cannot be compared: {first.shape} and {second.shape}")
    if first.size == 0:
        raise ValueError(f"pictures of shape {first.shape} have no pixels to compare")
    return first, second


def psnr(a: Any, b: Any) -> float:
    """Peak signal-to-noise ratio of two pictures.

    Args:
        a, b: PIL images, uint8 arrays, or float arrays in [0, 1], of one shape; the kinds may be mixed.

    Returns:
        `-10 log10(mean squared error)` in dB with a peak of 1; `inf` for identical pictures.

    Raises:
        ValueError: the shapes differ, or values are neither uint8 nor in [0, 1].
    """
    first, second = _pair(a, b)
    error = float(np.mean((first - second) ** 2))
    return math.inf if error == 0 else -10 * math.log10(error)


def ssim(a: Any, b: Any) -> float:
    """Structural similarity of two pictures (Wang et al. 2004, Gaussian window of sigma 1.5).

    Args:
        a, b: PIL images, or [H, W, C] arrays as `psnr` takes them; both sides at least 11 pixels.

    Returns:
        The mean over pixels and channels, 1 for identical pictures.

    Raises:
        ValueError: as `psnr`, and for pictures that are smaller than the window or not [H, W, C].
    """
    first, second = _pair(a, b)
    if first.ndim != 3 or min(first.shape[:2]) < SSIM_WINDOW:
        raise ValueError(f"shape {first.shape}: SSIM needs [H, W, C] with sides of {SSIM_WINDOW} or more")
    from skimage.metrics import structural_similarity  # here: it pulls in scipy, which PSNR does not need

    similarity = structural_similarity(
        first,
        second,
        data_range=1.0,
        gaussian_weights=True,
        sigma=SSIM_SIGMA,
        use_sample_covariance=False,
        channel_axis=-1,
    )
    return float(similarity)


@dataclass(frozen=True)
class Score:
    """Median, 10th percentile and mean of the PSNR to the uncached pictures, dB."""

    median: float
    p10: float
    mean: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Score":
        """The score of a set of pictures, from one PSNR per picture."""
        capped = np.minimum(values, CAP_DB)
        return cls(float(np.median(capped)), float(np.percentile(capped, 10)), float(np.mean(capped)))

    @property
    def merit(self) -> float:
        """The value that a search maximises."""
        return merit(self.median, self.p10)
