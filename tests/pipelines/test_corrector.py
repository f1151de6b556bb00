"""The corrector: an interval is redone, and nothing else changes."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cache_functions import CacheConfig
from forecasting import Corrector, Levels
from hi_diffusers import SamplingOptions, generate
from hi_diffusers.denoising.schedulers import make_scheduler
from tests.tiny_folder import PROMPT, Calls, decibels

MASK = (0, 2, 6, 9)
NUM_STEPS = 12
OFF = CacheConfig.off()


def corrected(**settings: Any) -> CacheConfig:
    return CacheConfig(**({"target": "x0", "basis": "reuse", "schedule": "mask", "mask": MASK} | settings))


@dataclass
class PiecewiseFlow:
    """A flow whose x0 does not depend on x and is piecewise linear in the step between the full steps."""

    knots: Tensor

    @classmethod
    def draw(cls) -> "PiecewiseFlow":
        return cls(torch.randn(len(MASK) + 1, 1, 2, 4, 4, generator=torch.Generator().manual_seed(0)))

    def x0(self, step: int) -> Tensor:
        marks = [*MASK, NUM_STEPS]
        place = max(i for i, mark in enumerate(marks[:-1]) if mark <= step)
        share = (step - marks[place]) / (marks[place + 1] - marks[place])
        return torch.lerp(self.knots[place], self.knots[place + 1], share)


def solve(flow: PiecewiseFlow, name: str, corrects: bool | None) -> Tensor:
    """Every step evaluated (None), or the newest anchor reused without and with the corrector."""
    scheduler = make_scheduler(name, 3.0)
    scheduler.set_timesteps(NUM_STEPS)
    scheduler.set_begin_index(0)
    sigmas = scheduler.sigmas.tolist()
    corrector = Corrector(scheduler, Levels.flow(sigmas))
    latents = torch.randn(1, 2, 4, 4, generator=torch.Generator().manual_seed(1))
    states = []

    def take(velocity: Tensor, step: int, latents: Tensor) -> Tensor:
        return scheduler.step(velocity, scheduler.timesteps[step], latents, return_dict=False)[0]

    for step in range(NUM_STEPS):
        states.append(latents)
        newest = max(mark for mark in MASK if mark <= step)
        x0 = flow.x0(step if corrects is None else newest)
        velocity = (latents - x0) / sigmas[step]
        if corrects and step in MASK:
            latents, velocity = corrector.at_full_step(step, latents, x0, velocity, take)
            states[-1] = latents
        latents = take(velocity, step, latents)
    return torch.cat([states[mark] for mark in MASK])


@pytest.mark.parametrize("name", ["euler", "unipc"])
def test_where_x0_is_piecewise_linear_the_corrector_lands_on_the_uncached_result(name: str) -> None:
    """At every full step: what comes after the last one has no end, and stays as it was forecast."""
    flow = PiecewiseFlow.draw()
    exact, reused, redone = (solve(flow, name, corrects) for corrects in (None, False, True))
    assert decibels(reused, exact) < 30, "the forecasts are exact already: the test shows nothing"
    assert decibels(redone, exact) > 100


@pytest.mark.parametrize("target", ["x0", "velocity"])
@pytest.mark.parametrize("scheduler", ["unipc", "euler"])
def test_the_corrector_changes_the_picture_and_evaluates_the_model_no_more_often(
    tiny_pipe, monkeypatch: pytest.MonkeyPatch, target: str, scheduler: str
) -> None:
    counted = Calls(tiny_pipe.transformer.forward)
    monkeypatch.setattr(tiny_pipe.transformer, "forward", counted)
    options = SamplingOptions(PROMPT, seed=7, num_steps=NUM_STEPS, guidance=2.0, scheduler=scheduler)
    plain = generate(tiny_pipe, options, corrected(target=target))
    calls, counted.count = counted.count, 0
    redone = generate(tiny_pipe, options, corrected(target=target, corrector=True))
    assert counted.count == calls == len(MASK)
    assert not np.array_equal(plain.pixels, redone.pixels)
    assert [record.kind for record in plain.trace] == [record.kind for record in redone.trace]


def test_a_schedule_of_full_steps_only_is_unchanged(tiny_pipe) -> None:
    options = SamplingOptions(PROMPT, seed=7, num_steps=5, guidance=2.0)
    every = corrected(mask=tuple(range(5)), corrector=True)
    assert np.array_equal(generate(tiny_pipe, options, every).pixels, generate(tiny_pipe, options, OFF).pixels)


def test_intervals_before_corrector_from_stay_as_they_are(tiny_pipe) -> None:
    options = SamplingOptions(PROMPT, seed=7, num_steps=NUM_STEPS, guidance=0.0)
    plain = generate(tiny_pipe, options, corrected())
    pictures = {
        first: generate(tiny_pipe, options, corrected(corrector=True, corrector_from=first)) for first in (0, 2, 3, 7)
    }
    assert np.array_equal(pictures[7].pixels, plain.pixels), "the last interval to be redone begins at 6"
    assert not np.array_equal(pictures[3].pixels, plain.pixels)
    assert not np.array_equal(pictures[0].pixels, pictures[2].pixels), "from 2 on the interval of step 0 is left alone"
    assert not np.array_equal(pictures[2].pixels, pictures[3].pixels)


def test_latents_that_somebody_else_moved_are_not_put_back(tiny_pipe) -> None:
    """A callback's change inside an interval would be undone if the interval were redone from its start."""
    moved: list[Tensor] = []

    def move(pipe: Any, step: int, timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        if step == 3:
            moved.append(tensors["latents"] * 0)
            return {"latents": moved[0]}
        return {}

    def draw(start: float, cache: CacheConfig) -> Tensor:
        latents = torch.full((1, 4, 16, 16), start)
        return tiny_pipe(
            PROMPT,
            num_inference_steps=NUM_STEPS,
            guidance_scale=0.0,
            latents=latents,
            output_type="latent",
            callback_on_step_end=move,
            cache=cache,
            max_sequence_length=32,
        ).images

    # x0 of the anchors differs with the start, so only that the latents were moved at all can be compared
    tiny_pipe.scheduler.set_timesteps(NUM_STEPS)
    redone = draw(1.0, corrected(corrector=True, mask=(0, 6)))
    plain = draw(1.0, corrected(mask=(0, 6)))
    assert torch.equal(redone, plain), "the only interval was touched, so there is nothing to redo"
