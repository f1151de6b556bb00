"""Noise levels: the inverse pair x0 and output, the corrector's exactness, and whether noise is added."""

from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from cache_functions import CacheConfig
from forecasting import Corrector, Levels
from forecasting.levels import adds_noise, prediction_of, renoises
from hi_diffusers import SamplingOptions, generate
from hi_diffusers.families.hidream.pipeline import HiDreamImagePipeline
from tests.tiny_folder import PROMPT

NUM_STEPS, MASK = 12, (0, 2, 6, 9)


def make(name: str, **config: Any) -> Any:
    scheduler = getattr(diffusers, name)(**config)
    scheduler.set_timesteps(NUM_STEPS)
    return scheduler


SOLVERS = {
    "ddim epsilon": ("DDIMScheduler", {}),
    "ddim v": ("DDIMScheduler", {"prediction_type": "v_prediction"}),
    "ddim sample": ("DDIMScheduler", {"prediction_type": "sample", "clip_sample": False}),
    "ddim zero snr": (
        "DDIMScheduler",
        {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
    ),
    "cogvideox ddim": (
        "CogVideoXDDIMScheduler",
        {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
    ),
    "dpm++ 2m epsilon": ("DPMSolverMultistepScheduler", {}),
    "dpm++ 2m v": ("DPMSolverMultistepScheduler", {"prediction_type": "v_prediction"}),
    "dpm++ 2m karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "dpm++ 2m flow": (
        "DPMSolverMultistepScheduler",
        {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0},
    ),
    "dpm++ 3m": ("DPMSolverMultistepScheduler", {"solver_order": 3}),
    "unipc epsilon": ("UniPCMultistepScheduler", {}),
    "unipc flow": (
        "UniPCMultistepScheduler",
        {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0},
    ),
    "unipc flow, order 3": (
        "UniPCMultistepScheduler",
        {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0, "solver_order": 3},
    ),
    "deis": ("DEISMultistepScheduler", {}),
    "flow euler": ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
}


@pytest.fixture(params=SOLVERS)
def scheduler(request: pytest.FixtureRequest) -> Any:
    name, config = SOLVERS[request.param]
    if name == "DDIMScheduler":
        config = {"clip_sample": False} | config
    return make(name, **config)


def random(seed: int) -> Tensor:
    return torch.randn(1, 2, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).float()


def test_output_undoes_x0(scheduler: Any) -> None:
    levels = Levels.of(scheduler)
    for index in range(NUM_STEPS):
        if levels.prediction == "epsilon" and levels.alphas[index] < 1e-3:
            continue
        latents, output = random(1), random(2)
        if levels.sigmas[index] > 0:
            again = levels.output(index, latents, levels.x0(index, latents, output))
            assert torch.allclose(again, output, atol=1e-4)


def test_a_constant_x0_is_where_the_solver_lands(scheduler: Any) -> None:
    """Wrong levels would not: the model's output that means x0 must take the solver to x0."""
    levels, x0 = Levels.of(scheduler), random(1)
    latents = levels.alphas[0] * x0 + levels.sigmas[0] * random(2)
    for index, timestep in enumerate(scheduler.timesteps):
        moved = scheduler.step(levels.output(index, latents, x0), timestep, latents, return_dict=False)
        if index + 1 < NUM_STEPS:
            estimate = levels.x0(index, latents, levels.output(index, latents, x0))
            assert torch.allclose(estimate, x0, atol=1e-3)
        latents = moved[0]
    assert (latents - x0).abs().max() < 0.15, "what noise the schedule's last level leaves"


def test_where_x0_is_piecewise_linear_the_corrector_lands_on_the_uncached_result(scheduler: Any) -> None:
    knots = torch.stack([random(seed) for seed in range(len(MASK) + 1)])

    def true_x0(step: int) -> Tensor:
        marks = [*MASK, NUM_STEPS]
        place = max(i for i, mark in enumerate(marks[:-1]) if mark <= step)
        share = (step - marks[place]) / (marks[place + 1] - marks[place])
        return torch.lerp(knots[place], knots[place + 1], share)

    def run(corrects: bool | None) -> Tensor:
        scheduler.set_timesteps(NUM_STEPS)
        levels = Levels.of(scheduler)
        corrector = Corrector(scheduler, levels)
        latents, states = random(99), []

        def take(output: Tensor, step: int, latents: Tensor) -> Tensor:
            return scheduler.step(output, scheduler.timesteps[step], latents, return_dict=False)[0]

        for step in range(NUM_STEPS):
            newest = max(mark for mark in MASK if mark <= step)
            x0 = true_x0(step if corrects is None else newest)
            output = levels.output(step, latents, x0)
            if corrects and step in MASK:
                latents, output = corrector.at_full_step(step, latents, x0, output, take)
            if step in MASK:
                states.append(latents)
            latents = take(output, step, latents)
        return torch.cat(states)

    exact, reused, redone = run(None), run(False), run(True)
    assert (reused - exact).abs().max() > 1e-2, "the forecasts are exact already: the test shows nothing"
    assert (redone - exact).abs().max() < 1e-4


def test_unknown_levels_and_predictions_are_refused() -> None:
    with pytest.raises(ValueError, match="noise levels of EulerDiscreteScheduler are not known"):
        Levels.of(make("EulerDiscreteScheduler"))
    strange = make("DDIMScheduler")
    strange.register_to_config(prediction_type="colour")
    with pytest.raises(ValueError, match="prediction type colour"):
        prediction_of(strange)


NOISY = {
    "FlowMatchLCMScheduler": {},
    "FlowMatchEulerDiscreteScheduler": {"stochastic_sampling": True},
    "LCMScheduler": {},
    "TCDScheduler": {},
    "DDPMScheduler": {},
    "EulerAncestralDiscreteScheduler": {},
    "KDPM2AncestralDiscreteScheduler": {},
    "LTXEulerAncestralRFScheduler": {},
    "DPMSolverMultistepScheduler": {"algorithm_type": "sde-dpmsolver++"},
    "DPMSolverSinglestepScheduler": {"algorithm_type": "sde-dpmsolver++", "final_sigmas_type": "sigma_min"},
    "SASolverScheduler": {},
}


@pytest.mark.parametrize("name", NOISY)
def test_the_table_and_a_trial_agree_on_which_schedulers_add_noise(name: str) -> None:
    noisy = make(name, **NOISY[name])
    assert renoises(noisy)
    arguments = {"model_output": random(1), "timestep": noisy.timesteps[0], "sample": random(2)}
    for _ in range({"KDPM2AncestralDiscreteScheduler": 1, "SASolverScheduler": 3}.get(name, 0)):  # none before
        noisy.step(**arguments)
        arguments["timestep"] = noisy.timesteps[noisy.step_index]
    before = torch.random.get_rng_state()
    assert adds_noise(type(noisy).step, noisy, arguments)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_deterministic_schedulers_are_not_taken_for_noisy_ones(scheduler: Any) -> None:
    assert not renoises(scheduler)
    arguments = {"model_output": random(1), "timestep": scheduler.timesteps[0], "sample": random(2)}
    assert not adds_noise(type(scheduler).step, scheduler, arguments)


def test_eta_makes_ddim_add_noise() -> None:
    ddim = make("DDIMScheduler")
    arguments = {"model_output": random(1), "timestep": ddim.timesteps[0], "sample": random(2), "eta": 0.5}
    assert adds_noise(type(ddim).step, ddim, arguments)
    assert adds_noise(type(ddim).step, ddim, arguments | {"generator": [torch.Generator().manual_seed(3)]})


@pytest.mark.parametrize(
    "noisy",
    [
        diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, stochastic_sampling=True),
        diffusers.DPMSolverMultistepScheduler(
            algorithm_type="sde-dpmsolver++", prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
    ],
    ids=["stochastic-euler", "dpm-sde"],
)
def test_our_own_pipeline_refuses_block_features_where_noise_is_added(
    tiny_pipe: HiDreamImagePipeline, monkeypatch: pytest.MonkeyPatch, noisy: Any
) -> None:
    monkeypatch.setattr(tiny_pipe, "scheduler", noisy)
    settings = {"num_inference_steps": 6, "output_type": "latent", "max_sequence_length": 32}
    for cache in (CacheConfig(target="module"), CacheConfig(target="velocity")):
        with pytest.raises(ValueError, match="target must be x0"):
            tiny_pipe(PROMPT, cache=cache, **settings)
    tiny_pipe(PROMPT, cache=CacheConfig(), **settings)
    generate(tiny_pipe, SamplingOptions(PROMPT, seed=1, num_steps=4), CacheConfig(target="module"))
