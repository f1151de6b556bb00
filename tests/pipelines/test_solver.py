"""Target solver: every rule is one, it evaluates K times and nothing else, and what was fitted is drawn."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cache_functions import CacheConfig, CalibrationKey, CalibrationShelf, Current, planned_full_steps, settle
from cache_functions.calibration import SolverChoice, calibration_text
from cache_functions.solver import Solver
from hi_diffusers import SamplingOptions, generate, generate_batch
from hi_diffusers.calibrating.lockstep import Lockstep
from hi_diffusers.calibrating.plan import sampler_sigmas
from hi_diffusers.denoising.cached import denoise_with_cache
from hi_diffusers.denoising.rows import solver_of, solver_on
from hi_diffusers.denoising.schedulers import make_scheduler
from hi_diffusers.denoising.steps import Change
from hi_diffusers.engine.generation import denoise_batch, encode_prompts
from hi_diffusers.families.hidream.transformer import HiDreamImageTransformer2DModel
from hi_diffusers.request.drawing import decide
from tests.tiny_folder import OTHER_PROMPT, PROMPT, decibels

NUM_STEPS, GUIDANCE = 12, 3.0
OFF = CacheConfig.off()
STEPS = (0, 3, 6, 9)


def scheduler_of(name: str = "unipc", num_steps: int = NUM_STEPS) -> Any:
    scheduler = make_scheduler(name, 3.0)
    scheduler.set_timesteps(num_steps)
    return scheduler


def options(prompt: str = PROMPT, seed: int = 1, **changes: Any) -> SamplingOptions:
    return SamplingOptions(prompt, seed=seed, **({"num_steps": NUM_STEPS, "guidance": GUIDANCE} | changes))


def written(folder: Path, pipe: Any, *solvers: Solver, **key: Any) -> str:
    """A calibration file of these solvers for `options()`; its path."""
    preset = pipe.preset
    sampler = options(**{name: key[name] for name in ("guidance", "scheduler") if name in key}).resolve(preset)
    content = sampler.sampler(preset).key(pipe.identity.fingerprint, "solver")
    choices = {len(one.full_steps): SolverChoice(one, 40.0, 35.0) for one in solvers}
    path = folder / "solver.json"
    path.write_text(calibration_text(content, None, sampler_sigmas(sampler), choices, {}))
    return str(path)


def solved(path: str, **settings: Any) -> CacheConfig:
    return CacheConfig(**({"target": "solver", "full_steps": len(STEPS), "calibration": path} | settings))


RULES = [
    {"target": "velocity", "max_order": 1, "fresh_threshold": 3},
    {"target": "velocity", "max_order": 2, "schedule": "mask", "mask": (0, 1, 4, 9)},
    {"target": "x0", "basis": "reuse", "max_order": 0, "fresh_threshold": 3},
    {"target": "x0", "basis": "hermite", "schedule": "cosine", "full_steps": 5},
    {"target": "x0", "basis": "newton", "abscissa": "sigma", "max_order": 2, "fresh_threshold": 2},
    {"target": "x0", "basis": "reuse", "schedule": "mask", "mask": (0, 2, 6, 9), "corrector": True},
    {"target": "velocity", "schedule": "mask", "mask": (0, 2, 6, 9), "corrector": True, "corrector_from": 2},
]


@pytest.mark.parametrize("guidance", [0.0, GUIDANCE])
@pytest.mark.parametrize("scheduler", ["unipc", "euler"])
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_every_rule_is_a_solver(
    tiny_pipe: Any, tmp_path: Path, rule: dict[str, Any], scheduler: str, guidance: float
) -> None:
    """Forecasts, the scheduler's steps and the corrector are linear, so one row a full step says all of it."""
    cache = settle(CacheConfig(**rule), NUM_STEPS)
    full_steps = planned_full_steps(cache, NUM_STEPS)
    solver = solver_of(cache, scheduler_of(scheduler), full_steps, guidance)
    path = written(tmp_path, tiny_pipe, solver, guidance=guidance, scheduler=scheduler)
    one = options(guidance=guidance, scheduler=scheduler)
    by_rule = generate(tiny_pipe, one, cache).pixels
    by_solver = generate(tiny_pipe, one, solved(path, full_steps=len(full_steps))).pixels
    assert decibels(by_solver, by_rule) > 90
    uncached = generate(tiny_pipe, one, OFF).pixels
    assert decibels(by_rule, uncached) < 60, "the rule does nothing"


