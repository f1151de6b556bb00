"""The checker reads what was drawn, says so claim by claim, and says it of nothing else."""

import functools
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage

from training.checker import (
    Accuracy,
    Checker,
    Claims,
    FoundObject,
    Rate,
    Reading,
    accuracy,
    chance_level,
    judge,
)
from training.render import render
from training.scenes import CPU_TIER, GPU_TIER, TIERS, Scene, SceneObject, Tier, caption, parse_caption, sample_scene

ROOT = Path(__file__).parents[2]
PROMPT = "a small red circle left of a large blue star on a yellow background"


@dataclass(frozen=True)
class Pictures:
    """Pictures, uint8 [H, W, 3], the prompts they were drawn for, and what the checker read of them."""

    pictures: list[np.ndarray]
    prompts: list[str]
    readings: list[Reading]

    def rates(self) -> Accuracy:
        return accuracy(judge(reading, prompt) for reading, prompt in zip(self.readings, self.prompts, strict=True))


@functools.cache
def checker_of(name: str) -> Checker:
    return Checker(TIERS[name], num_prototypes=50 if name == "cpu" else 24)


@functools.cache
def drawn(name: str, number: int) -> Pictures:
    rng, tier = np.random.default_rng(0), TIERS[name]
    scenes = [sample_scene(rng, tier) for _ in range(number)]
    pictures = [render(scene, rng, tier.image_size) for scene in scenes]
    prompts = [caption(scene, rng) for scene in scenes]
    return Pictures(pictures, prompts, [checker_of(name).read(picture) for picture in pictures])


