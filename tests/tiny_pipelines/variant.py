"""A tiny pipeline of diffusers with random weights, and how it is called."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

NUM_STEPS = 12


@dataclass(frozen=True)
class Variant:
    """One way to draw with a family.

    Attributes:
        name: "family task", e.g. "flux dev".
        build: makes the pipeline, with random weights.
        arguments: keyword arguments of the pipeline's call but num_inference_steps and generator, for a batch size.
        calls: calls of denoisers per step.
        renoises: whether its scheduler adds noise at every step.
        strength: share of the steps that is drawn.
    """

    name: str
    build: Callable[[], Any]
    arguments: Callable[[int], dict[str, Any]]
    calls: int = 1
    renoises: bool = False
    strength: float = 1.0

    def draw(self, pipe: Any, seed: int = 0, num_steps: int = NUM_STEPS, batch: int = 1, **changes: Any) -> Tensor:
        """The latents, or pixels, of a drawing, fp32."""
        given = {"num_inference_steps": num_steps, "generator": torch.Generator().manual_seed(seed)}
        torch.manual_seed(seed)  # for the schedulers that take no generator
        return first_result(pipe(**(self.arguments(batch) | given | changes)))


def first_result(output: Any) -> Tensor:
    """The pictures, frames or latents in a pipeline's output."""
    found = output[0]
    if isinstance(found, np.ndarray):
        return torch.from_numpy(found).float()
    return found.float() if isinstance(found, Tensor) else torch.stack([one.float() for one in found])


def noise(*shape: int, seed: int = 1) -> Tensor:
    """Random numbers, the same for the same shape and seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def seeded(kind: Any, **config: Any) -> Any:
    """A network with random weights, always the same ones."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return kind(**config).eval()


def quiet(pipe: Any) -> Any:
    """The pipeline without its progress bar."""
    pipe.set_progress_bar_config(disable=True)
    return pipe
