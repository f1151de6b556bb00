"""calibrate.py for target solver: a file whose solvers are drawn, and unfinished work that goes on."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cache_functions import CacheConfig, Calibration
from cache_functions.calibration import SolverChoice
from cache_functions.config import QUALITIES
from hi_diffusers import SamplingOptions, generate, load_pipeline
from hi_diffusers.calibrating.lockstep import Lockstep
from hi_diffusers.calibrating.solving import SolverSearch, schedules
from hi_diffusers.calibrating.uncached import UncachedRuns
from hi_diffusers.commands import calibrate
from hi_diffusers.pictures.metrics import Score, psnr
from hi_diffusers.weights.identity import fingerprint
from tests.tiny_folder import OTHER_PROMPT, PROMPT, visible_files

NUM_STEPS = 8
PROMPTS = (PROMPT, OTHER_PROMPT, "a large red sun on a white background", "red of the, two")


def file_name(model: Path, guidance: int = 3) -> str:
    return f"nano-{fingerprint(model / 'transformer')[:8]}-unipc{NUM_STEPS}-guidance{guidance}-solver.json"


@pytest.fixture
def run(tiny_folder: Path, tmp_path: Path) -> Callable[..., int]:
    """Run the script on the tiny model with four prompts and eight steps."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS), encoding="utf-8")
    few = f"--model_path {tiny_folder} --prompt_file {prompts} --num_held_out 2 --num_steps {NUM_STEPS} --guidance 3 \
        --batch_size 2 --full_steps 4,2 --device cpu --calibration_dir {tmp_path / 'calibrations'}"
    return lambda *argv: calibrate.main([*few.split(), *argv])


