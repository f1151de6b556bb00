"""The samplers by name: diffusers' flow-matching schedulers, configured as published with HiDream-I1."""

import inspect
from typing import Any

from torch import Tensor

from cache_functions import Sampler
from hi_diffusers.denoising.loop import Estimate, Step

SCHEDULERS = ("unipc", "euler", "lcm")
# Samplers that add fresh noise at every step.
RENOISING = ("lcm",)


# diffusers' class -> our name, and the field of its configuration that holds the shift.
CLASSES = {
    "UniPCMultistepScheduler": ("unipc", "flow_shift"),
    "FlowMatchEulerDiscreteScheduler": ("euler", "shift"),
    "FlowMatchLCMScheduler": ("lcm", "shift"),
}


def sampler_of(scheduler: Any, num_steps: int, guidance: float) -> Sampler:
    """The properties of a diffusers scheduler that the cache depends on.

    Args:
        scheduler: any scheduler; one that is not in SCHEDULERS is named by its class.
        num_steps: denoising steps.
        guidance: classifier-free guidance scale.
    """
    kind = type(scheduler).__name__
    name, field = CLASSES.get(kind, (kind, "shift"))
    shift = float(scheduler.config.get(field) or 1.0)
    return Sampler(kind, name, num_steps, shift, guidance, renoises=name in RENOISING)


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
