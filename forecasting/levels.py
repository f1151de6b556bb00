"""The meaning of a scheduler's steps: noise levels, the meaning of the model's output, and whether noise is added.

Latents are alpha x0 + sigma noise. The model's output is the noise (epsilon), x0 (sample), alpha noise - sigma x0
(v_prediction, arXiv 2202.00512) or noise - x0 (flow_prediction, where alpha = 1 - sigma).
"""

import copy
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cache_functions import Sampler

# The samplers that calibrations name shorter than by diffusers' class.
NAMES = {
    "UniPCMultistepScheduler": "unipc",
    "FlowMatchEulerDiscreteScheduler": "euler",
    "FlowMatchLCMScheduler": "lcm",
}
PREDICTIONS = ("epsilon", "sample", "v_prediction", "flow_prediction")
# diffusers' schedulers that add noise at every step, whatever their settings.
RENOISING = (
    "FlowMatchLCMScheduler",
    "LCMScheduler",
    "TCDScheduler",
    "DDPMScheduler",
    "EulerAncestralDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "LTXEulerAncestralRFScheduler",
    "DPMSolverSDEScheduler",
    "SCMScheduler",
    "SASolverScheduler",
    "CogVideoXDPMScheduler",
)
UNKNOWN = "the noise levels of {} are not known: take target velocity or module, without the corrector"


@dataclass(frozen=True)
class Levels:
    """Noise levels of a scheduler's steps.

    Attributes:
        prediction: one of PREDICTIONS.
        alphas, sigmas: factors of x0 and of the noise in the latents at every step.
    """

    prediction: str
    alphas: tuple[float, ...]
    sigmas: tuple[float, ...]

    @classmethod
    def of(cls, scheduler: Any) -> "Levels":
        """The levels of a scheduler whose timesteps are set.

        Raises:
            ValueError: if they are not known.
        """
        prediction, steps = prediction_of(scheduler), len(scheduler.timesteps)
        sigmas = getattr(scheduler, "sigmas", None)
        names = " ".join(kind.__name__ for kind in type(scheduler).__mro__)
        if "EDM" in names or "Inverse" in names:  # preconditioned outputs; levels that rise
            raise ValueError(UNKNOWN.format(type(scheduler).__name__))
        if sigmas is not None and getattr(sigmas, "ndim", 0) == 1 and len(sigmas) >= steps:
            levels = [float(sigma) for sigma in sigmas[:steps]]
            if prediction == "flow_prediction":
                return cls.flow(levels)
            if hasattr(scheduler, "_sigma_to_alpha_sigma_t"):  # the solvers whose sigmas are sigma / alpha
                alphas = [(1 + sigma**2) ** -0.5 for sigma in levels]
                return cls(prediction, tuple(alphas), tuple(s * a for s, a in zip(levels, alphas, strict=True)))
        kept = getattr(scheduler, "alphas_cumprod", None)
        if sigmas is None and kept is not None and not scheduler.timesteps.is_floating_point():
            shares = [float(kept[int(timestep)]) for timestep in scheduler.timesteps]
            return cls(prediction, tuple(one**0.5 for one in shares), tuple((1 - one) ** 0.5 for one in shares))
        raise ValueError(UNKNOWN.format(type(scheduler).__name__))

    @classmethod
    def flow(cls, sigmas: Sequence[float]) -> "Levels":
        """The levels of a flow: alpha = 1 - sigma."""
        return cls("flow_prediction", tuple(1 - sigma for sigma in sigmas), tuple(sigmas))

    @property
    def relative(self) -> tuple[float, ...]:
        """The noise's share in the latents, sigma / (alpha + sigma): what sigma is in a flow."""
        if self.prediction == "flow_prediction":
            return self.sigmas
        return tuple(sigma / (alpha + sigma) for alpha, sigma in zip(self.alphas, self.sigmas, strict=True))

    def x0(self, index: int, latents: Tensor, output: Tensor) -> Tensor:
        """The denoised estimate at a step, from its latents and the model's output, all of one shape."""
        alpha, sigma = self.alphas[index], self.sigmas[index]
        if self.prediction == "epsilon":
            return (latents - sigma * output) / alpha
        if self.prediction == "v_prediction":
            return alpha * latents - sigma * output
        return latents - sigma * output if self.prediction == "flow_prediction" else output

    def output(self, index: int, latents: Tensor, x0: Tensor) -> Tensor:
        """The model's output that means this denoised estimate: the inverse of `x0`."""
        alpha, sigma = self.alphas[index], self.sigmas[index]
        if self.prediction == "epsilon":
            return (latents - alpha * x0) / sigma
        if self.prediction == "v_prediction":
            return (alpha * latents - x0) / sigma
        return (latents - x0) / sigma if self.prediction == "flow_prediction" else x0


