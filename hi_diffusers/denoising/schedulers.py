"""The samplers, by name: diffusers' schedulers of flow matching, set up as HiDream-I1 was published with them."""

import inspect
from typing import Any

from torch import Tensor

from cache_functions import Sampler
from hi_diffusers.denoising.loop import Estimate, Step

SCHEDULERS = ("unipc", "euler", "lcm")
# Samplers that add fresh noise at every step.
RENOISING = ("lcm",)


# diffusers' classes by our names, and where their configurations keep the shift.
CLASSES = {
    "UniPCMultistepScheduler": ("unipc", "flow_shift"),
    "FlowMatchEulerDiscreteScheduler": ("euler", "shift"),
    "FlowMatchLCMScheduler": ("lcm", "shift"),
}


def sampler_of(scheduler: Any, num_steps: int, guidance: float) -> Sampler:
    """What the cache must know of a scheduler of diffusers'.

    Args:
        scheduler: any; one that is not of SCHEDULERS goes by its class's name.
        num_steps: denoising steps.
        guidance: classifier-free guidance scale.
    """
    kind = type(scheduler).__name__
    name, field = CLASSES.get(kind, (kind, "shift"))
    shift = float(scheduler.config.get(field) or 1.0)
    return Sampler(kind, name, num_steps, shift, guidance, renoises=name in RENOISING)


def make_scheduler(name: str, shift: float) -> Any:
    """A fresh scheduler.

    Args:
        name: one of SCHEDULERS.
        shift: of the noise levels: sigma becomes shift sigma / (1 + (shift - 1) sigma).
    """
    # Imported here: the names above are read by --help, which need not wait for the library.
    from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchLCMScheduler, UniPCMultistepScheduler

    if name == "unipc":
        return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)
    if name == "euler":
        return FlowMatchEulerDiscreteScheduler(shift=shift)
    assert name == "lcm", name
    return FlowMatchLCMScheduler(shift=shift)


def solver_step(scheduler: Any, generator: Any = None) -> Step:
    """A scheduler's own step.

    Args:
        scheduler: of diffusers, with its timesteps set.
        generator: one or several generators, for schedulers that add noise.
    """
    noise_source = {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}

    def step(estimate: Estimate, index: int, latents: Tensor) -> Tensor:
        timestep = scheduler.timesteps[index]
        moved: Tensor = scheduler.step(estimate.velocity, timestep, latents, return_dict=False, **noise_source)[0]
        return moved

    return step
