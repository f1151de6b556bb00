"""The coefficients of a cached run: what a rule's forecasts and the scheduler's steps amount to from one full step to
the next.

Everything that a cached run does with latents and outputs is linear in them, so it is done once on coefficients in
their place: the latents are a vector whose entry 0 belongs to the noise, and the others to the outputs.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cache_functions import CacheConfig, CacheState, Current
from cache_functions.solver import Solver
from hi_diffusers.denoising.cached import denoise_with_cache


def solver_of(cache: CacheConfig, scheduler: Any, full_steps: Sequence[int], guidance: float) -> Solver:
    """The solver that draws what a rule draws.

    Args:
        cache: target velocity or x0, resolved, with a schedule of these full steps.
        scheduler: a scheduler that adds no noise, with its timesteps set.
        full_steps: the rule's full steps.
        guidance: classifier-free guidance scale; 1 or less turns guidance off.
    """
    network = _Coefficients(scheduler.sigmas.tolist(), len(full_steps), guidance)
    noise = torch.zeros(1, network.size, 1, 1)
    noise[0, 0] = 1
    end = denoise_with_cache(noise, network, scheduler, cache)
    assert network.steps == list(full_steps), (network.steps, full_steps)
    reached = [one.flatten().double() for one in (*network.latents, end)]
    rows = [network.row(stage, *reached[stage : stage + 2]) for stage in range(len(full_steps))]
    return Solver.of(full_steps, rows)


class _Coefficients:
    """Takes the place of the network: its outputs are unit vectors. See `Denoiser`."""

    embeds = None

    def __init__(self, sigmas: Sequence[float], num_full: int, guidance: float):
        self.sigmas, self.guidance = sigmas, guidance
        self.num_outputs = 2 if guidance > 1 else 1
        self.size = 1 + self.num_outputs * num_full
        self.steps: list[int] = []
        self.latents: list[Tensor] = []

    def condition(self, latents: Tensor) -> None:
        """Nothing is constant."""

    def __call__(self, latents: Tensor, index: int, cache_dic: CacheState | None, current: Current) -> Tensor:
        """The velocity of this step's outputs."""
        x0 = torch.zeros_like(latents)
        first = 1 + self.num_outputs * len(self.steps)
        x0[0, first] = 1
        if self.num_outputs == 2:
            x0[0, first + 1] = self.guidance
        self.steps.append(index)
        self.latents.append(latents)
        return (latents - x0) / self.sigmas[index]

    def branches(
        self, latents: Tensor, index: int, cache_dic: CacheState | None, current: Current
    ) -> tuple[Tensor, ...]:
        """Not called: no rule keeps the branches apart."""
        raise NotImplementedError

    def row(self, stage: int, here: Tensor, there: Tensor) -> list[float]:
        """The coefficients from a full step's latents to the next one's, both given by the noise and the outputs."""
        share = float(there[0] / here[0])
        others = (there - share * here)[1 : 1 + self.num_outputs * (stage + 1)]
        return [share, *(float(one) for place in range(self.num_outputs) for one in others[place :: self.num_outputs])]


def solver_on(scheduler: Any, full_steps: Sequence[int], guidance: float) -> Solver:
    """The solver that steps from one full step to the next by the scheduler's own rule, as with fewer steps.

    Args:
        scheduler: a scheduler that adds no noise, with its timesteps set; it cannot be used afterwards.
        full_steps: the steps of its timesteps that it keeps.
        guidance: as in `solver_of`.
    """
    end = len(scheduler.timesteps)
    scheduler.sigmas = scheduler.sigmas[[*full_steps, end]]
    scheduler.timesteps = scheduler.timesteps[list(full_steps)]
    scheduler.num_inference_steps = len(full_steps)
    every = solver_of(CacheConfig.off(), scheduler, range(len(full_steps)), guidance)
    return Solver.of(full_steps, every.rows)
