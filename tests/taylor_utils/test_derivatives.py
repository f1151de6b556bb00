"""The paper's recursion on numbers that can be checked by hand, and on tensors."""

from fractions import Fraction

import pytest
import torch

from taylor_utils import derivative_approximation, taylor_formula


def test_the_first_full_step_has_the_feature_alone() -> None:
    assert derivative_approximation([], 5.0, 1, 3) == [5.0]


def test_the_second_full_step_adds_the_slope() -> None:
    assert derivative_approximation([5.0], 13.0, 4, 3) == [13.0, 2.0]


def test_the_last_gap_divides_the_differences_of_every_order() -> None:
    factors: list[Fraction] = []
    for feature, gap in ((0, 1), (3, 1), (7, 2), (1, 6)):
        factors = derivative_approximation(factors, Fraction(feature), gap, 3)
    # Before the last step: 7, (7-3)/2 = 2, (2-3)/2 = -1/2. Then each difference is divided by 6.
    assert factors == [1, Fraction(-1), Fraction(-1, 2), Fraction(0)]


def test_an_order_is_added_at_every_full_step_up_to_the_highest() -> None:
    factors: list[float] = []
    lengths = []
    for feature in (1.0, 2.0, 4.0, 8.0, 16.0):
        factors = derivative_approximation(factors, feature, 1, 2)
        lengths.append(len(factors))
    assert lengths == [1, 2, 3, 3, 3]


def test_order_0_keeps_the_feature_alone() -> None:
    assert derivative_approximation([5.0], 13.0, 4, 0) == [13.0]


def test_the_formula_is_the_sum_of_powers_over_factorials() -> None:
    assert taylor_formula([1.0, 2.0, 3.0, 6.0], 2) == 1 + 2 * 2 + 3 * 2**2 / 2 + 6 * 2**3 / 6


def test_at_distance_0_the_formula_is_the_feature() -> None:
    assert taylor_formula([7.0, 2.0, 3.0], 0) == 7


def test_tensors_are_forecast_as_numbers_are() -> None:
    torch.manual_seed(0)
    features = torch.randn(4, 5, dtype=torch.float64)
    factors: list[torch.Tensor] = []
    for feature in features:
        factors = derivative_approximation(factors, feature, 3, 2)
    forecast = taylor_formula(factors, 2)
    for column in range(5):
        numbers: list[float] = []
        for feature in features[:, column].tolist():
            numbers = derivative_approximation(numbers, feature, 3, 2)
        assert forecast[column].item() == pytest.approx(taylor_formula(numbers, 2), abs=1e-12)


def test_neither_function_changes_its_arguments() -> None:
    factors = [torch.ones(3), torch.full((3,), 2.0)]
    feature = torch.full((3,), 5.0)
    forecast = taylor_formula(derivative_approximation(factors, feature, 2, 2), 3)
    forecast.add_(1)
    assert factors[0].tolist() == [1, 1, 1] and factors[1].tolist() == [2, 2, 2] and feature.tolist() == [5, 5, 5]


@pytest.mark.parametrize("gap", [0, -4])
def test_a_gap_below_one_step_is_refused(gap: int) -> None:
    with pytest.raises(ValueError, match=f"gap must be at least 1 step, got {gap}"):
        derivative_approximation([1.0], 2.0, gap, 1)


def test_a_negative_order_is_refused() -> None:
    with pytest.raises(ValueError, match="max_order must be at least 0, got -1"):
        derivative_approximation([1.0], 2.0, 1, -1)


def test_a_forecast_without_factors_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one factor"):
        taylor_formula([], 1)
