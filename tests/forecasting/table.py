"""The table of families in docs/families.md: `python -m tests.forecasting.table` prints it.

What a family keeps at its published size is counted on the network that diffusers builds by default where that is the
published one, on torch's device without data: its parts, and the width of each.
"""

import importlib
import pkgutil
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from torch import nn

from forecasting.levels import prediction_of, renoises
from forecasting.parts import parts
from tests import tiny_pipelines
from tests.tiny_pipelines.variant import Variant

ANCHORS = 2  # order 1
BYTES = 2  # bf16
NOT_FAMILIES = ("variant", "folders", "__main__")
X0_REFUSED = {
    "ltx-2": "two results",
    "ltx condition": "a noise level per token",
    "hunyuan-image": "its guider averages over the steps",
}


@dataclass(frozen=True)
class Published:
    """A published model whose network is diffusers' default.

    Attributes:
        network: class of diffusers.
        size: what is drawn.
        tokens: image tokens; text: text tokens in blocks that join both.
        latents: numbers in a latent.
        branches: drawings in a step: 2 with guidance.
    """

    network: str
    size: str
    tokens: int
    text: int
    latents: int
    branches: int


PUBLISHED = {
    "flux dev": Published("FluxTransformer2DModel", "1024x1024", 64 * 64, 512, 16 * 128 * 128, 1),
    "qwen-image": Published("QwenImageTransformer2DModel", "1328x1328", 83 * 83, 0, 16 * 166 * 166, 2),
    "wan t2v": Published("WanTransformer3DModel", "1280x720, 81 frames", 21 * 45 * 80, 0, 16 * 21 * 90 * 160, 2),
    "hunyuan-video": Published(
        "HunyuanVideoTransformer3DModel", "1280x720, 129 frames", 33 * 45 * 80, 256, 16 * 33 * 90 * 160, 1
    ),
    "dit ddim": Published("DiTTransformer2DModel", "256x256", 16 * 16, 0, 4 * 32 * 32, 2),
    "z-image": Published("ZImageTransformer2DModel", "1024x1024", 64 * 64, 0, 16 * 128 * 128, 2),
    "cogvideox ddim": Published(
        "CogVideoXTransformer3DModel", "720x480, 49 frames", 13 * 30 * 45, 226, 16 * 13 * 60 * 90, 2
    ),
}


def variants() -> list[Variant]:
    """All variants, family after family."""
    names = [one.name for one in pkgutil.iter_modules(tiny_pipelines.__path__) if one.name not in NOT_FAMILIES]
    modules = [importlib.import_module(f"tests.tiny_pipelines.{name}") for name in names]
    return [variant for module in modules for variant in module.VARIANTS]


def module_bytes(published: Published) -> int:
    """Bytes that target module keeps at order 1."""
    with torch.device("meta"):
        network: nn.Module = getattr(diffusers, published.network)()
    numbers = 0
    for part in parts(network):
        if part.is_forecast:
            joined = part.name == "proj_out" or (published.network.startswith("CogVideoX") and part.name == "ff")
            numbers += (published.tokens + published.text * joined) * _width(part.module)
    return numbers * ANCHORS * BYTES * published.branches


def velocity_bytes(published: Published) -> int:
    """Bytes that target velocity keeps at order 1."""
    return published.latents * ANCHORS * BYTES * published.branches


def _width(module: nn.Module) -> int:
    """Width of a part's result: the least of its linear layers', since feed-forwards are wider inside."""
    return min(one.out_features for one in module.modules() if isinstance(one, nn.Linear))


def _size(number: int) -> str:
    return (
        f"{number / 1e9:.1f} GB"
        if number >= 1e8
        else f"{number / 1e6:.2g} MB"
        if number < 1e6
        else f"{number / 1e6:.1f} MB"
    )


def _row(variant: Variant) -> str:
    pipe = variant.build()
    targets = "x0" if variant.renoises else "velocity, x0, module"
    note = X0_REFUSED.get(variant.name)
    if note is not None:
        targets = f"velocity, module (x0: {note})"
    noise = "added: x0 alone" if variant.renoises else "none"
    published = PUBLISHED.get(variant.name)
    kept: Any = ("", "", "")
    if published is not None:
        kept = (published.size, _size(velocity_bytes(published)), _size(module_bytes(published)))
    scheduler = type(pipe.scheduler).__name__.removesuffix("Scheduler")
    cells = (
        variant.name,
        f"`{type(pipe).__name__}`",
        str(variant.calls),
        f"{scheduler}, {prediction_of(pipe.scheduler).removesuffix('_prediction')}",
        noise,
        targets,
        *kept,
    )
    assert renoises(pipe.scheduler) == variant.renoises
    return f"| {' | '.join(cells)} |"


def table() -> str:
    """The table, in Markdown."""
    head = ("family", "pipeline", "calls per step", "scheduler", "noise", "targets", "size", "velocity", "module")
    return "\n".join([f"| {' | '.join(head)} |", "|---" * len(head) + "|", *map(_row, variants())])


if __name__ == "__main__":
    print(table())