def degraded(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Blurred and noisy, at about 30 dB, as a small autoencoder reconstructs it."""
    blur = 0.0125 * len(picture)
    noisy = ndimage.gaussian_filter(picture.astype(float), (blur, blur, 0)) + rng.normal(0, 5, picture.shape)
    return noisy.clip(0, 255).astype(np.uint8)


def assert_every_claim(rates: Accuracy, least: float) -> None:
    for claim in fields(rates):
        if claim.name != "all":
            assert getattr(rates, claim.name).share >= least, f"{claim.name}: {rates}"


def test_every_claim_is_read_from_clean_pictures() -> None:
    assert_every_claim(drawn("cpu", 320).rates(), 0.99)


def test_every_claim_is_read_from_clean_pictures_of_the_larger_world() -> None:
    assert_every_claim(drawn("gpu", 100).rates(), 0.97)


def test_every_claim_is_read_from_blurred_and_noisy_pictures() -> None:
    rng, clean = np.random.default_rng(1), drawn("cpu", 320)
    pictures = [degraded(picture, rng) for picture in clean.pictures]
    error = np.mean([np.square(a.astype(float) - b).mean() for a, b in zip(pictures, clean.pictures, strict=True)])
    assert 29 < 10 * np.log10(255**2 / error) < 31
    results = [checker_of("cpu").check(*pair) for pair in zip(pictures, clean.prompts, strict=True)]
    assert_every_claim(accuracy(results), 0.85)


@pytest.mark.slow
def test_every_claim_is_read_from_what_the_autoencoder_reconstructs() -> None:
    folders = [ROOT / "assets" / "hidream-nano" / "vae", ROOT / "training" / "runs" / "vae"]
    folder = next((one for one in folders if (one / "diffusion_pytorch_model.safetensors").exists()), None)
    if folder is None:
        pytest.skip("no trained autoencoder in assets/hidream-nano/vae or training/runs/vae")
    import torch  # here, so that the fast tests do not wait for it
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(folder, torch_dtype=torch.float32).eval()
    name = "cpu" if vae.config.sample_size == CPU_TIER.image_size else "gpu"
    clean, results = drawn(name, 320), []
    for picture, prompt in zip(clean.pictures, clean.prompts, strict=True):
        pixels = torch.from_numpy(picture.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
        with torch.no_grad():
            decoded = vae.decode(vae.encode(pixels).latent_dist.mode()).sample
        results.append(checker_of(name).check((decoded[0].permute(1, 2, 0) / 2 + 0.5).clamp(0, 1).numpy(), prompt))
    assert_every_claim(accuracy(results), 0.85 if name == "cpu" else 0.97)


@pytest.mark.parametrize(("name", "number"), [("cpu", 320), ("gpu", 100)])
def test_other_pictures_prompts_hold_by_chance_only(name: str, number: int) -> None:
    """Chance is what a perfect reader scores: the same comparison between scenes, with no picture in between."""
    read = drawn(name, number)
    rates, perfect = chance_level(read.readings, read.prompts), chance_level([*map(told, read.prompts)], read.prompts)
    assert rates.background.share == pytest.approx(0.1, abs=0.03)
    for claim in ("background", "count", "colour", "shape", "all"):
        assert getattr(rates, claim).share == pytest.approx(getattr(perfect, claim).share, abs=0.02), claim
    assert rates.colour.share < 0.1 and rates.shape.share < 0.1 and rates.all.share < 0.01
    # a random pair of directions agrees in one case of four, and only half of the pictures have two objects at all
    assert rates.position.share < 0.3
    assert rates.background.stated == 8 * number


def told(prompt: str) -> Reading:
    """What a perfect reader finds in a picture of this prompt, up to places and sizes that the prompt leaves open."""
    scene = parse_caption(prompt)
    places = [(0.0, 0.0)]
    for relation in scene.relations:
        dx, dy = {"left of": (1, 0), "right of": (-1, 0), "above": (0, 1), "below": (0, -1)}[relation]
        places.append((places[-1][0] + dx, places[-1][1] + dy))
    places += [(0.0, 0.0)] * (len(scene.objects) - len(places))
    found = zip(scene.objects, places, strict=True)
    return Reading(
        scene.background_colour,
        tuple(FoundObject(item.shape, item.colour, item.size or "small", place, 0.02) for item, place in found),
    )


def test_a_picture_never_meets_its_own_prompt_by_chance() -> None:
    readings = [told(PROMPT), told("a green tree on a white background")]
    assert chance_level(readings, [PROMPT, "a green tree on a white background"], num_shifts=1).background.held == 0
    with pytest.raises(ValueError, match="num_shifts is 2"):
        chance_level(readings, [PROMPT, PROMPT], num_shifts=2)


@pytest.mark.parametrize(
    ("wrong", "claims"),
    [
        ("a small red circle left of a large blue star on a white background", {"background"}),
        ("a small red circle on a yellow background", {"count"}),
        ("a small red circle left of a large green star on a yellow background", {"colour"}),
        ("a small red circle left of a large blue cross on a yellow background", {"shape"}),
        ("a large red circle left of a large blue star on a yellow background", {"size"}),
        ("a small red circle right of a large blue star on a yellow background", {"position"}),
        ("a small red circle above a large blue star on a yellow background", {"position"}),
        ("a small green house on a yellow background", {"count", "colour", "shape"}),
    ],
)
def test_a_wrong_word_fails_its_own_claim_alone(wrong: str, claims: set[str]) -> None:
    picture = render(parse_caption(PROMPT), np.random.default_rng(3), 64)
    assert checker_of("cpu").check(picture, PROMPT) == Claims(True, True, True, True, True, True)
    verdict = checker_of("cpu").check(picture, wrong)
    assert {claim.name for claim in fields(verdict) if getattr(verdict, claim.name) is False} == claims
    assert not verdict.all


def test_a_claim_the_prompt_does_not_make_is_none() -> None:
    picture = render(parse_caption(PROMPT), np.random.default_rng(3), 64)
    verdict = checker_of("cpu").check(picture, "a blue star and a red circle on a yellow background")
    assert verdict == Claims(True, True, True, True, None, None) and verdict.all


def test_a_missing_object_fails_what_is_said_of_it() -> None:
    alone = Scene((SceneObject("star", "blue", "large"),), (), "yellow", "plain")
    picture = render(alone, np.random.default_rng(3), 64)
    assert checker_of("cpu").check(picture, PROMPT) == Claims(True, False, False, False, False, False)


def test_an_empty_picture_shows_its_background_alone() -> None:
    reading = checker_of("cpu").read(np.full((64, 64, 3), (30, 60, 200), np.uint8))
    assert reading == Reading("blue", ())
    assert judge(reading, PROMPT) == Claims(False, False, False, False, False, False)


def test_a_blob_that_is_like_nothing_drawn_has_no_shape() -> None:
    """A forced choice among the known shapes would credit one smudge in ten with the shape that was asked for."""
    picture = np.full((64, 64, 3), (240, 238, 240), np.uint8)
    picture[20:44, 10:14] = picture[20:44, 50:54] = picture[30:33, 10:54] = (200, 30, 30)
    (blob,) = checker_of("cpu").read(picture).objects
    assert blob.shape is None and blob.colour == "red"


def test_equal_colours_are_told_apart_by_shape_and_place() -> None:
    scene = Scene((SceneObject("ring", "red", "small"), SceneObject("square", "red", "large")), ("below",), "cyan")
    picture = render(scene, np.random.default_rng(5), 64)
    assert checker_of("cpu").check(picture, caption(scene)).all
    swapped = replace(scene, objects=scene.objects[::-1])
    assert checker_of("cpu").check(picture, caption(swapped)) == Claims(True, True, True, True, True, False)


def test_floats_are_read_as_bytes_are() -> None:
    picture = render(parse_caption(PROMPT), np.random.default_rng(3), 64)
    assert checker_of("cpu").read(picture / 255) == checker_of("cpu").read(picture)


@pytest.mark.parametrize(
    ("picture", "reason"),
    [
        (np.zeros((64, 64), np.uint8), r"shape \(64, 64\)"),
        (np.zeros((64, 32, 3), np.uint8), r"shape \(64, 32, 3\)"),
        (np.zeros((64, 64, 3), np.int64), "dtype int64"),
        (np.full((64, 64, 3), -0.5), "ranges from -0.5"),
        (np.full((64, 64, 3), np.nan), "ranges from nan"),
    ],
)
def test_what_is_no_picture_is_refused(picture: np.ndarray, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        checker_of("cpu").read(picture)


@pytest.mark.parametrize("tier", [CPU_TIER, GPU_TIER], ids=["cpu", "gpu"])
def test_every_shape_is_read_alone(tier: Tier) -> None:
    rng = np.random.default_rng(6)
    for shape in tier.shapes + tier.pictograms:
        scene = Scene((SceneObject(shape, "blue", "large"),), (), "white", "plain")
        (found,) = checker_of(tier.name).read(render(scene, rng, tier.image_size)).objects
        assert (found.shape, found.colour, found.size) == (shape, "blue", "large")


def test_accuracy_counts_only_claims_that_are_made() -> None:
    rates = accuracy([Claims(True, True, True, False, None, None), Claims(True, False, True, True, True, None)])
    assert rates.background == rates.colour == Rate(2, 2) and rates.count == rates.shape == Rate(1, 2)
    assert rates.size == Rate(1, 1) and rates.position == Rate(0, 0) and rates.all == Rate(0, 2)
    assert np.isnan(rates.position.share) and str(rates.count) == "50.0 % (1/2)"
