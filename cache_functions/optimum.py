"""The best schedule for a budget of full steps, by dynamic programming on a calibration's Gram matrix.

The cost of a schedule is a sum over its forecast steps: the root of the forecast's expected squared error, times the
factor by which the solver carries it into the latent. A forecast depends only on the last few full steps, its anchors,
so the minimum over all schedules is found step by step; the state is the tuple of the last anchors.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from taylor_utils.bases.learned import ridge_weights

EXTRAPOLATION_SHARE = 0.3
"""Weight of the forecasts' error in the latent with the corrector, which redoes the intervals.

It was chosen by hand, not measured: the schedule that follows from it is one candidate, and drawing decides.
"""
MAX_ANCHORS = 3
MAX_CALIBRATED_STEPS = 128
"""Memory grows with the fourth power of the steps: 2 GiB at this many."""


@dataclass(frozen=True)
class Rule:
    """The rule of the forecasts for which a schedule is searched.

    Attributes:
        num_anchors: 1 to 3.
        prior, ridge: settings of the learned weights, see `taylor_utils.bases.learned`.
        corrector: whether intervals are redone.
    """

    num_anchors: int
    prior: str
    ridge: float
    corrector: bool = False


def step_factors(sigmas: Sequence[float], target: str) -> Tensor:
    """The factor by which the solver carries a target's error at each step into the latent, [num_steps].

    Args:
        sigmas: noise level at every step and after the last one.
        target: "velocity", which the solver multiplies by sigma_s - sigma_(s+1), or "x0", by that over sigma_s.
    """
    levels = torch.tensor(sigmas, dtype=torch.float64)
    strides = levels[:-1] - levels[1:]
    return strides if target == "velocity" else strides / levels[:-1]


def optimal_full_steps(gram: Tensor, factors: Tensor, rule: Rule, full_steps: int) -> tuple[tuple[int, ...], float]:
    """The schedule of lowest cost.

    Args:
        gram: [S, S], float64.
        factors: weight of each step's error [S].
        rule: how steps are forecast.
        full_steps: number of full steps, 1 to S.

    Returns:
        (full steps, their cost). Time and memory grow with S^4: 50 steps take a second or so and 100 MB.

    Raises:
        ValueError: if the steps, the budget or the number of anchors are out of range.
    """
    num_steps = len(gram)
    if num_steps > MAX_CALIBRATED_STEPS:
        raise ValueError(f"a schedule is computed for at most {MAX_CALIBRATED_STEPS} steps, got {num_steps}")
    if not 1 <= full_steps <= num_steps:
        raise ValueError(f"full_steps must be a whole number from 1 to {num_steps}, got {full_steps}")
    segments = segment_costs(gram, factors, rule)
    # best[a, b, c]: least cost up to the full step c, whose predecessors are b - 1 and a - 1; 0 stands for none
    size = num_steps + 1
    best = torch.full((size, size, num_steps), torch.inf, dtype=torch.float64)
    best[0, 0, 0] = 0.0
    came_from: list[Tensor] = []
    for _ in range(full_steps - 1):
        through = best[..., None] + segments[..., :num_steps]
        least, oldest = through.min(dim=0)
        best = torch.full_like(best, torch.inf)
        best[:, 1:, :] = least
        came_from.append(oldest)
    total = best + segments[..., num_steps]
    flat = int(total.argmin())
    a, b, c = flat // (size * num_steps), flat // num_steps % size, flat % num_steps
    cost = float(total[a, b, c])
    steps = [c]
    for oldest in reversed(came_from):
        # the state before (a, b, c) is (what came before a, a, b - 1)
        steps.append(b - 1)
        a, b, c = int(oldest[a, b - 1, c]), a, b - 1
    return tuple(reversed(steps)), cost


def segment_costs(gram: Tensor, factors: Tensor, rule: Rule) -> Tensor:
    """Cost of the steps between the full step c and the next one, d, for every state.

    Returns:
        [S + 1, S + 1, S, S + 1], indexed by a + 1, b + 1, c, d: c is the newest anchor, b and a the ones before it
        (index 0: none), and d = S is the end. States that do not exist cost infinity.

    Raises:
        ValueError: if the number of anchors is out of range.
    """
    if not 1 <= rule.num_anchors <= MAX_ANCHORS:
        raise ValueError(f"num_anchors must be a whole number from 1 to {MAX_ANCHORS}, got {rule.num_anchors}")
    num_steps = len(gram)
    size = num_steps + 1
    costs = torch.full((size, size, num_steps, size), torch.inf, dtype=torch.float64)
    step = torch.arange(num_steps)
    ahead = step[:, None] < torch.arange(size)
    for states in _states(num_steps):
        forecast = _forecast_errors(gram, states[:, -rule.num_anchors :], rule).clamp(min=0).sqrt() * factors
        newest = states[:, -1]
        forecast = forecast * (step > newest[:, None])
        # the sum over steps before d, for d = 0 .. S
        summed = torch.nn.functional.pad(forecast.cumsum(-1), (1, 0))
        if rule.corrector:
            share = torch.full((size,), EXTRAPOLATION_SHARE, dtype=torch.float64)
            share[num_steps] = 1.0  # the last interval has no end, and is not redone
            summed = summed * share
        summed = torch.where(ahead[newest], summed, torch.inf)
        index = torch.zeros(len(states), 3, dtype=torch.long)
        index[:, 3 - states.shape[1] :] = states
        index[:, :2][:, 3 - states.shape[1] :] += 1
        costs[index[:, 0], index[:, 1], index[:, 2]] = summed
    if rule.corrector:
        costs[..., :num_steps] += _interpolation_costs(gram, factors)
    return costs


def _states(num_steps: int) -> list[Tensor]:
    """All tuples of one, two or three last full steps, oldest first: [N, 1], [N, 2], [N, 3]."""
    steps = torch.arange(num_steps)
    return [
        torch.zeros(1, 1, dtype=torch.long),
        torch.tensor([[0, later] for later in range(1, num_steps)], dtype=torch.long).reshape(-1, 2),
        torch.combinations(steps, 3),
    ]


def _forecast_errors(gram: Tensor, anchors: Tensor, rule: Rule) -> Tensor:
    """Expected squared error [N, S] of forecasting every step from anchors [N, m]; valid for later steps only."""
    kernel = gram[anchors[:, :, None], anchors[:, None, :]]
    cross = gram[anchors]
    weights = ridge_weights(kernel, cross, _prior_weights(rule.prior, anchors, len(gram)), rule.ridge)
    return (weights * (kernel @ weights)).sum(1) - 2 * (weights * cross).sum(1) + gram.diagonal()


def _prior_weights(prior: str, anchors: Tensor, num_steps: int) -> Tensor:
    """`taylor_utils.bases.learned.prior_weights` for all anchors [N, m] and steps: [N, m, S]."""
    weights = torch.zeros(*anchors.shape, num_steps, dtype=torch.float64)
    weights[:, -1] = 1.0
    if prior == "taylor" and anchors.shape[1] > 1:
        gap = (anchors[:, -1] - anchors[:, -2])[:, None]
        slope = (torch.arange(num_steps) - anchors[:, -1:]) / gap
        weights[:, -1] += slope
        weights[:, -2] -= slope
    return weights


def _interpolation_costs(gram: Tensor, factors: Tensor) -> Tensor:
    """Cost [S, S] of the steps between full steps c and d when they are interpolated linearly; 0 where d <= c + 1."""
    num_steps = len(gram)
    costs = torch.zeros(num_steps, num_steps, dtype=torch.float64)
    for c in range(num_steps):
        for d in range(c + 2, num_steps):
            between = torch.arange(c + 1, d)
            late = ((between - c) / (d - c)).double()
            early = 1 - late
            error = (
                early**2 * gram[c, c]
                + late**2 * gram[d, d]
                + 2 * early * late * gram[c, d]
                - 2 * early * gram[c, between]
                - 2 * late * gram[d, between]
                + gram.diagonal()[between]
            )
            costs[c, d] = (error.clamp(min=0).sqrt() * factors[between]).sum()
    return costs
