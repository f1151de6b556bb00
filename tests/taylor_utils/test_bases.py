"""The weights of the anchors: golden values, the recursion they stand for, and what is refused."""

import random
import sys
from fractions import Fraction
from pathlib import Path

import pytest

import taylor_utils.bases
from taylor_utils import basis_names, basis_settings, basis_weights, derivative_approximation, taylor_formula

GOLDEN = [
    # anchors, order, step, first_enhance, weights
    ([0, 4], 1, 6, 1, "-1/2 3/2"),
    ([0, 4, 8], 2, 10, 1, "1/8 -3/4 13/8"),
    ([0, 4, 8], 2, 11, 1, "9/32 -21/16 65/32"),
    ([0, 1, 2, 8], 2, 11, 1, "0 3/4 -11/8 13/8"),
    ([0, 4, 8, 12], 3, 14, 1, "-1/48 3/16 -13/16 79/48"),
    ([0, 1, 2], 2, 5, 3, "0 -3 4"),
    ([0, 1, 2], 2, 5, 1, "9/2 -12 17/2"),
]


def as_fractions(weights: list[float]) -> list[Fraction]:
    """The simplest fractions that the floats are, to the last bits."""
    fractions = [Fraction(weight).limit_denominator(1000) for weight in weights]
    assert weights == pytest.approx([float(fraction) for fraction in fractions], rel=1e-14, abs=1e-15)
    return fractions


def forecast_by_recursion(
    anchors: list[int], features: list[float], step: int, max_order: int, first_enhance: int
) -> float:
    """TaylorSeer as published: factors are renewed at every full step, and differenced only past the gate."""
    factors: list[float] = []
    last = 0
    for anchor, feature in zip(anchors, features, strict=True):
        if factors and anchor > first_enhance - 2:
            factors = derivative_approximation(factors, feature, anchor - last, max_order)
        else:
            factors = [feature]
        last = anchor
    return taylor_formula(factors, step - last)


@pytest.mark.parametrize(("anchors", "order", "step", "first_enhance", "expected"), GOLDEN)
def test_the_weights_are_the_golden_ones(
    anchors: list[int], order: int, step: int, first_enhance: int, expected: str
) -> None:
    weights = basis_weights("taylor", anchors, step, order, first_enhance=first_enhance)
    assert as_fractions(weights) == [Fraction(text) for text in expected.split()]


def assert_equal_to_recursion(leading: list[int], max_order: int, first_enhance: int) -> None:
    """Random gaps after the leading full steps, random features: weights and recursion agree."""
    rng = random.Random(100 * max_order + first_enhance)
    for _ in range(50):
        anchors = list(leading)
        while len(anchors) < rng.randint(1, 8):
            anchors.append(anchors[-1] + rng.randint(1, 7))
        features = [rng.uniform(-1, 1) for _ in anchors]
        step = anchors[-1] + rng.randint(1, 7)
        recursion = forecast_by_recursion(anchors, features, step, max_order, first_enhance)
        for kept in (len(anchors), max_order + 1):  # all anchors, and as many as the cache keeps
            weights = basis_weights("taylor", anchors[-kept:], step, max_order, first_enhance=first_enhance)
            terms = [weight * feature for weight, feature in zip(weights, features[-kept:], strict=True)]
            assert sum(terms) == pytest.approx(recursion, abs=1e-12 * (1 + sum(map(abs, terms)))), (anchors, step)


@pytest.mark.parametrize("first_enhance", [1, 2, 3, 4])
@pytest.mark.parametrize("max_order", [0, 1, 2, 3, 4])
def test_the_weighted_sum_is_the_recursion_after_the_leading_full_steps(max_order: int, first_enhance: int) -> None:
    assert_equal_to_recursion(list(range(first_enhance)), max_order, first_enhance)


@pytest.mark.parametrize("first_enhance", [1, 2, 3, 4])
@pytest.mark.parametrize("max_order", [0, 1, 2, 3, 4])
def test_the_weighted_sum_is_the_recursion_where_leading_steps_were_skipped(max_order: int, first_enhance: int) -> None:
    """A schedule of one's own may skip leading steps. The first difference past the gate is still taken with the
    full step before it, however old that is."""
    assert_equal_to_recursion([0], max_order, first_enhance)


