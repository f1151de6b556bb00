"""The schedule of least cost, against every schedule there is."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from cache_functions.optimum import Rule, optimal_full_steps, step_factors
from taylor_utils import basis_weights
from taylor_utils.bases.learned import expected_error

NUM_STEPS = 10


def random_gram(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    drift = torch.randn(6, NUM_STEPS, 20, generator=generator, dtype=torch.float64).cumsum(1) + 3
    return torch.einsum("psn,ptn->st", drift, drift) / len(drift)


def cost(steps: tuple[int, ...], gram: Tensor, factors: Tensor, rule: Rule) -> float:
    """What the documentation says a schedule costs, step by step."""
    total = 0.0
    for step in set(range(NUM_STEPS)) - set(steps):
        past, later = [t for t in steps if t < step], [t for t in steps if t > step]
        weights = basis_weights(
            "learned", past, step, rule.num_anchors - 1, gram=gram, prior=rule.prior, ridge=rule.ridge
        )
        forecast = math.sqrt(max(0.0, expected_error(gram, past, weights, step)))
        if rule.corrector and later:
            share = (step - past[-1]) / (later[0] - past[-1])
            between = expected_error(gram, [past[-1], later[0]], [1 - share, share], step)
            forecast = 0.3 * forecast + math.sqrt(max(0.0, between))
        total += forecast * float(factors[step])
    return total


@pytest.mark.parametrize("corrector", [False, True])
@pytest.mark.parametrize("prior", ["reuse", "taylor"])
@pytest.mark.parametrize("num_anchors", [1, 2, 3])
@pytest.mark.parametrize("full_steps", [1, 2, 4, 5])
def test_dynamic_programming_finds_what_trying_every_schedule_finds(
    full_steps: int, num_anchors: int, prior: str, corrector: bool
) -> None:
    """A state of (previous, last) full step is not enough for three anchors: most such problems come out wrong."""
    rule = Rule(num_anchors, prior, 0.01, corrector)
    for seed in range(3):
        gram = random_gram(seed)
        factors = torch.rand(NUM_STEPS, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        schedules = [(0, *rest) for rest in itertools.combinations(range(1, NUM_STEPS), full_steps - 1)]
        least = min(schedules, key=lambda steps, gram=gram, factors=factors: cost(steps, gram, factors, rule))
        found, found_cost = optimal_full_steps(gram, factors, rule, full_steps)
        assert found == least
        assert found_cost == pytest.approx(cost(least, gram, factors, rule), rel=1e-6)


def test_all_steps_full_cost_nothing() -> None:
    gram = random_gram(0)
    steps, least = optimal_full_steps(gram, torch.ones(NUM_STEPS, dtype=torch.float64), Rule(3, "reuse", 0.1), 10)
    assert steps == tuple(range(10)) and least == pytest.approx(0, abs=1e-6)


def test_an_error_counts_as_far_as_the_solver_carries_it() -> None:
    sigmas = [1.0, 0.75, 0.25, 0.0]
    assert step_factors(sigmas, "velocity").tolist() == pytest.approx([0.25, 0.5, 0.25])
    assert step_factors(sigmas, "x0").tolist() == pytest.approx([0.25, 0.5 / 0.75, 1.0])


@pytest.mark.parametrize("full_steps", [0, 11])
def test_a_budget_that_cannot_be_is_refused(full_steps: int) -> None:
    with pytest.raises(ValueError, match=f"full_steps must be a whole number from 1 to 10, got {full_steps}"):
        optimal_full_steps(random_gram(0), torch.ones(10, dtype=torch.float64), Rule(3, "reuse", 0.1), full_steps)


def test_a_number_of_anchors_that_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="num_anchors must be a whole number from 1 to 3, got 4"):
        optimal_full_steps(random_gram(0), torch.ones(10, dtype=torch.float64), Rule(4, "reuse", 0.1), 3)