def test_a_solver_on_all_steps_is_the_uncached_run(tiny_pipe: Any, tmp_path: Path) -> None:
    path = written(tmp_path, tiny_pipe, solver_on(scheduler_of(), range(NUM_STEPS), GUIDANCE))
    drawn = generate(tiny_pipe, options(), solved(path, full_steps=NUM_STEPS))
    assert decibels(drawn.pixels, generate(tiny_pipe, options(), OFF).pixels) > 90


@pytest.mark.parametrize("scheduler", ["unipc", "euler"])
def test_a_solver_on_some_steps_is_the_scheduler_with_these_noise_levels(tiny_pipe: Any, scheduler: str) -> None:
    """As drawing fewer steps is, but for which noise levels they have."""
    coarse = scheduler_of(scheduler)
    coarse.sigmas = coarse.sigmas[[*STEPS, NUM_STEPS]]
    coarse.timesteps = coarse.timesteps[list(STEPS)]
    coarse.num_inference_steps = len(STEPS)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    by_scheduler = denoise_with_cache(noise, GaussianFlow(coarse.sigmas.tolist()), coarse, OFF)
    sigmas = scheduler_of(scheduler).sigmas.tolist()
    flow = GaussianFlow([sigmas[step] for step in (*STEPS, NUM_STEPS)])
    solver = solver_on(scheduler_of(scheduler), STEPS, flow.guidance)
    latents, outputs = noise, list[list[Tensor]]()
    for stage in range(len(STEPS)):
        negative, positive = flow.branches(latents, stage, None, Current(NUM_STEPS))
        outputs.append([latents - flow.sigmas[stage] * negative, flow.sigmas[stage] * (negative - positive)])
        share, weights = solver.weights(stage)
        latents = share * latents + sum(
            weight * kept[place] for place in (0, 1) for weight, kept in zip(weights[place], outputs, strict=True)
        )
    torch.testing.assert_close(latents, by_scheduler, rtol=1e-4, atol=1e-5)


class GaussianFlow:
    """A guided flow of two Gaussians: the estimate of each branch is linear in the latents. See `Denoiser`."""

    embeds, guidance = None, GUIDANCE

    def __init__(self, sigmas: list[float]):
        self.sigmas, self.calls = sigmas, list[int]()
        self.means = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(7))

    def condition(self, latents: Tensor) -> None:
        """Nothing is constant."""

    def __call__(self, latents: Tensor, index: int, cache_dic: Any, current: Any) -> Tensor:
        negative, positive = self.branches(latents, index, cache_dic, current)
        return negative + self.guidance * (positive - negative)

    def branches(self, latents: Tensor, index: int, cache_dic: Any, current: Any) -> tuple[Tensor, ...]:
        self.calls.append(index)
        sigma, spread = self.sigmas[index], 0.5
        gain = spread**2 * (1 - sigma) / ((1 - sigma) ** 2 * spread**2 + sigma**2)
        return tuple((latents - mean - gain * (latents - (1 - sigma) * mean)) / max(sigma, 1e-6) for mean in self.means)


class FlowModel:
    """As much of a model as `Lockstep` calls, around a flow."""

    drawing_device = torch.device("cpu")

    def __init__(self, flow: GaussianFlow):
        self.flow = flow

    def draw_noise(self, batch_size: int, width: int, height: int, generator: Any) -> Tensor:
        return torch.cat([torch.randn(1, 4, 8, 8, generator=one) for one in generator])

    def encode(self, *_: Any) -> Any:
        return Nothing()

    def denoiser(self, *_: Any) -> GaussianFlow:
        return self.flow


class Nothing:
    def to(self, device: torch.device) -> "Nothing":
        return self


@pytest.mark.parametrize("full_steps", [(0, 5), (0, 4, 8), STEPS, tuple(range(NUM_STEPS))])
def test_on_a_linear_flow_the_fitted_solver_lands_on_the_uncached_end(
    tiny_pipe: Any, full_steps: tuple[int, ...]
) -> None:
    flow = GaussianFlow(scheduler_of().sigmas.tolist())
    drawings = [decide(tiny_pipe.preset, options(seed=seed), OFF) for seed in range(3)]
    lockstep = Lockstep(FlowModel(flow), drawings, batch_size=2)  # type: ignore[arg-type]
    latents: list[Tensor] = [lockstep.noise]
    denoise_with_cache(lockstep.noise, flow, scheduler_of(), OFF, on_step_end=lambda end: latents.append(end.latents))
    prior = solver_on(scheduler_of(), full_steps, GUIDANCE)
    flow.calls.clear()
    solver, end = lockstep.fit(prior, lambda step: latents[step], ridge=1e-9)
    assert flow.calls == [step for step in full_steps for _ in range(2)], "one evaluation a stage of each batch"
    scale = float(latents[-1].std())
    assert float((lockstep.run(prior) - latents[-1]).abs().max()) > 1e-3 * scale or len(full_steps) == NUM_STEPS
    torch.testing.assert_close(end, latents[-1], rtol=0, atol=2e-4 * scale)
    torch.testing.assert_close(lockstep.run(solver), end, rtol=0, atol=1e-5 * scale)


