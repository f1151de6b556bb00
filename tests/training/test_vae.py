"""Training of the VAE: it can be killed at any step, and the pipeline can use what it writes."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.training.tiny_runs import VAE_RECIPE, VAE_TIER, assert_same_state, fake_pictures, read_checkpoint
from training.checkpoint import load_checkpoint, save_checkpoint
from training.vae import (
    RECIPES,
    Trainer,
    as_tensor,
    checkpoint_path,
    main,
    train,
    training_batch,
)


@pytest.mark.parametrize("encoder_steps", [1, 2, 3])
def test_an_interrupted_run_ends_with_the_bits_of_an_uninterrupted_one(tmp_path: Path, encoder_steps: int) -> None:
    """Whether the encoder is frozen before the interruption, right after it, or later."""
    recipe, pictures = replace(VAE_RECIPE, encoder_steps=encoder_steps), fake_pictures()
    whole, cut = tmp_path / "whole" / "vae", tmp_path / "cut" / "vae"
    for folder in (whole, cut):
        folder.parent.mkdir()
    train(Trainer(VAE_TIER, recipe, "cpu", 0), whole, pictures, pictures[:4], 60)

    interrupted = Trainer(VAE_TIER, recipe, "cpu", 0)
    for _ in range(2):
        interrupted.train_step(pictures)
    save_checkpoint(checkpoint_path(cut), recipe, interrupted.state())
    resumed = Trainer(VAE_TIER, recipe, "cpu", 0)
    torch.manual_seed(99)
    resumed.restore(load_checkpoint(checkpoint_path(cut), recipe))
    train(resumed, cut, pictures, pictures[:4], 60)
    assert_same_state(read_checkpoint(checkpoint_path(cut)), read_checkpoint(checkpoint_path(whole)))


def test_the_encoder_stands_still_once_it_is_frozen_and_the_decoder_does_not() -> None:
    trainer, pictures = Trainer(VAE_TIER, VAE_RECIPE, "cpu", 0), fake_pictures()
    states = []
    for _ in range(4):
        trainer.train_step(pictures)
        states.append({name: value.clone() for name, value in trainer.average.state_dict().items()})
    encoder, decoder = "encoder.conv_in.weight", "decoder.conv_in.weight"
    assert not torch.equal(states[0][encoder], states[1][encoder])
    assert torch.equal(states[1][encoder], states[3][encoder])
    assert not torch.equal(states[1][decoder], states[3][decoder])


def test_the_exported_vae_holds_the_average_and_normalises_latents(tmp_path: Path) -> None:
    trainer, pictures = Trainer(VAE_TIER, VAE_RECIPE, "cpu", 0), fake_pictures()
    trainer.train_step(pictures)
    vae = trainer.export(tmp_path / "vae", pictures)
    for name, value in vae.state_dict().items():
        assert torch.equal(value, trainer.average.state_dict()[name].half().float()), name
    with torch.no_grad():
        mean = vae.encode(as_tensor(pictures)).latent_dist.mode()
    latents = (mean - vae.config.shift_factor) * vae.config.scaling_factor
    assert abs(latents.mean()) < 0.05 and abs(latents.std() - 1) < 0.05
    assert [path.name for path in tmp_path.iterdir()] == ["vae"]


def test_a_batch_depends_on_seed_and_step_alone() -> None:
    pictures = fake_pictures()
    first = training_batch(pictures, 3, VAE_RECIPE, 0)
    assert first.shape == (2, 16, 16, 3)
    assert np.array_equal(first, training_batch(pictures, 3, VAE_RECIPE, 0))
    assert not np.array_equal(first, training_batch(pictures, 4, VAE_RECIPE, 0))
    assert not np.array_equal(first, training_batch(pictures, 3, VAE_RECIPE, 1))


def test_the_learning_rate_warms_up_and_falls_along_a_cosine() -> None:
    trainer = Trainer(VAE_TIER, replace(VAE_RECIPE, steps=1000, warmup_steps=10, learning_rate=1.0), "cpu", 0)
    rates = [trainer.learning_rate(step) for step in range(1001)]
    assert rates[0] == pytest.approx(0.1) and max(rates) == pytest.approx(1.0, abs=1e-3)
    assert rates[500] == pytest.approx(0.505) and rates[1000] == pytest.approx(0.01)
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_latents_have_the_side_that_the_widths_make() -> None:
    trainer = Trainer(VAE_TIER, VAE_RECIPE, "cpu", 0)
    with torch.no_grad():
        mean = trainer.vae.encode(as_tensor(fake_pictures(2))).latent_dist.mode()
    assert mean.shape == (2, VAE_RECIPE.latent_channels, 8, 8)


def test_bad_input_is_refused_in_one_line_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "runs" / "vae"
    for flags, reason in (
        (["--batch_size", "0"], "batch_size must be above 0, got 0"),
        (["--seed", "-1"], "seed must be at least 0"),
        (["--device", "abacus"], "abacus"),
    ):
        assert main(["--output", str(output), *flags]) == 2
        err = capsys.readouterr().err
        assert reason in err and err.count("\n") == 1
    assert not output.parent.exists()


def test_a_checkpoint_of_another_recipe_is_refused_before_pictures_are_drawn(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_checkpoint(tmp_path / "vae.checkpoint.pt", RECIPES["cpu"], {})
    assert main(["--output", str(tmp_path / "vae"), "--steps", "5"]) == 2
    assert "steps is 3000 there and 5 here" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["vae.checkpoint.pt"]


@pytest.mark.parametrize("setting", [{"steps": 0}, {"learning_rate": 0.0}, {"ema_decay": 1.0}])
def test_a_recipe_refuses_values_that_make_no_sense(setting: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(setting))):
        replace(VAE_RECIPE, **setting)
