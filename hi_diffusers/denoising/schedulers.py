"""The samplers by name: diffusers' flow-matching schedulers, configured as published with HiDream-I1."""

import inspect
from typing import Any

from torch import Tensor

from hi_diffusers.denoising.loop import Estimate, Step
from hi_diffusers.denoising.start import begin_at

SCHEDULERS = ("unipc", "euler", "lcm")
# Samplers that add fresh noise at every step.
RENOISING = ("lcm",)


def make_scheduler(name: str, shift: float) -> Any:
    """A new scheduler.

    Args:
        name: one of SCHEDULERS.
        shift: shift of the noise levels: sigma becomes shift sigma / (1 + (shift - 1) sigma).
    """
    # Imported here: --help reads the names above and should not wait for the library.
    from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchLCMScheduler, UniPCMultistepScheduler

    if name == "unipc":
        return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)
    if name == "euler":
        return FlowMatchEulerDiscreteScheduler(shift=shift)
    assert name == "lcm", name
    return FlowMatchLCMScheduler(shift=shift)


def timed_scheduler(name: str, shift: float, num_steps: int, first_step: int = 0) -> Any:
    """A new scheduler with its timesteps set, which stay on the CPU: they are read step by step.

    Args:
        name, shift: as in `make_scheduler`.
        num_steps: denoising steps.
        first_step: the first of them that is drawn; those before it are cut off, and the others count from 0.
    """
    scheduler = make_scheduler(name, shift)
    scheduler.set_timesteps(num_steps)
    begin_at(scheduler, first_step)
    return scheduler


def solver_step(scheduler: Any, generator: Any = None) -> Step:
    """The update of one step by a scheduler.

    Args:
        scheduler: a scheduler of diffusers, with its timesteps set.
        generator: one or several generators, for schedulers that add noise.
    """
    noise_source = {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}

    def step(estimate: Estimate, index: int, latents: Tensor) -> Tensor:
        timestep = scheduler.timesteps[index]
        moved: Tensor = scheduler.step(estimate.velocity, timestep, latents, return_dict=False, **noise_source)[0]
        return moved

    return step
