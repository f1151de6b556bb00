import diffusers
import pytest
import torch

from hi_diffusers.denoising.schedulers import RENOISING, SCHEDULERS, make_scheduler
from hi_diffusers.families.table import PRESETS
from hi_diffusers.request.options import SamplingOptions


def test_unipc_is_set_up_as_published_with_the_full_model() -> None:
    scheduler = make_scheduler("unipc", 3.0)
    assert type(scheduler) is diffusers.UniPCMultistepScheduler
    assert scheduler.config.prediction_type == "flow_prediction"
    assert scheduler.config.use_flow_sigmas is True
    assert scheduler.config.flow_shift == 3.0


@pytest.mark.parametrize(
    ("name", "kind"),
    [("euler", diffusers.FlowMatchEulerDiscreteScheduler), ("lcm", diffusers.FlowMatchLCMScheduler)],
)
def test_the_flow_matching_samplers_take_the_shift_as_it_is(name: str, kind: type) -> None:
    scheduler = make_scheduler(name, 6.0)
    assert type(scheduler) is kind
    assert scheduler.config.shift == 6.0 and not scheduler.config.use_dynamic_shifting


@pytest.mark.parametrize(("preset", "last_sigma"), [("full", 0.060), ("dev", 0.035), ("fast", 0.0089)])
def test_the_last_noise_level_of_a_published_setting_is_the_measured_one(preset: str, last_sigma: float) -> None:
    settings = PRESETS[preset]
    scheduler = make_scheduler(settings.scheduler, settings.shift)
    scheduler.set_timesteps(settings.num_steps)
    assert scheduler.sigmas[-2].item() == pytest.approx(last_sigma, rel=0.01)
    assert scheduler.sigmas[-1].item() == 0


def test_every_call_makes_a_scheduler_of_its_own() -> None:
    assert make_scheduler("euler", 3.0) is not make_scheduler("euler", 3.0)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_sampler_is_named_as_renoising_exactly_if_its_step_draws_noise(name: str) -> None:
    scheduler = make_scheduler(name, 3.0)
    scheduler.set_timesteps(4)
    sample = torch.ones(1, 4, 2, 2)
    before = torch.random.get_rng_state()
    scheduler.step(sample, scheduler.timesteps[0], sample, return_dict=False)
    assert (name in RENOISING) == (not torch.equal(before, torch.random.get_rng_state()))


@pytest.mark.parametrize(
    ("name", "num_steps", "shift"),
    [(name, *case) for name in SCHEDULERS for case in ((1, 3.0), (2, 0.01), (50, 100.0))] + [("unipc", 400, 3.0)],
)
def test_every_allowed_number_of_steps_and_shift_can_be_drawn(
    name: str, num_steps: int, shift: float, tiny_pipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """UniPC's timesteps are whole numbers: two that are equal made it begin at its second noise level."""
    from hi_diffusers import CacheConfig, generate

    calls = []

    def toy(latents: torch.Tensor, timesteps: torch.Tensor, **_: object) -> tuple[torch.Tensor]:
        calls.append(timesteps[0].item())
        return (torch.zeros_like(latents),)

    monkeypatch.setattr(tiny_pipe.transformer, "forward", toy)
    options = SamplingOptions("a", seed=1, num_steps=num_steps, shift=shift, scheduler=name, guidance=0.0)
    generate(tiny_pipe, options, CacheConfig.off())
    assert len(calls) == num_steps