@pytest.mark.parametrize("max_order", [0, 1, 2, 3, 4])
def test_a_constant_feature_is_forecast_exactly(max_order: int) -> None:
    assert sum(basis_weights("taylor", [0, 3, 5, 11, 12], 17, max_order)) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("max_order", [1, 2, 3, 4])
def test_a_linear_feature_is_forecast_exactly_for_any_gaps(max_order: int) -> None:
    anchors = [0, 3, 5, 11, 12]
    weights = basis_weights("taylor", anchors, 17, max_order)
    assert sum(weight * anchor for weight, anchor in zip(weights, anchors, strict=True)) == pytest.approx(17, abs=1e-9)


def test_a_quadratic_feature_is_not_forecast_exactly_by_order_2() -> None:
    weights = basis_weights("taylor", [0, 4, 8], 10, 2)
    assert weights[1] * 4**2 + weights[2] * 8**2 == 92, "the published recursion gives 92 where the square is 100"


def test_order_0_reuses_the_newest_anchor() -> None:
    assert basis_weights("taylor", [0, 4, 8], 10, 0) == [0, 0, 1]


def test_the_order_is_lowered_where_anchors_are_few() -> None:
    assert basis_weights("taylor", [0], 3, 2) == [1]
    assert basis_weights("taylor", [0, 4], 6, 2) == basis_weights("taylor", [0, 4], 6, 1) == [-0.5, 1.5]


def test_anchors_older_than_the_order_needs_have_no_weight() -> None:
    assert basis_weights("taylor", [0, 4, 8], 10, 1) == [0, -0.5, 1.5]


def test_before_the_gate_the_newest_anchor_is_reused() -> None:
    assert basis_weights("taylor", [0, 1], 2, 1, first_enhance=9) == [0, 1]


def test_at_an_anchor_itself_the_anchor_is_returned() -> None:
    assert basis_weights("taylor", [0, 4, 8], 8, 2) == [0, 0, 1]


@pytest.mark.parametrize(
    ("name", "anchors", "step", "max_order", "message"),
    [
        ("fourier", [0], 1, 1, r"basis must be one of .*taylor.*, got 'fourier'"),
        ("taylor", [], 1, 1, r"anchors must be at least one step index, strictly increasing, got \[\]"),
        ("taylor", [0, 4, 4], 6, 1, r"strictly increasing, got \[0, 4, 4\]"),
        ("taylor", [4, 0], 6, 1, r"strictly increasing, got \[4, 0\]"),
        ("taylor", [0, 4], 3, 1, r"step must not lie before the newest anchor 4, got 3"),
        ("taylor", [0, 4], 6, -1, r"max_order must be at least 0, got -1"),
    ],
)
def test_arguments_out_of_their_domain_are_refused(
    name: str, anchors: list[int], step: int, max_order: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        basis_weights(name, anchors, step, max_order)


def test_the_settings_of_the_papers_basis_are_its_leading_full_steps() -> None:
    assert basis_settings("taylor") == ["first_enhance", "sigma"]


def test_settings_of_an_unknown_basis_are_refused() -> None:
    with pytest.raises(ValueError, match=r"basis must be one of .*taylor.*, got 'fourier'"):
        basis_settings("fourier")


def test_a_file_in_the_folder_is_a_basis(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = "def weights(anchors, step, max_order, *, share=0.5):\n    return [share] * len(anchors)\n"
    (tmp_path / "halves.py").write_text(source, encoding="utf-8")
    monkeypatch.setattr(taylor_utils.bases, "__path__", [*taylor_utils.bases.__path__, str(tmp_path)])
    try:
        assert "halves" in basis_names()
        assert basis_settings("halves") == ["share"]
        assert basis_weights("halves", [0, 4], 6, 1) == [0.5, 0.5]
        assert basis_weights("halves", [0, 4], 6, 1, share=0.25) == [0.25, 0.25]
    finally:
        sys.modules.pop("taylor_utils.bases.halves", None)