def prediction_of(scheduler: Any) -> str:
    """The meaning of the model's output for a scheduler, one of PREDICTIONS; raises ValueError if it is not known."""
    stated = scheduler.config.get("prediction_type")
    if stated is None:
        # flow schedulers alone have no prediction type, and Flow in their name
        is_flow = any("Flow" in kind.__name__ for kind in type(scheduler).__mro__)
        return "flow_prediction" if is_flow else "epsilon"
    if stated not in PREDICTIONS:
        raise ValueError(f"the prediction type {stated} of {type(scheduler).__name__} is not known")
    return str(stated)


def sampler_of(scheduler: Any, num_steps: int, guidance: float) -> Sampler:
    """The properties of a diffusers scheduler that the cache depends on.

    Args:
        num_steps: denoising steps.
        guidance: classifier-free guidance scale.
    """
    name, config = type(scheduler).__name__, scheduler.config
    shift = float(config.get("flow_shift") or config.get("shift") or 1.0)
    return Sampler(name, NAMES.get(name, name), num_steps, shift, guidance, renoises=renoises(scheduler))


def renoises(scheduler: Any) -> bool:
    """Whether a scheduler's settings make it add noise at every step; `adds_noise` finds out the rest."""
    config, names = scheduler.config, {kind.__name__ for kind in type(scheduler).__mro__}
    return (
        bool(names & set(RENOISING))
        or bool(config.get("stochastic_sampling"))
        or str(config.get("algorithm_type", "")).startswith("sde")
    )


def adds_noise(step: Callable[..., Any], scheduler: Any, arguments: dict[str, Any]) -> bool:
    """Whether a step depends on random numbers: copies of the scheduler take it twice.

    Args:
        step: the step's function, which takes the scheduler first.
        scheduler: a scheduler before the step.
        arguments: the other arguments of the step, by name.
    """
    cuda = range(torch.cuda.device_count())

    def sample(seed: int) -> Tensor:
        given = dict(arguments)
        if given.get("generator") is not None:
            first = given["generator"][0] if isinstance(given["generator"], list) else given["generator"]
            given["generator"] = torch.Generator(first.device).manual_seed(seed)
        with torch.random.fork_rng(devices=cuda):
            torch.manual_seed(seed)
            return previous_sample(step(copy.deepcopy(scheduler), **given))

    one, other = sample(0), sample(1)
    return not bool(((one == other) | (one.isnan() & other.isnan())).all())


def previous_sample(result: Any) -> Tensor:
    """The latents in what a scheduler's step returns."""
    latents: Tensor = result[0] if isinstance(result, tuple) else result.prev_sample
    return latents


def named_arguments(scheduler: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    """The arguments of a scheduler's step by name; a subclass that hands them on by `*args` has its base's names."""
    for kind in type(scheduler).__mro__:
        if "step" in vars(kind):
            signature = inspect.signature(vars(kind)["step"])
            if not any(one.kind == one.VAR_POSITIONAL for one in signature.parameters.values()):
                return dict(list(signature.bind(scheduler, *args, **kwargs).arguments.items())[1:])
    raise ValueError(f"the arguments of {type(scheduler).__name__}.step have no names, so it cannot be forecast")
