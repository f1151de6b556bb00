"""Where a model is kept and how it computes, as requested, and the device and dtype for that on this machine."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch

TORCH_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DTYPES = ("auto", *TORCH_DTYPES)
Offload = Literal["none", "model", "group"]
COMPILED_VARIANTS = 64  # HiDream's attention has 18: three roles, padded or not, for one branch, two, and any number


@dataclass(frozen=True)
class Placement:
    """The arguments of `load_pipeline` besides the files.

    Attributes:
        device, dtype, offload, tiled, compiled, fp8, attention_backend: as in `load_pipeline`.
        encoder_device: device of the text encoders; None is `device`.
    """

    device: str = "auto"
    dtype: str = "auto"
    encoder_device: str | None = None
    offload: Offload = "none"
    tiled: bool = False
    compiled: bool = False
    fp8: bool = False
    attention_backend: str | None = None


def resolve_device(name: str) -> torch.device:
    """The device of that name.

    Raises:
        ValueError: if this machine does not have it.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device must be auto, cpu, cuda or mps, got {name!r}") from None
    available = {
        "cpu": True,
        "cuda": torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count(),
        "mps": torch.backends.mps.is_available(),
    }
    if not available.get(device.type, False):
        raise ValueError(f"device must be available on this machine, got {name!r}: torch finds no such device")
    return device


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of the weights.

    Raises:
        ValueError: if there is no such dtype.
    """
    if name == "auto":
        name = "bf16" if device.type == "cuda" else "fp32"
    if name not in TORCH_DTYPES:
        raise ValueError(f"dtype must be one of auto, {', '.join(TORCH_DTYPES)}, got {name!r}")
    return TORCH_DTYPES[name]


def compile_blocks(model: Any, *, fullgraph: bool = False, backend: str | Callable[..., Any] = "inductor") -> None:
    """Compile a diffusers model's repeated blocks, as many variants of them as a session of several sizes needs.

    By default torch allows 8 variants of a function, and then raises an error or goes on uncompiled, with a warning.

    Args:
        fullgraph, backend: as in `torch.compile`.
    """
    settings: dict[str, Any] = {"fullgraph": fullgraph, "backend": backend}
    if "recompile_limit" in inspect.signature(torch.compile).parameters:
        settings["recompile_limit"] = COMPILED_VARIANTS
    else:  # before torch 2.13 it is a setting of the thread that draws
        torch._dynamo.config.recompile_limit = COMPILED_VARIANTS
    model.compile_repeated_blocks(**settings)
