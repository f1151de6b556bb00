import math

import numpy as np
import pytest
from PIL import Image

from hi_diffusers.pictures.metrics import psnr, ssim


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random(shape)


def test_psnr_of_black_and_white_is_zero_dB() -> None:
    """Published tables were wrong here: in uint8 arithmetic 0 - 255 is 1, and no PSNR falls under 27.9 dB."""
    black, white = np.zeros((4, 4, 3), np.uint8), np.full((4, 4, 3), 255, np.uint8)
    assert psnr(black, white) == 0.0, "a difference of 255 must not wrap around to 1"


def test_psnr_has_the_hand_computed_value_in_both_directions() -> None:
    a, b = np.full((2, 2, 3), 100, np.uint8), np.full((2, 2, 3), 200, np.uint8)
    expected = 20 * math.log10(255 / 100)  # 8.13 dB
    assert psnr(a, b) == pytest.approx(expected, abs=1e-12)
    assert psnr(b, a) == pytest.approx(expected, abs=1e-12)


def test_psnr_of_identical_pictures_is_infinite() -> None:
    assert psnr(noise(5, 4, 3), noise(5, 4, 3)) == math.inf


def test_psnr_sees_a_difference_that_single_precision_loses() -> None:
    a = np.full((4, 4, 3), 0.5)
    assert psnr(a, a + 1e-12) == pytest.approx(240, abs=0.01)


def test_arrays_floats_and_pil_images_of_one_picture_are_identical() -> None:
    pixels = (noise(16, 12, 3) * 255).astype(np.uint8)
    image = Image.fromarray(pixels)
    for metric, best in ((psnr, math.inf), (ssim, 1.0)):
        assert metric(image, pixels) == best
        assert metric(pixels, pixels / 255.0) == best


def test_ssim_agrees_with_its_formula_on_constant_pictures() -> None:
    """Without variance SSIM is (2 m n + C1) / (m^2 + n^2 + C1) with C1 = 0.01^2 (Wang et al. 2004, eq. 6)."""
    a, b = np.full((16, 16, 3), 0.25), np.full((16, 16, 3), 0.75)
    assert ssim(a, b) == pytest.approx((2 * 0.25 * 0.75 + 1e-4) / (0.25**2 + 0.75**2 + 1e-4), abs=1e-12)


def test_ssim_compares_variances_under_a_gaussian_window() -> None:
    """Against the definition, written out for the middle pixel, whose window is the whole 11 x 11 picture."""
    a, b = noise(11, 11, 1), noise(11, 11, 1, seed=1)
    line = np.exp(-(np.arange(-5, 6) ** 2) / (2 * 1.5**2))
    window = np.outer(line, line)[..., None] / line.sum() ** 2
    mean_a, mean_b = (window * a).sum(), (window * b).sum()
    var_a, var_b = (window * a**2).sum() - mean_a**2, (window * b**2).sum() - mean_b**2
    covariance = (window * a * b).sum() - mean_a * mean_b
    expected = (2 * mean_a * mean_b + 1e-4) * (2 * covariance + 9e-4)
    expected /= (mean_a**2 + mean_b**2 + 1e-4) * (var_a + var_b + 9e-4)
    assert ssim(a, b) == pytest.approx(expected, abs=1e-9)


def test_ssim_falls_with_the_noise() -> None:
    clean = np.full((32, 32, 3), 0.5)
    little, much = clean + 0.02 * (noise(32, 32, 3) - 0.5), clean + 0.5 * (noise(32, 32, 3) - 0.5)
    assert ssim(clean, much) < ssim(clean, little) < 1


@pytest.mark.parametrize("metric", [psnr, ssim])
def test_different_shapes_are_refused_with_both(metric) -> None:
    with pytest.raises(ValueError, match=r"\(16, 16, 3\) and \(16, 12, 3\)"):
        metric(noise(16, 16, 3), noise(16, 12, 3))


@pytest.mark.parametrize(
    ("pixels", "said"),
    [
        (np.full((12, 12, 3), 1.5), "from 1.5 to 1.5"),
        (np.full((12, 12, 3), -0.1), "lie in"),
        (np.full((12, 12, 3), np.nan), "lie in"),
        (np.full((12, 12, 3), 7, np.int64), "dtype int64"),
        (np.zeros((0, 12, 3)), "no pixels"),
    ],
)
def test_values_that_are_no_picture_are_refused(pixels: np.ndarray, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        psnr(pixels, pixels)


def test_ssim_refuses_a_picture_smaller_than_its_window() -> None:
    with pytest.raises(ValueError, match="11 or more"):
        ssim(noise(10, 32, 3), noise(10, 32, 3))