def test_the_fit_is_the_weighted_least_squares_of_the_states_that_it_reaches(tiny_pipe: Any) -> None:
    """Its own errors are seen by the later stages: the second stage starts where the first one ended."""
    drawings = [decide(tiny_pipe.preset, options(seed=seed), OFF) for seed in range(2)]
    lockstep = Lockstep(tiny_pipe, drawings, batch_size=2)
    latents: list[Tensor] = [lockstep.noise]
    embeds = encode_prompts(tiny_pipe, [one.options for one in drawings])
    denoise_batch(tiny_pipe, drawings, embeds, lambda end: latents.append(end.latents))
    prior = solver_on(scheduler_of(), STEPS, GUIDANCE)
    solver, end = lockstep.fit(prior, lambda step: latents[step], ridge=1e-3)
    assert float((end - latents[-1]).square().mean()) < float((lockstep.run(prior) - latents[-1]).square().mean())
    torch.testing.assert_close(lockstep.run(solver), end)


def test_a_solver_evaluates_k_times_and_is_three_lines(
    tiny_pipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    solver = _random_solver()
    path = written(tmp_path, tiny_pipe, solver)
    calls: list[int] = []
    forward = HiDreamImageTransformer2DModel.forward
    monkeypatch.setattr(
        HiDreamImageTransformer2DModel, "forward", lambda *args, **kwargs: calls.append(1) or forward(*args, **kwargs)
    )
    drawn = generate(tiny_pipe, options(), solved(path))
    assert len(calls) == len(STEPS)
    resolved = options().resolve(tiny_pipe.preset)
    scheduler = scheduler_of()
    denoiser = tiny_pipe.denoiser(encode_prompts(tiny_pipe, [resolved]), scheduler, GUIDANCE)
    latents = tiny_pipe.draw_noise(1, 64, 64, [torch.Generator().manual_seed(1)])
    denoiser.condition(latents)
    firsts, seconds = [], []
    for step, row in zip(STEPS, solver.rows, strict=True):
        sigma = float(scheduler.sigmas[step])
        with torch.no_grad():
            negative, positive = denoiser.branches(latents, step, None, Current(NUM_STEPS))
        firsts.append(latents - sigma * negative)
        seconds.append(-sigma * (positive - negative))
        latents = sum(weight * one for weight, one in zip(row, [latents, *firsts, *seconds], strict=True))
    by_hand = tiny_pipe.decode(latents)[0]
    assert decibels(drawn.pixels, by_hand) > 90


def _random_solver() -> Solver:
    """Near the rule of fewer steps, and different from it in every coefficient."""
    generator = torch.Generator().manual_seed(5)
    base = solver_on(scheduler_of(), STEPS, GUIDANCE)
    return Solver.of(
        STEPS, [(torch.tensor(row) + 0.01 * torch.randn(len(row), generator=generator)).tolist() for row in base.rows]
    )


def test_the_trace_has_every_step_and_previews_are_of_the_last_full_one(tiny_pipe: Any, tmp_path: Path) -> None:
    path = written(tmp_path, tiny_pipe, _random_solver())
    previews: list[np.ndarray] = []
    drawn = generate(
        tiny_pipe,
        options(),
        solved(path),
        on_step=lambda record, preview: previews.append(np.asarray(preview())) or True,
    )
    kinds = [record.kind for record in drawn.trace]
    assert [step for step, kind in enumerate(kinds) if kind == "full"] == list(STEPS)
    assert [record.index for record in drawn.trace] == list(range(NUM_STEPS))
    assert [record.evaluations for record in drawn.trace] == [2 if step in STEPS else 0 for step in range(NUM_STEPS)]
    latent = 4 * 16 * 16 * tiny_pipe.transformer.config.in_channels // 4
    assert drawn.trace[-1].cache_bytes % latent == 0
    assert [bytes_ // drawn.trace[0].cache_bytes for bytes_ in (r.cache_bytes for r in drawn.trace[::3])] == [
        1,
        2,
        3,
        4,
    ]
    assert all((previews[step] == previews[step - step % 3]).all() for step in range(NUM_STEPS))
    assert (previews[0] != previews[3]).any()


def test_a_drawing_can_be_stopped_and_leaves_nothing(tiny_pipe: Any, tmp_path: Path) -> None:
    from hi_diffusers.denoising.steps import Interrupted

    path = written(tmp_path, tiny_pipe, _random_solver())
    before = generate(tiny_pipe, options(), solved(path)).pixels
    with pytest.raises(Interrupted, match="stopped after step 5 of 12"):
        generate(tiny_pipe, options(), solved(path), on_step=lambda record, preview: record.index < 4)
    assert (generate(tiny_pipe, options(), solved(path)).pixels == before).all()


def test_pictures_of_a_batch_are_those_drawn_alone(tiny_pipe: Any, tmp_path: Path) -> None:
    path = written(tmp_path, tiny_pipe, _random_solver())
    both = [options(seed=1), options(OTHER_PROMPT, seed=2)]
    for together, one in zip(generate_batch(tiny_pipe, both, solved(path)), both, strict=True):
        alone = generate(tiny_pipe, one, solved(path)).pixels
        assert decibels(together.pixels, alone) > 90


def test_what_the_metadata_says_draws_the_same_picture(tiny_pipe: Any, tmp_path: Path) -> None:
    path = written(tmp_path, tiny_pipe, _random_solver())
    drawn = generate(tiny_pipe, options(), solved(path))
    settings = drawn.metadata["cache"]
    assert settings["mask"] == list(STEPS) and settings["calibration"].startswith("sha256:")
    assert "basis" not in settings, "a solver has no basis"
    shelf = CalibrationShelf(tiny_pipe.identity.fingerprint, (tmp_path,))
    again = decide(tiny_pipe.preset, options(), CacheConfig(**settings), shelf).cache
    assert (generate(tiny_pipe, options(), again).pixels == drawn.pixels).all()


def test_kept_outputs_can_lie_in_fewer_bits_and_in_host_memory(tiny_pipe: Any, tmp_path: Path) -> None:
    path = written(tmp_path, tiny_pipe, _random_solver())
    plain, packed, elsewhere = (
        generate(tiny_pipe, options(), solved(path, **more))
        for more in ({}, {"anchor_dtype": "bf16"}, {"anchor_device": "cpu"})
    )
    assert packed.trace[-1].cache_bytes == plain.trace[-1].cache_bytes // 2
    assert (elsewhere.pixels == plain.pixels).all()
    assert decibels(packed.pixels, plain.pixels) > 30


def test_the_best_is_the_solver_where_it_is_calibrated_and_the_rule_elsewhere(tiny_pipe: Any, tmp_path: Path) -> None:
    written(tmp_path, tiny_pipe, _random_solver())
    shelf = CalibrationShelf(tiny_pipe.identity.fingerprint, (tmp_path,))
    found = decide(tiny_pipe.preset, options(), CacheConfig.best(4), shelf)
    assert (found.cache.target, found.cache.mask, found.notices) == ("solver", STEPS, ())
    other = decide(tiny_pipe.preset, options(), CacheConfig.best(6), shelf)
    assert (other.cache.target, other.cache.basis) == ("velocity", "taylor")
    assert "its solver is fitted for 4 full steps, not 6" in other.notices[0]


REFUSED = [
    ({"basis": "reuse"}, "basis has no effect with target solver"),
    ({"max_order": 2}, "max_order has no effect with target solver"),
    ({"corrector": True}, "corrector has no effect with target solver"),
    ({"fresh_threshold": 4, "full_steps": None}, "fresh_threshold has no effect with target solver"),
    ({"schedule": "cosine"}, "schedule cosine has no effect with target solver"),
    ({"full_steps": 5}, "full_steps must be one of 4, for which the solver is fitted, got 5"),
    ({"mask": (0, 1, 2, 3)}, r"mask must be \[0, 3, 6, 9\] with this calibration's solver, got \[0, 1, 2, 3\]"),
]


@pytest.mark.parametrize(("settings", "message"), REFUSED)
def test_settings_of_other_targets_are_refused(
    tiny_pipe: Any, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    path = written(tmp_path, tiny_pipe, _random_solver())
    with pytest.raises(ValueError, match=message):
        decide(tiny_pipe.preset, options(), solved(path, **settings))


def test_a_sampler_that_adds_noise_is_refused_and_told_why(tiny_pipe: Any, tmp_path: Path) -> None:
    path = written(tmp_path, tiny_pipe, _random_solver())
    with pytest.raises(ValueError, match=r"target must be x0 with the lcm scheduler.*noise that is drawn on the way"):
        decide(tiny_pipe.preset, options(scheduler="lcm", guidance=0.0), solved(path))


def test_another_guidance_is_refused_by_the_field(tiny_pipe: Any, tmp_path: Path) -> None:
    path = written(tmp_path, tiny_pipe, _random_solver())
    with pytest.raises(ValueError, match=r"calibration does not fit: its guidance is 3\.0, not 4\.0"):
        decide(tiny_pipe.preset, options(guidance=4.0), solved(path))


def test_without_a_calibration_it_says_how_to_make_one(tiny_pipe: Any) -> None:
    with pytest.raises(ValueError, match=r"target solver needs a calibration for .*: run calibrate\.py"):
        decide(tiny_pipe.preset, options(), CacheConfig(target="solver"))


def test_latents_may_be_changed_while_it_draws_and_prompts_may_not(tiny_pipe: Any, tmp_path: Path) -> None:
    path = written(tmp_path, tiny_pipe, _random_solver())
    drawing = decide(tiny_pipe.preset, options(), solved(path))
    embeds = encode_prompts(tiny_pipe, [drawing.options])
    plain = denoise_batch(tiny_pipe, [drawing], embeds)
    moved = denoise_batch(tiny_pipe, [drawing], embeds, lambda end: Change(latents=end.latents * 1.01))
    assert not torch.equal(plain, moved)
    for change in (Change(embeds=embeds), Change(guidance=0.0)):
        with pytest.raises(ValueError, match="neither may change while it draws: take target velocity"):
            denoise_batch(tiny_pipe, [drawing], embeds, lambda end, change=change: change)


def test_a_callback_of_diffusers_may_look_on(tiny_pipe: Any, tmp_path: Path) -> None:
    """It is handed the guidance back with every step, which changes nothing."""
    path = written(tmp_path, tiny_pipe, _random_solver())
    seen: list[int] = []

    def callback(pipe: Any, index: int, timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        seen.append(index)
        return tensors

    def draw(callback: Any) -> Any:
        return tiny_pipe(
            PROMPT,
            num_inference_steps=NUM_STEPS,
            guidance_scale=GUIDANCE,
            generator=torch.Generator().manual_seed(1),
            output_type="np",
            cache=solved(path),
            callback_on_step_end=callback,
            callback_on_step_end_tensor_inputs=["latents", "prompt_embeds_t5"],
        ).images[0]

    assert (draw(callback) == draw(None)).all() and seen == list(range(NUM_STEPS))

    def ends_guidance(pipe: Any, index: int, timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        pipe._guidance_scale = 0.0
        return tensors

    with pytest.raises(ValueError, match="neither may change while it draws"):
        draw(ends_guidance)


DAMAGED = [
    (lambda choice: choice["solver"]["rows"].pop(), "must each have a row of coefficients"),
    (lambda choice: choice["solver"]["rows"][1].pop(), "row 1 of its coefficients must hold 5 numbers"),
    (lambda choice: choice["solver"]["rows"][2].__setitem__(0, "1"), "row 2 of its coefficients must hold 7 numbers"),
    (lambda choice: choice["solver"]["full_steps"].__setitem__(1, 0), "its full steps must increase from 0 on"),
    (lambda choice: choice["solver"]["full_steps"].__setitem__(3, 12), "and be below 12"),
    (lambda choice: choice.__setitem__("median_db", None), "invalid PSNR"),
    (lambda choice: choice.__setitem__("extra", 1), "unexpected keyword argument 'extra'"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGED)
def test_a_damaged_file_is_refused_by_what_is_wrong(tiny_pipe: Any, tmp_path: Path, damage: Any, message: str) -> None:
    import json

    path = Path(written(tmp_path, tiny_pipe, _random_solver()))
    content = json.loads(path.read_text())
    damage(content["choices"]["4"])
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="is not a calibration file") as refusal:
        decide(tiny_pipe.preset, options(), solved(str(path)))
    assert message in str(refusal.value)


def test_a_file_of_another_guidance_than_its_rows_is_refused(tiny_pipe: Any, tmp_path: Path) -> None:
    path = written(tmp_path, tiny_pipe, solver_on(scheduler_of(), STEPS, 0.0))
    with pytest.raises(ValueError, match="has other full steps or outputs than its key says"):
        decide(tiny_pipe.preset, options(), solved(path))


def test_a_key_can_be_compared() -> None:
    key = CalibrationKey("m", "unipc", NUM_STEPS, 3.0, GUIDANCE, "solver")
    assert key.difference(replace(key, target="x0")) == "its target is solver, not x0"
