"""Muon: momentum made orthogonal (K. Jordan and others, 2024, https://kellerjordan.github.io/posts/muon/)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def orthogonalised(matrix: Tensor) -> Tensor:
    """The nearest matrix [M, N] with singular values about 1: five steps of a quintic Newton-Schulz iteration, in bf16.

    The coefficients are the published ones; they drive singular values into 0.7..1.2, which is all that is needed.
    """
    x = matrix.bfloat16()
    x = x / (x.norm() + 1e-7)
    tall = x.shape[0] > x.shape[1]
    if tall:
        x = x.T
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return (x.T if tall else x).to(matrix.dtype)


class Muon(torch.optim.Optimizer):
    """Muon for matrices [M, N] and convolution kernels [M, N, kh, kw], the latter taken as [M, N kh kw].

    A step has the root mean square 0.2 `lr` per weight, AdamW's usual size (J. Liu and others, 2025,
    arXiv 2502.16982), so that a learning rate found for AdamW is a good start.
    """

    def __init__(self, params: Iterable[Tensor], lr: float, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Move every parameter that has a gradient; a closure is not supported."""
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(parameter)
                average = state["momentum"].lerp_(parameter.grad, 1 - group["momentum"])
                update = parameter.grad.lerp(average, group["momentum"]).flatten(1)
                scale = 0.2 * max(update.shape) ** 0.5
                parameter.add_(orthogonalised(update).view(parameter.shape), alpha=-group["lr"] * scale)
