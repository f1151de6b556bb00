"""The best linear weights for any anchors, from the Gram matrix of uncached runs (ridge regression).

With G[s, t] the mean inner product of the feature at steps s and t, the mean squared error of the forecast
sum_a w_a f_a of f_s is w' G_AA w - 2 w' G_As + G_ss, a quadratic function of w. The weights returned minimise it plus
`ridge` times the mean diagonal of G_AA times |w - w0|^2, where w0 is a prior rule's weights.
Learned weights for the final output: L2P, arXiv 2604.26365.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from taylor_utils.bases import reuse, taylor

PRIORS = ("reuse", "taylor")
LEAST_RIDGE = 1e-12  # without it, a matrix with parallel anchors could not be solved


def weights(
    anchors: Sequence[int],
    step: int,
    max_order: int,
    *,
    gram: Tensor | None = None,
    prior: str = "reuse",
    ridge: float = 0.1,
) -> list[float]:
    """One weight per anchor, oldest first.

    Args:
        gram: [num_steps, num_steps], float64, symmetric.
        prior: rule that the weights are pulled towards: "reuse", or "taylor" of order 1.
        ridge: strength of that pull, >= 0; 0 fits the matrix alone.

    Raises:
        ValueError: for an unknown prior, or a Gram matrix that is missing or too small.
    """
    if gram is None or len(gram) <= step:
        raise ValueError(f"basis learned needs a calibration of more than {step} steps: run calibrate.py")
    counted = list(anchors[-max_order - 1 :])
    towards = torch.tensor(prior_weights(prior, counted, step), dtype=torch.float64)
    solution = ridge_weights(gram[counted][:, counted], gram[counted, step, None], towards[:, None], ridge)
    fitted = [float(weight) for weight in solution[:, 0]]
    return [0.0] * (len(anchors) - len(counted)) + fitted


def prior_weights(prior: str, anchors: Sequence[int], step: int) -> list[float]:
    """Weights of the prior rule, one per anchor, oldest first.

    Raises:
        ValueError: for an unknown prior.
    """
    if prior not in PRIORS:
        raise ValueError(f"prior must be one of {', '.join(PRIORS)}, got {prior!r}")
    if prior == "reuse":
        return reuse.weights(anchors, step, max_order=0)
    return taylor.weights(anchors, step, max_order=1)


def ridge_weights(kernel: Tensor, cross: Tensor, towards: Tensor, ridge: float) -> Tensor:
    """Minimise the forecast error plus the pull towards a prior, for many anchor sets and steps at once.

    Args:
        kernel: inner products of the m anchors [..., m, m], float64.
        cross: inner products of the anchors with the features to forecast [..., m, N].
        towards: the prior's weights [..., m, N].
        ridge: strength of the pull, relative to the mean diagonal of `kernel`.

    Returns:
        Weights [..., m, N].
    """
    mean_diagonal = kernel.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    strength = max(ridge, LEAST_RIDGE) * mean_diagonal
    identity = torch.eye(kernel.shape[-1], dtype=kernel.dtype)
    solution: Tensor = torch.linalg.solve(kernel + strength * identity, cross + strength * towards)
    return solution


def expected_error(gram: Tensor, anchors: Sequence[int], weights: Sequence[float], step: int) -> float:
    """Mean squared error of a forecast over the calibration's runs, summed over the feature's elements.

    Args:
        gram: [num_steps, num_steps].
        anchors, weights: the forecast's anchors and weights, one weight per anchor.
        step: the forecast step.
    """
    points = [*anchors, step]
    signed = torch.tensor([*weights, -1.0], dtype=torch.float64)
    return float(signed @ gram[points][:, points] @ signed)
