"""Forecasts on a sampler that adds noise at every step, with the bundled model."""

from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage

from cache_functions import CacheConfig, planned_full_steps
from hi_diffusers import SamplingOptions, load_pipeline
from hi_diffusers.generation import denoise_batch, encode_prompts
from hi_diffusers.pipelines.hidream_image import HiDreamImagePipeline
from training.evaluate import held_out_prompts
from training.scenes import CPU_TIER

NUM_PICTURES = 32


@pytest.fixture(scope="module")
def fast(nano_folder: Path) -> HiDreamImagePipeline:
    return load_pipeline("nano-fast", device="cpu")


def energies(pipe: HiDreamImagePipeline, cache: CacheConfig) -> np.ndarray:
    """Mean squared Laplacian of every picture; noise left in a picture shows there."""
    prompts = held_out_prompts(CPU_TIER, NUM_PICTURES)
    options = [SamplingOptions(prompt, seed=seed).resolve(pipe.preset) for seed, prompt in enumerate(prompts)]
    latents = denoise_batch(pipe, options, cache, encode_prompts(pipe, options))
    pictures = pipe.decode(latents)
    return np.array([np.mean(ndimage.laplace(picture.mean(-1)) ** 2) for picture in pictures])


@pytest.fixture(scope="module")
def uncached(fast: HiDreamImagePipeline) -> np.ndarray:
    return energies(fast, CacheConfig.off())


def test_forecast_x0_leaves_no_noise_in_the_picture(fast: HiDreamImagePipeline, uncached: np.ndarray) -> None:
    cache = CacheConfig(target="x0", fresh_threshold=3)
    assert len(planned_full_steps(cache, 16)) == 6
    ratio = np.median(energies(fast, cache)) / np.median(uncached)
    assert 0.75 < ratio < 1.33


def test_a_forecast_velocity_would_leave_the_noise_drawn_since(
    fast: HiDreamImagePipeline, uncached: np.ndarray
) -> None:
    """Why `resolve` refuses it: the velocity of the last full step holds that step's noise, and not this one's."""
    forced = CacheConfig(target="velocity", fresh_threshold=3)
    with pytest.raises(ValueError, match="target must be x0"):
        forced.resolve(fast.preset, SamplingOptions("a").resolve(fast.preset))
    assert np.median(energies(fast, forced)) > 5 * np.median(uncached)