@pytest.fixture(scope="module")
def made(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a calibration that several tests look at."""
    place = tmp_path_factory.mktemp("solvers")
    (place / "prompts.txt").write_text("\n".join(PROMPTS), encoding="utf-8")
    argv = f"--model_path {tiny_folder} --prompt_file {place / 'prompts.txt'} --num_held_out 2 --num_steps {NUM_STEPS} \
        --guidance 3 --batch_size 2 --full_steps 4,2 --device cpu --calibration_dir {place / 'out'}"
    assert calibrate.main(argv.split()) == 0
    return place / "out"


def test_the_solver_is_what_is_calibrated_and_its_file_is_all_that_is_left(made: Path, tiny_folder: Path) -> None:
    assert visible_files(made) == {file_name(tiny_folder)}
    calibration = Calibration.read(made / file_name(tiny_folder))
    assert calibration.key.target == "solver" and calibration.gram is None
    assert sorted(calibration.choices) == [2, 4]
    for budget, choice in calibration.choices.items():
        assert isinstance(choice, SolverChoice)
        assert len(choice.solver.full_steps) == budget and choice.solver.num_outputs == 2


def test_its_figures_are_those_of_its_pictures(made: Path, tiny_folder: Path) -> None:
    """Drawn again with the solver by default: the two prompts that chose, whose seeds are 2 and 3."""
    pipe = load_pipeline("nano", device="cpu", model_path=tiny_folder, calibration_dir=made)
    found = []
    for seed in (2, 3):
        options = SamplingOptions(PROMPTS[seed], seed=seed, num_steps=NUM_STEPS, guidance=3.0)
        drawn = generate(pipe, options, CacheConfig.best(4))
        assert drawn.metadata["cache"]["target"] == "solver"
        found.append(psnr(drawn.pixels, generate(pipe, options, CacheConfig.off()).pixels))
    choice = Calibration.read(made / file_name(tiny_folder)).choices[4]
    score = Score.of(found)
    assert (choice.median_db, choice.p10_db) == (
        pytest.approx(score.median, abs=0.2),
        pytest.approx(score.p10, abs=0.2),
    )


def test_a_quality_is_drawn_with_the_full_steps_that_reach_it(
    made: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = load_pipeline("nano", device="cpu", model_path=tiny_folder, calibration_dir=made)
    choices = Calibration.read(made / file_name(tiny_folder)).choices
    low, high = sorted(choice.p10_db for choice in choices.values())
    assert low < high
    for name, least in (("high", high), ("medium", low), ("draft", -1.0)):
        monkeypatch.setitem(QUALITIES, name, least)
    options = SamplingOptions(PROMPT, seed=1, num_steps=NUM_STEPS, guidance=3.0)
    for quality, full_steps in (("high", 4), ("medium", 2), ("draft", 2)):
        drawn = generate(pipe, options, CacheConfig.best(quality=quality))
        assert drawn.metadata["cache"]["full_steps"] == full_steps


def test_the_best_on_the_choosing_prompts_is_taken_be_it_a_fixed_rule(
    run: Callable[..., int], tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores: list[tuple[Any, Score]] = []
    original = SolverSearch.drawn

    def drawn(self: Any, solver: Any) -> Score:
        score = original(self, solver)
        scores.append((solver, score))
        return score

    monkeypatch.setattr(SolverSearch, "drawn", drawn)
    assert run("--full_steps", "4") == 0
    choice = Calibration.read(tmp_path / "calibrations" / file_name(tiny_folder)).choices[4]
    assert len(scores) == 3, "the fitted one, fewer steps, and the rule that needs no calibration"
    best = max(scores, key=lambda one: one[1].mean)
    assert choice.solver == best[0]


def test_the_number_of_evaluations_is_told_before_the_first_one_and_holds(
    run: Callable[..., int], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluated: list[int] = []
    original = Lockstep.evaluate

    def evaluate(self: Any, latents: Any, step: int) -> Any:
        evaluated.append(len(latents))
        return original(self, latents, step)

    monkeypatch.setattr(Lockstep, "evaluate", evaluate)
    assert run("--full_steps", "4") == 0
    tried = len(schedules(NUM_STEPS, 4))
    most = 4 * (tried * 2 + 3 * 2)
    told = f"{4 * NUM_STEPS} evaluations of the network uncached, and at most {most} to fit and to choose"
    assert told in capsys.readouterr().err
    assert sum(evaluated) == most


def test_an_interrupted_run_goes_on_and_ends_with_the_same_file(
    run: Callable[..., int], tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run() == 0
    path = tmp_path / "calibrations" / file_name(tiny_folder)
    whole = path.read_bytes()
    path.unlink()
    original, calls = Lockstep.fit, list[int]()

    def interrupt(self: Any, *arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Lockstep, "fit", interrupt)
        assert run() == 130
    assert not path.exists()
    fitted: list[Any] = []
    with monkeypatch.context() as patch:
        patch.setattr(UncachedRuns, "draw", lambda *_: pytest.fail("an uncached picture was drawn twice"))
        patch.setattr(Lockstep, "fit", lambda *args: fitted.append(args[1].full_steps) or original(*args))
        assert run() == 0
    assert path.read_bytes() == whole
    assert fitted and len(fitted) == sum(len(schedules(NUM_STEPS, budget)) for budget in (4, 2)) - 2


def test_work_of_another_target_is_not_gone_on_with(
    run: Callable[..., int], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Lockstep, "fit", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert run() == 130
    assert run("--target", "x0") == 2
    assert "holds unfinished work of a run with other settings" in capsys.readouterr().err


def test_without_guidance_there_is_one_output_a_step(
    run: Callable[..., int], tiny_folder: Path, tmp_path: Path
) -> None:
    assert run("--guidance", "0", "--full_steps", "3") == 0
    choice = Calibration.read(tmp_path / "calibrations" / file_name(tiny_folder, 0)).choices[3]
    assert [len(row) for row in choice.solver.rows] == [2, 3, 4]


def test_an_unreadable_end_of_the_notes_is_cut_off(
    run: Callable[..., int], tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(SolverSearch, "drawn", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert run() == 130
    (notes,) = (tmp_path / "calibrations").glob("*.progress/trials.jsonl")
    first = json.loads(notes.read_text().splitlines()[0])
    assert first["candidate"][0] == "fitted"
    notes.write_text(notes.read_text() + '{"candidate": ["fitted", 0], "full_st')
    assert run() == 0
    assert visible_files(tmp_path / "calibrations") == {file_name(tiny_folder)}


@pytest.mark.parametrize(
    ("num_steps", "full_steps", "expected"),
    [
        (50, 13, (0, 4, 8, 12, 15, 19, 23, 27, 31, 35, 38, 42, 46)),
        (50, 1, (0,)),
        (50, 2, (0, 25)),
        (5, 5, (0, 1, 2, 3, 4)),
        (1, 1, (0,)),
    ],
)
def test_the_first_schedule_is_even_and_ends_as_far_from_the_end(
    num_steps: int, full_steps: int, expected: tuple[int, ...]
) -> None:
    assert schedules(num_steps, full_steps)[0] == expected


@pytest.mark.parametrize("num_steps", [1, 2, 5, 12, 50])
def test_every_budget_has_a_schedule(num_steps: int) -> None:
    for full_steps in range(1, num_steps + 1):
        for steps in schedules(num_steps, full_steps):
            assert len(set(steps)) == full_steps and steps[0] == 0 and max(steps) < num_steps
