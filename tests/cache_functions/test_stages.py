"""The fit of one stage of a solver, against direct solutions."""

import numpy as np
import pytest
import torch
from torch import Tensor

from cache_functions.stages import FLOOR, Moments, fit_stage

SIZE = 400


def runs(count: int, num_features: int, noise: float, seed: int = 0) -> tuple[list[list[Tensor]], list[Tensor], Tensor]:
    """Features of several runs, targets that one row of coefficients makes of them up to noise, and that row."""
    generator = torch.Generator().manual_seed(seed)
    row = torch.randn(num_features, generator=generator, dtype=torch.float64)
    features = [[torch.randn(SIZE, generator=generator) for _ in range(num_features)] for _ in range(count)]
    targets = [
        sum((weight * one.double() for weight, one in zip(row, run, strict=True)), torch.zeros(SIZE))
        + noise * torch.randn(SIZE, generator=generator)
        for run in features
    ]
    return features, targets, row


def moments(features: list[list[Tensor]], targets: list[Tensor], prior: Tensor) -> list[Moments]:
    return [Moments.of(run, target, prior) for run, target in zip(features, targets, strict=True)]


def test_what_is_linear_is_found_whatever_the_prior() -> None:
    features, targets, row = runs(5, 4, noise=0.0)
    for prior in (torch.zeros(4, dtype=torch.float64), torch.full((4,), 3.0, dtype=torch.float64)):
        found, errors = fit_stage(moments(features, targets, prior), prior, ridge=0.0)
        torch.testing.assert_close(found, row, rtol=1e-6, atol=1e-6)
        assert float(errors.max()) < 1e-10


def test_one_round_is_ridge_regression() -> None:
    """Solved directly: the features stacked over the runs, with a row per coefficient for the pull."""
    features, targets, _ = runs(5, 4, noise=0.3)
    prior, ridge = torch.arange(4, dtype=torch.float64), 0.2
    found, errors = fit_stage(moments(features, targets, prior), prior, ridge, rounds=1)
    stacked = np.concatenate([torch.stack(run).double().numpy().T for run in features])
    pull = np.diag(np.sqrt(ridge * (stacked**2).sum(0)))
    left = np.concatenate([stacked, pull])
    right = np.concatenate([torch.cat(targets).numpy(), pull @ prior.numpy()])
    np.testing.assert_allclose(found.numpy(), np.linalg.lstsq(left, right, rcond=None)[0], rtol=1e-6)
    for run, target, error in zip(features, targets, errors, strict=True):
        rest = target - found @ torch.stack(run).double()
        assert float(error) == pytest.approx(float((rest**2).mean()), rel=1e-6)


def test_two_rounds_weigh_each_run_by_one_over_its_error() -> None:
    features, targets, _ = runs(6, 3, noise=0.2)
    targets[2] = targets[2] + torch.randn(SIZE)
    prior = torch.zeros(3, dtype=torch.float64)
    given = moments(features, targets, prior)
    _, errors = fit_stage(given, prior, ridge=0.0, rounds=1)
    found, _ = fit_stage(given, prior, ridge=0.0, rounds=2)
    weights = np.sqrt((1 / (errors + FLOOR * errors.median())).numpy())
    left = np.concatenate([w * torch.stack(run).double().numpy().T for w, run in zip(weights, features, strict=True)])
    right = np.concatenate([w * target.numpy() for w, target in zip(weights, targets, strict=True)])
    np.testing.assert_allclose(found.numpy(), np.linalg.lstsq(left, right, rcond=None)[0], rtol=1e-6)


def test_a_run_that_has_gone_another_way_does_not_rule_the_others() -> None:
    """Among 16 runs one ends somewhere else; plain least squares would spoil the others by far more than 1 dB."""
    features, targets, _ = runs(16, 5, noise=0.01)
    prior = torch.zeros(5, dtype=torch.float64)

    def decibels(rounds: int) -> Tensor:
        _, errors = fit_stage(moments(features, targets, prior), prior, ridge=1e-3, rounds=rounds)
        return -10 * errors[1:].log10()

    before = decibels(rounds=4)
    targets[0] = 5 * features[0][0].double() - 7 * features[0][3].double()
    assert float((before - decibels(rounds=4)).max()) < 1
    assert float((before - decibels(rounds=1)).min()) > 10


def test_features_that_are_one_another_can_be_fitted() -> None:
    """Where the network's outputs are parallel, no row is the only one: any that fits will do."""
    generator = torch.Generator().manual_seed(0)
    latent, output = torch.randn(2, SIZE, generator=generator)
    target = 0.5 * latent + 0.25 * output
    prior = torch.zeros(4, dtype=torch.float64)
    features = [latent, output, output, torch.zeros(SIZE)]
    found, errors = fit_stage(moments([features], [target], prior), prior, ridge=0.0)
    assert bool(found.isfinite().all()) and float(errors) < 1e-10
