"""Fits a solver stage by stage, on the latents that the solver itself reaches.

A stage leads from one full step to the next. Its coefficients are those that bring the latents of all calibration runs
nearest to the uncached runs' at the next full step (weighted least squares with a pull towards a prior rule's
coefficients). The next stage then starts from the latents that these coefficients make: what has drifted is pulled
back. A run that has gone another way than its uncached one would rule every later stage; so each run is weighted by
one over its own error (iteratively reweighted least squares).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

ROUNDS = 4
FLOOR = 0.1
"""Added to a run's error before its inverse is the weight, in medians of all runs' errors."""
LEAST = 1e-12
"""Of the features' mean square: below it an error is rounding."""


@dataclass(frozen=True)
class Moments:
    """Inner products of one run's features at a stage, per element of the latent, float64.

    The features are the latent and the outputs so far (m of them); the residual is what the prior's coefficients leave
    of the uncached run's latent at the next full step.

    Attributes:
        products: of the features with each other [m, m].
        cross: of the features with the residual [m].
        energy: of the residual with itself.
    """

    products: Tensor
    cross: Tensor
    energy: float

    @classmethod
    def of(cls, features: Sequence[Tensor], target: Tensor, prior: Tensor) -> "Moments":
        """The moments of one run.

        Args:
            features: latent and outputs, m tensors of one shape.
            target: the uncached run's latent at the next full step, of that shape.
            prior: the prior's coefficients [m], float64.
        """
        stacked = torch.stack([one.flatten() for one in features]).double()
        residual = target.flatten().double() - prior @ stacked
        size = residual.numel()
        return cls(stacked @ stacked.T / size, stacked @ residual / size, float(residual @ residual) / size)


def fit_stage(runs: Sequence[Moments], prior: Tensor, ridge: float, rounds: int = ROUNDS) -> tuple[Tensor, Tensor]:
    """The coefficients of one stage.

    Args:
        runs: one entry per calibration run.
        prior: coefficients that the fit is pulled towards [m], float64.
        ridge: strength of the pull, relative to each feature's mean square.
        rounds: rounds of reweighting; 1 is plain least squares.

    Returns:
        (coefficients [m], mean squared error of each run's latent [N]), float64.
    """
    products = torch.stack([run.products for run in runs])
    cross = torch.stack([run.cross for run in runs])
    energy = torch.tensor([run.energy for run in runs], dtype=torch.float64)
    weights = torch.ones(len(runs), dtype=torch.float64)
    least = LEAST * float(products.diagonal(dim1=1, dim2=2).mean())  # an exact fit leaves no error to divide by
    for _ in range(rounds):
        share = weights / weights.sum()
        normal = torch.einsum("n,nij->ij", share, products)
        pull = torch.diag((ridge * normal.diagonal()).clamp(min=least))
        change = torch.linalg.solve(normal + pull, share @ cross)
        errors = torch.einsum("i,nij,j->n", change, products, change) - 2 * cross @ change + energy
        errors = errors.clamp(min=0)
        weights = 1 / (errors + FLOOR * errors.median()).clamp(min=least)
    return prior + change, errors
