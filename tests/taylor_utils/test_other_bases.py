"""Reuse, HiCache's Hermite polynomials, Newton's differences and learned weights, against exact values."""

import itertools
import math
import random
from fractions import Fraction

import pytest
import torch

from taylor_utils import basis_names, basis_weights
from taylor_utils.bases.learned import expected_error, prior_weights

FIXED = [
    ("reuse", 0, {}),
    ("taylor", 1, {}),
    ("taylor", 2, {}),
    ("hermite", 1, {"sigma": 0.5}),
    ("hermite", 2, {"sigma": 0.5}),
    ("newton", 2, {}),
]


def gram_of(features: torch.Tensor) -> torch.Tensor:
    """Mean inner products [S,S] of features [P,S,N]."""
    return torch.einsum("psn,ptn->st", features, features) / len(features)


def random_gram(num_steps: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    drift = torch.randn(8, num_steps, 30, generator=generator, dtype=torch.float64).cumsum(1)
    return gram_of(drift + 5)


def test_every_basis_of_the_documentation_is_there() -> None:
    assert basis_names() == ["hermite", "learned", "newton", "reuse", "taylor"]


def test_reuse_is_the_newest_anchor() -> None:
    assert basis_weights("reuse", [0, 4, 8], 11, 2) == [0.0, 0.0, 1.0]


@pytest.mark.parametrize("sigma", [0.3, 0.5, 1.0])
def test_hermite_is_the_published_sum_over_the_differences(sigma: float) -> None:
    """Anchors 0, 4, 8 with features f: differences by the last gap, H1 = 2x, H2 = 4x^2 - 2, at x = sigma k."""
    features, k = [2.0, -1.0, 5.0], 3
    first = (features[2] - features[1]) / 4
    second = (first - (features[1] - features[0]) / 4) / 4
    x = sigma * k
    expected = features[2] + sigma * 2 * x * first + sigma**2 * (4 * x * x - 2) / 2 * second
    weights = basis_weights("hermite", [0, 4, 8], 8 + k, 2, sigma=sigma)
    assert sum(w * f for w, f in zip(weights, features, strict=True)) == pytest.approx(expected, abs=1e-12)


def test_hermite_of_order_3_follows_the_recurrence_of_the_polynomials() -> None:
    """H3(x) = 8 x^3 - 12 x; the third difference of anchors 0, 1, 2, 3 with features 0, 0, 0, 1 is 1."""
    sigma, k = 0.5, 2
    x = sigma * k
    polynomials = [1.0, 2 * x, 4 * x * x - 2, 8 * x**3 - 12 * x]
    expected = sum(sigma**i * polynomials[i] / math.factorial(i) for i in range(4))
    assert basis_weights("hermite", [0, 1, 2, 3], 3 + k, 3, sigma=sigma)[-1] == pytest.approx(expected, abs=1e-12)


def test_hermite_of_order_1_with_sigma_root_half_is_taylor() -> None:
    for anchors, step in ([0, 4], 6), ([0, 3, 5], 11):
        ours = basis_weights("hermite", anchors, step, 1, sigma=math.sqrt(0.5))
        assert ours == pytest.approx(basis_weights("taylor", anchors, step, 1), abs=1e-12)


def test_hermite_halves_the_slope_at_its_default() -> None:
    assert basis_weights("hermite", [0, 4], 6, 1) == pytest.approx([-0.25, 1.25])


@pytest.mark.parametrize("sigma", [0.25, 0.5])
def test_sigma_damps_order_i_of_taylor_by_its_power_2i(sigma: float) -> None:
    plain = basis_weights("taylor", [0, 4], 6, 1)
    damped = basis_weights("taylor", [0, 4], 6, 1, sigma=sigma)
    assert damped[0] == pytest.approx(sigma**2 * plain[0])
    assert sum(damped) == pytest.approx(1)


@pytest.mark.parametrize(
    ("anchors", "step", "expected"), [([0, 4, 8], 10, "3/8 -5/4 15/8"), ([1, 2, 8], 11, "27/7 -5 15/7")]
)
def test_newton_has_the_golden_weights(anchors: list[int], step: int, expected: str) -> None:
    weights = basis_weights("newton", anchors, step, 2)
    assert weights == pytest.approx([float(Fraction(text)) for text in expected.split()], rel=1e-14)


@pytest.mark.parametrize("order", [0, 1, 2, 3, 4])
def test_newton_reproduces_polynomials_of_its_order_at_any_gaps(order: int) -> None:
    rng = random.Random(order)
    for _ in range(50):
        anchors = list(itertools.accumulate(rng.randint(1, 6) for _ in range(order + 1)))
        step = anchors[-1] + (rng.randint(1, anchors[-1] - anchors[0]) if order else 1)
        coefficients = [rng.uniform(-1, 1) for _ in range(order + 1)]
        values = [sum(c * (t / 30) ** i for i, c in enumerate(coefficients)) for t in [*anchors, step]]
        weights = basis_weights("newton", anchors, step, order)
        forecast = sum(w * v for w, v in zip(weights, values, strict=False))
        tolerance = 1e-7 * (1 + sum(abs(w * v) for w, v in zip(weights, values, strict=False)))
        assert abs(forecast - values[-1]) < tolerance, (anchors, step)


def test_newton_lowers_its_order_beyond_its_own_span() -> None:
    assert basis_weights("newton", [0, 4, 8], 16, 2)[0] == pytest.approx(3.0), "at twice the span it is kept"
    assert basis_weights("newton", [0, 4, 8], 17, 2) == [0.0, -2.25, 3.25]
    assert basis_weights("newton", [0, 4], 9, 1) == [0.0, 1.0]


@pytest.mark.parametrize("abscissa", ["sigma", "log_snr"])
def test_newton_in_noise_is_exact_for_what_is_linear_there(abscissa: str) -> None:
    sigmas = [1 - 0.02 * i - 0.0001 * i * i for i in range(40)]
    position = {"sigma": lambda s: s, "log_snr": lambda s: math.log((1 - min(s, 0.999)) / min(s, 0.999))}[abscissa]
    values = [3 - 2 * position(sigma) for sigma in sigmas]
    weights = basis_weights("newton", [3, 10, 20], 25, 1, abscissa=abscissa, sigmas=sigmas)
    assert weights[0] == 0
    assert weights[1] * values[10] + weights[2] * values[20] == pytest.approx(values[25], rel=1e-9)


def test_newton_takes_anchors_whose_held_log_snr_coincides_as_one() -> None:
    sigmas = [1.0, 0.9995, 0.9, 0.8, 0.7]
    weights = basis_weights("newton", [0, 1, 2], 3, 2, abscissa="log_snr", sigmas=sigmas)
    assert weights[0] == 0 and sum(weights) == pytest.approx(1)


def test_newton_refuses_an_abscissa_it_does_not_know_or_has_no_levels_for() -> None:
    with pytest.raises(ValueError, match="abscissa must be one of step, sigma, log_snr, got 'time'"):
        basis_weights("newton", [0, 4], 6, 1, abscissa="time")
    with pytest.raises(ValueError, match="abscissa sigma needs the noise level of step 6, got only 0 levels"):
        basis_weights("newton", [0, 4], 6, 1, abscissa="sigma")


def test_learned_weights_are_the_closed_form_on_a_matrix_worked_by_hand() -> None:
    """Anchors 0 and 1 with G_AA = [[2, 1], [1, 2]], G_As = (1, 2): at ridge 0 the solution is (0, 1).

    At ridge 1/2 the pull is 1/2 of the mean diagonal 2, so (G_AA + I) w = G_As + w0 with w0 = (0, 1), reuse:
    [[3, 1], [1, 3]] w = (1, 3), w = (0, 1); towards Taylor (-1, 2): [[3, 1], [1, 3]] w = (0, 4), w = (-1/2, 3/2).
    """
    gram = torch.tensor([[2.0, 1.0, 1.0], [1.0, 2.0, 2.0], [1.0, 2.0, 3.0]], dtype=torch.float64)
    settings = {"gram": gram, "max_order": 1}
    assert basis_weights("learned", [0, 1], 2, ridge=0.0, **settings) == pytest.approx([0, 1], abs=1e-9)
    assert basis_weights("learned", [0, 1], 2, ridge=0.5, **settings) == pytest.approx([0, 1], abs=1e-9)
    towards_taylor = basis_weights("learned", [0, 1], 2, ridge=0.5, prior="taylor", **settings)
    assert towards_taylor == pytest.approx([-0.5, 1.5], abs=1e-9)
    assert expected_error(gram, [0, 1], [0, 1], 2) == pytest.approx(1.0)
    assert expected_error(gram, [0, 1], [-0.5, 1.5], 2) == pytest.approx(2 * 0.25 + 2 * 2.25 - 1.5 + 3 - 2 * 2.5)


@pytest.mark.parametrize("seed", range(5))
def test_learned_weights_expect_no_more_error_than_any_fixed_basis_on_the_same_anchors(seed: int) -> None:
    gram, anchors = random_gram(20, seed), [2, 5, 11]
    for step in (12, 15, 19):
        learned = basis_weights("learned", anchors, step, 2, gram=gram, ridge=0.0)
        least = expected_error(gram, anchors, learned, step)
        for name, order, settings in FIXED:
            fixed = basis_weights(name, anchors, step, order, **settings)
            assert least <= expected_error(gram, anchors, fixed, step) * (1 + 1e-9), (name, order)


@pytest.mark.parametrize("prior", ["reuse", "taylor"])
@pytest.mark.parametrize("ridge", [1e-4, 1e-2, 0.3, 100.0])
def test_at_any_ridge_learned_weights_expect_no_more_error_than_their_prior(prior: str, ridge: float) -> None:
    gram, anchors = random_gram(20, 7), [2, 5, 11]
    for step in (12, 15, 19):
        learned = basis_weights("learned", anchors, step, 2, gram=gram, prior=prior, ridge=ridge)
        of_prior = expected_error(gram, anchors, prior_weights(prior, anchors, step), step)
        assert expected_error(gram, anchors, learned, step) <= of_prior * (1 + 1e-9)


def test_a_strong_ridge_is_the_prior_itself() -> None:
    weights = basis_weights("learned", [2, 5, 11], 14, 2, gram=random_gram(20, 1), prior="taylor", ridge=1e6)
    assert weights == pytest.approx(basis_weights("taylor", [2, 5, 11], 14, 1), abs=1e-3)


def test_learned_weights_of_parallel_anchors_are_finite() -> None:
    gram = torch.ones(10, 10, dtype=torch.float64)
    weights = basis_weights("learned", [0, 4, 8], 9, 2, gram=gram, ridge=0.0)
    assert sum(weights) == pytest.approx(1, abs=1e-4)


def test_learned_weights_without_a_matrix_are_refused() -> None:
    with pytest.raises(ValueError, match=r"needs a calibration of more than 6 steps: run calibrate\.py"):
        basis_weights("learned", [0, 4], 6, 1)
    with pytest.raises(ValueError, match="needs a calibration of more than 6 steps"):
        basis_weights("learned", [0, 4], 6, 1, gram=random_gram(6, 0))
    with pytest.raises(ValueError, match="prior must be one of reuse, taylor, got 'newton'"):
        basis_weights("learned", [0, 4], 6, 1, gram=random_gram(10, 0), prior="newton")
