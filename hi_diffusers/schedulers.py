"""The samplers, by name: diffusers' schedulers set up as HiDream-I1 was published with them."""

from typing import Any

SCHEDULERS = ("unipc", "euler", "lcm")
# Samplers that add fresh noise at every step.
RENOISING = ("lcm",)


def renoises(scheduler: Any) -> bool:
    """Whether this scheduler adds fresh noise at every step."""
    return type(scheduler).__name__ == "FlowMatchLCMScheduler"


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
