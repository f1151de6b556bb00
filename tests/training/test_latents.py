"""What the transformer is trained on: latents as the pipeline would decode them, captions of the same scene."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL

from training import latents, scenes
from training.latents import LatentPool, PromptReader
from training.pool import picture_pool
from training.vae import as_tensor

SIZE = 6


@pytest.fixture(scope="module")
def text(tiny_folder: Path) -> PromptReader:
    return PromptReader.load(tiny_folder, "cpu")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def pool(tiny_folder: Path, runs: Path) -> LatentPool:
    return LatentPool.build(scenes.CPU_TIER, tiny_folder / "vae", SIZE, 0, runs, "cpu")


def test_latents_are_normalised_with_the_shift_and_scale_of_the_vae(
    pool: LatentPool, tiny_folder: Path, runs: Path
) -> None:
    """Decoding divides by the scale and adds the shift: the other way round, every colour would be off."""
    vae = AutoencoderKL.from_pretrained(tiny_folder / "vae", torch_dtype=torch.float32).eval()
    pictures = picture_pool(scenes.CPU_TIER, SIZE, 0, runs)
    with torch.no_grad():
        mean = vae.encode(as_tensor(pictures)).latent_dist.mean
    found = pool.latents(np.arange(SIZE))
    assert len(pool) == SIZE and found.shape == (SIZE, 4, 16, 16) and found.dtype == torch.float32
    restored = found / vae.config.scaling_factor + vae.config.shift_factor
    # Encoded in bf16, kept in fp16.
    assert (restored - mean).norm() < 0.02 * mean.norm()
    assert (found - mean).norm() > 0.2 * mean.norm(), "shift and scale of the tiny VAE are too weak for this test"


def test_latents_that_are_there_are_not_encoded_again(
    pool: LatentPool, tiny_folder: Path, runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(latents, "encode_pictures", None)
    again = LatentPool.build(scenes.CPU_TIER, tiny_folder / "vae", SIZE, 0, runs, "cpu")
    assert np.array_equal(again.values, pool.values)
    assert not list(runs.glob("*.partial"))


@pytest.mark.parametrize("tier", scenes.TIERS.values(), ids=scenes.TIERS)
@pytest.mark.parametrize("length", [24, 32])
def test_a_caption_says_what_its_picture_shows(tier: scenes.Tier, length: int, text: PromptReader) -> None:
    pool, rng = LatentPool(tier, 7, np.empty(0)), np.random.default_rng(0)
    for index in range(60):
        shown = scenes.sample_scene(np.random.default_rng((7, 0, index)), tier)
        assert scenes.agrees(scenes.parse_caption(pool.caption(index, rng, text, length)), shown)


@pytest.mark.parametrize("tier", scenes.TIERS.values(), ids=scenes.TIERS)
def test_a_caption_is_never_cut_off(tier: scenes.Tier, text: PromptReader) -> None:
    """Three objects with all their attributes take more than the 24 tokens; such a scene gets a shorter phrasing."""
    pool, rng = LatentPool(tier, 7, np.empty(0)), np.random.default_rng(0)
    for index in range(300):
        caption = pool.caption(index, rng, text, 24)
        assert text.fits(caption, 24), caption
    assert not text.fits("a " * 24, 24)


def test_phrasings_of_one_picture_differ(text: PromptReader) -> None:
    pool, rng = LatentPool(scenes.CPU_TIER, 7, np.empty(0)), np.random.default_rng(0)
    assert len({pool.caption(0, rng, text, 32) for _ in range(20)}) > 5


def test_captions_are_encoded_as_the_pipeline_does_it(text: PromptReader, tiny_pipe: object) -> None:
    captions = ["a small red circle on a blue background", ""]
    t5, llama, pooled = text.encode(captions, 24)
    assert t5.shape == (2, 24, text.caption_channels[0])
    assert llama.shape == (text.num_llama_layers, 2, 24, text.caption_channels[1])
    assert pooled.shape == (2, text.text_emb_dim)
    theirs = tiny_pipe.encode(captions, 24)
    for ours, expected in ((t5, theirs.t5), (llama, theirs.llama), (pooled, theirs.pooled)):
        torch.testing.assert_close(ours, expected)
