"""The group norm for channels-last tensors: PyTorch's result, and PyTorch's gradients."""

import pytest
import torch
from torch import Tensor, nn

from training.normalization import ChannelsLastGroupNorm, use_channels_last_group_norm

GROUPS, CHANNELS = 4, 12


def run(norm: nn.GroupNorm, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    """Output and gradients, in double."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        norm.weight.copy_(torch.randn(CHANNELS, generator=generator))
        norm.bias.copy_(torch.randn(CHANNELS, generator=generator))
    x = x.clone().requires_grad_()
    y = norm(x)
    y.backward(dy.to(y.dtype))
    parts = {"y": y, "x": x.grad, "weight": norm.weight.grad, "bias": norm.bias.grad}
    return {name: value.detach().double() for name, value in parts.items()}


def inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (3, CHANNELS, 10, 14)
    # A mean far from zero is where a careless gradient loses its digits.
    x = torch.randn(shape, generator=generator) * 2 + 3
    dy = torch.randn(shape, generator=generator)
    return tuple(tensor.to(dtype, memory_format=torch.channels_last) for tensor in (x, dy))


def error(found: Tensor, exact: Tensor) -> float:
    return ((found - exact).norm() / exact.norm()).item()


def test_gradients_agree_with_pytorch_in_fp32() -> None:
    x, dy = inputs(torch.float32)
    theirs = run(nn.GroupNorm(GROUPS, CHANNELS), x, dy)
    for name, value in run(ChannelsLastGroupNorm(GROUPS, CHANNELS), x, dy).items():
        torch.testing.assert_close(value, theirs[name], atol=1e-4, rtol=1e-4, msg=lambda text, name=name: name + text)


def test_gradients_are_as_exact_as_those_of_pytorch_in_bf16() -> None:
    """The network runs in bf16 with fp32 weights; both results are compared with double precision."""
    x, dy = inputs(torch.bfloat16)
    exact = run(nn.GroupNorm(GROUPS, CHANNELS).double(), x.double(), dy.double())
    theirs = run(nn.GroupNorm(GROUPS, CHANNELS), x, dy)
    ours = run(ChannelsLastGroupNorm(GROUPS, CHANNELS), x, dy)
    for name, value in exact.items():
        assert error(ours[name], value) < 1.5 * error(theirs[name], value) + 1e-3, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_result_and_gradient_stay_channels_last(dtype: torch.dtype) -> None:
    x, dy = inputs(dtype)
    x.requires_grad_()
    y = ChannelsLastGroupNorm(GROUPS, CHANNELS)(x)
    y.backward(dy)
    assert y.dtype == x.grad.dtype == dtype
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert x.grad.is_contiguous(memory_format=torch.channels_last)


def test_only_group_norms_of_a_model_are_exchanged_and_parameters_keep_their_names() -> None:
    model = nn.Sequential(nn.Conv2d(3, CHANNELS, 1), nn.GroupNorm(GROUPS, CHANNELS), nn.BatchNorm2d(CHANNELS))
    names, parameters = list(model.state_dict()), list(model.parameters())
    use_channels_last_group_norm(model)
    assert [type(module) for module in model] == [nn.Conv2d, ChannelsLastGroupNorm, nn.BatchNorm2d]
    assert list(model.state_dict()) == names
    assert all(one is other for one, other in zip(parameters, model.parameters(), strict=True))
