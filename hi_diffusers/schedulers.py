"""The samplers, by name: diffusers' schedulers set up as HiDream-I1 was published with them."""

from typing import Any

from cache_functions import Sampler

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
