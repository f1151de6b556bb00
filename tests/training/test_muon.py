"""Muon moves along the nearest orthogonal matrix, by a step of AdamW's usual size."""

import pytest
import torch

from training.muon import Muon, orthogonalised

SHAPES = pytest.mark.parametrize("shape", [(48, 48), (24, 96), (96, 24)], ids=str)


def gradient(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@SHAPES
def test_singular_values_of_an_update_are_about_one(shape: tuple[int, int]) -> None:
    assert torch.linalg.svdvals(gradient(*shape)).max() > 10
    found = torch.linalg.svdvals(orthogonalised(gradient(*shape)))
    assert found.max() < 1.3
    # A square random matrix has singular values near zero, which five iterations do not lift all the way.
    assert found.quantile(0.2) > 0.6


@SHAPES
def test_an_update_keeps_the_directions_of_its_gradient(shape: tuple[int, int]) -> None:
    u, _, v = torch.linalg.svd(gradient(*shape), full_matrices=False)
    alignment = torch.nn.functional.cosine_similarity(orthogonalised(gradient(*shape)).flatten(), (u @ v).flatten(), 0)
    assert alignment > 0.95


def test_an_update_does_not_depend_on_the_scale_of_its_gradient() -> None:
    small, large = orthogonalised(1e-3 * gradient(24, 96)), orthogonalised(1e3 * gradient(24, 96))
    torch.testing.assert_close(small, large, atol=0.02, rtol=0)


def step(value: torch.Tensor, grad: torch.Tensor, lr: float = 0.1) -> torch.Tensor:
    parameter = torch.nn.Parameter(value.clone())
    parameter.grad = grad
    Muon([parameter], lr).step()
    return parameter.detach()


def test_a_convolution_kernel_is_moved_as_a_matrix_with_a_row_for_each_output_channel() -> None:
    kernel, grad = torch.zeros(8, 4, 3, 3), gradient(8, 4, 3, 3)
    as_matrix = step(kernel.flatten(1), grad.flatten(1))
    assert as_matrix.abs().max() > 0
    assert torch.equal(step(kernel, grad).flatten(1), as_matrix)
    last = {"memory_format": torch.channels_last}
    assert torch.equal(step(kernel.to(**last), grad.to(**last)).flatten(1), as_matrix)


@SHAPES
def test_a_step_is_a_fifth_of_the_learning_rate_per_weight(shape: tuple[int, int]) -> None:
    moved = step(torch.zeros(shape), gradient(*shape), lr=0.1)
    assert 0.7 * 0.02 < moved.square().mean().sqrt() < 1.2 * 0.02


def test_a_parameter_without_a_gradient_stays() -> None:
    parameter = torch.nn.Parameter(gradient(8, 8))
    Muon([parameter], 0.1).step()
    assert torch.equal(parameter.detach(), gradient(8, 8))
