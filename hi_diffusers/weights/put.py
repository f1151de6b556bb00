"""Puts weights into a model on the meta device, one by one."""

from pathlib import Path

import torch
from torch import Tensor, nn


def put_weight(model: nn.Module, name: str, value: Tensor, shape: torch.Size) -> None:
    """Set a parameter of a model.

    Args:
        value: the parameter, which may hold the weight packed.
        shape: shape of the unpacked weight.

    Raises:
        ValueError: if the model has no such weight.
    """
    owner, _, last = name.rpartition(".")
    try:
        there = model.get_parameter(name)
    except AttributeError:
        raise ValueError(f"the model has no weight {name}: the file is another model's") from None
    if there.shape != shape:
        raise ValueError(f"weight {name} has shape {tuple(shape)}, not {tuple(there.shape)}: it is another model's")
    setattr(model.get_submodule(owner), last, value)


def check_complete(model: nn.Module, source: Path) -> None:
    """Raise ValueError if a model still lacks weights.

    Args:
        source: the file or folder that its weights came from.

    Raises:
        ValueError: naming one of them.
    """
    missing = [name for name, value in model.named_parameters() if value.is_meta]
    if missing:
        raise ValueError(f"{source} lacks {len(missing)} of the model's weights, among them {missing[0]}")
