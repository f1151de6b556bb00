"""calibrate.py: prompts become a file that the other scripts find."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cache_functions import CacheConfig, Calibration
from hi_diffusers import SamplingOptions, generate, load_pipeline
from hi_diffusers.calibrating.trials import Candidate, Trials
from hi_diffusers.calibrating.uncached import UncachedPictures
from hi_diffusers.commands import calibrate
from hi_diffusers.families.hidream.pipeline import HiDreamImagePipeline
from hi_diffusers.families.table import PRESETS
from hi_diffusers.pictures.metrics import Score
from hi_diffusers.runs.prompt_files import PromptFile
from hi_diffusers.weights.identity import fingerprint
from tests.tiny_folder import OTHER_PROMPT, PROMPT, visible_files
from training import scenes
from training.outside import outside_prompts


def file_name(model: Path, target: str, sampler: str = "unipc6-guidance2") -> str:
    return f"nano-{fingerprint(model / 'transformer')[:8]}-{sampler}-{target}.json"


@pytest.fixture
def run(tiny_folder: Path, tmp_path: Path) -> Callable[..., int]:
    """Run the script on the tiny model with three prompts and six steps."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(f"{PROMPT}\n\n{OTHER_PROMPT}\na large red sun on a white background\n", encoding="utf-8")

    def run(*argv: str) -> int:
        few = {
            "--model_path": tiny_folder,
            "--prompt_file": prompts,
            "--num_held_out": 1,
            "--num_steps": 6,
            "--guidance": 2,
            "--batch_size": 2,
            "--full_steps": 3,
            "--device": "cpu",
            "--calibration_dir": tmp_path / "calibrations",
        }
        given = [str(part) for flag in few.items() if flag[0] not in argv for part in flag]
        return calibrate.main([*argv, *given])

    return run


@pytest.fixture(scope="module")
def folder(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one run wrote, that several tests look at."""
    place = tmp_path_factory.mktemp("calibrated")
    prompts = place / "prompts.txt"
    prompts.write_text(f"{PROMPT}\n{OTHER_PROMPT}\na large red sun on a white background\n", encoding="utf-8")
    argv = f"--num_held_out 1 --num_steps 6 --guidance 2 --batch_size 2 --full_steps 3,2 --device cpu --seed 5 \
        --model_path {tiny_folder} --prompt_file {prompts} --calibration_dir {place / 'out'}"
    for target in ("velocity", "x0"):
        assert calibrate.main([*argv.split(), "--target", target]) == 0
    return place / "out"


def test_each_target_gets_a_file_and_nothing_else_is_left(folder: Path, tiny_folder: Path) -> None:
    assert visible_files(folder) == {file_name(tiny_folder, target) for target in ("velocity", "x0")}


def test_the_file_holds_the_matrix_the_key_and_a_choice_per_budget(folder: Path, tiny_folder: Path) -> None:
    calibration = Calibration.read(folder / file_name(tiny_folder, "x0"))
    key = calibration.key
    assert (key.scheduler, key.num_steps, key.shift, key.guidance, key.target) == ("unipc", 6, 3.0, 2.0, "x0")
    assert len(key.model) == 16
    assert sorted(calibration.choices) == [2, 3]
    for full_steps, choice in calibration.choices.items():
        assert len(choice.full_steps) == full_steps and choice.full_steps[0] == 0
        assert 0 < choice.p10_db <= choice.median_db
    assert torch.equal(calibration.gram, calibration.gram.T)
    assert torch.linalg.eigvalsh(calibration.gram).min() > -1e-9


def test_the_matrix_is_the_mean_product_of_the_target_over_the_fitted_pictures(
    folder: Path, tiny_folder: Path, tiny_pipe: Any
) -> None:
    """Drawn again here, by hand: the first two prompts with seeds 5 and 6."""
    features: dict[str, list[torch.Tensor]] = {"x0": [], "velocity": []}
    for seed, prompt in ((5, PROMPT), (6, OTHER_PROMPT)):
        x0, velocity = steps_of(tiny_pipe, SamplingOptions(prompt, seed=seed, num_steps=6, guidance=2.0))
        features["x0"].append(x0)
        features["velocity"].append(velocity)
    for target, values in features.items():
        gram = torch.stack([one @ one.T / one.shape[1] for one in values]).mean(0)
        calibration = Calibration.read(folder / file_name(tiny_folder, target))
        torch.testing.assert_close(calibration.gram, gram, rtol=1e-4, atol=1e-4)


def steps_of(pipe: HiDreamImagePipeline, options: SamplingOptions) -> tuple[torch.Tensor, torch.Tensor]:
    """x0 and velocity of every step, [S, elements], float64, as a scheduler would be given them."""
    from hi_diffusers.denoising.schedulers import make_scheduler
    from hi_diffusers.engine.generation import denoise_batch, encode_prompts
    from hi_diffusers.request.drawing import decide

    drawings = [decide(pipe.preset, options, CacheConfig.off())]
    resolved = [drawings[0].options]
    scheduler = make_scheduler("unipc", 3.0)
    scheduler.set_timesteps(6)
    x0: list[torch.Tensor] = []
    latents = [pipe.draw_noise(1, 64, 64, [torch.Generator().manual_seed(resolved[0].seed)])]

    def observe(end: Any) -> None:
        x0.append(end.x0)
        latents.append(end.latents)

    denoise_batch(pipe, drawings, encode_prompts(pipe, resolved), observe)
    velocity = [(x - estimate) / sigma for x, estimate, sigma in zip(latents, x0, scheduler.sigmas, strict=False)]
    return tuple(torch.stack(values).flatten(1).double() for values in (x0, velocity))


def test_the_file_is_found_and_its_choice_drawn_by_default(folder: Path, tiny_folder: Path) -> None:
    pipe = load_pipeline("nano", device="cpu", model_path=tiny_folder, calibration_dir=folder)
    drawn = generate(pipe, SamplingOptions(PROMPT, seed=1, num_steps=6, guidance=2.0), CacheConfig.best(3))
    cache = drawn.metadata["cache"]
    choice = Calibration.read(folder / file_name(tiny_folder, cache["target"])).choices[3]
    assert tuple(cache["mask"]) == choice.full_steps and cache["basis"] == "learned"
    assert [record.index for record in drawn.trace if record.kind == "full"] == list(choice.full_steps)


def test_what_was_chosen_is_the_best_of_what_was_drawn(
    run: Callable[..., int], tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores: dict[Candidate, float] = {}
    original = Trials.score

    def score(self: Any, candidate: Any, calibration: Calibration, num_pictures: int | None = None) -> Score:
        result = original(self, candidate, calibration, num_pictures)
        scores[candidate] = result.merit
        return result

    monkeypatch.setattr(Trials, "score", score)
    assert run("--target", "x0") == 0
    choice = Calibration.read(tmp_path / "calibrations" / file_name(tiny_folder, "x0")).choices[3]
    settings = (choice.full_steps, choice.prior, choice.ridge, choice.corrector, choice.corrector_from)
    assert scores[Candidate(*settings)] == max(scores.values())
    assert {one.corrector for one in scores} == {False, True}
    assert {one.prior for one in scores} == {"reuse", "taylor"}


def test_an_interrupted_run_goes_on_and_ends_with_the_same_file(
    run: Callable[..., int], tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run("--target", "x0") == 0
    path = tmp_path / "calibrations" / file_name(tiny_folder, "x0")
    whole = path.read_bytes()
    path.unlink()
    original, drawn = Trials._draw, []

    def interrupt(self: Any, cache: CacheConfig, *which: int) -> Any:
        drawn.append(cache)
        if len(drawn) == 3:
            raise KeyboardInterrupt
        return original(self, cache, *which)

    with monkeypatch.context() as patch:
        patch.setattr(Trials, "_draw", interrupt)
        assert run("--target", "x0") == 130
    assert not path.exists()
    with monkeypatch.context() as patch:
        patch.setattr(UncachedPictures, "draw", lambda *_: pytest.fail("an uncached picture was drawn twice"))
        assert run("--target", "x0") == 0
    assert path.read_bytes() == whole


def test_unfinished_work_of_other_settings_is_refused(
    run: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Trials, "score", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert run("--target", "x0") == 130
    assert run("--target", "x0", "--seed", "9") == run("--target", "velocity") == 2
    assert (
        "holds unfinished work of a run with other settings: finish that run, or delete the folder"
        in capsys.readouterr().err
    )


def test_a_sampler_that_adds_noise_gets_x0_without_the_corrector(
    run: Callable[..., int], tiny_folder: Path, tmp_path: Path
) -> None:
    assert run("--scheduler", "lcm", "--guidance", "0") == 0
    (path,) = (tmp_path / "calibrations").iterdir()
    assert path.name == file_name(tiny_folder, "x0", "lcm6-guidance0")
    assert not Calibration.read(path).choices[3].corrector


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--full_steps", "7"), "full_steps must lie between 1 and the 6 steps, got 7"),
        (("--full_steps", "a"), "full_steps must be whole numbers separated by commas, got 'a'"),
        (("--num_held_out", "3"), "num_held_out must be below the 3 prompts, got 3"),
        (("--num_steps", "129"), "num_steps must be at most 128 to be calibrated, got 129"),
        (("--num_prompts", "0"), "num_prompts must be at least 1, got 0"),
        (("--prompt_file", "nowhere.txt"), "prompt_file must be a file, got nowhere.txt"),
        (("--scheduler", "lcm", "--target", "velocity"), "target must be x0 with the lcm scheduler"),
        (("--model_type", "full", "--model_path", "nowhere"), "there is no such folder"),
    ],
)
def test_what_cannot_work_is_refused_before_the_model_is_read(
    run: Callable[..., int], capsys: pytest.CaptureFixture[str], argv: tuple[str, ...], message: str
) -> None:
    assert run(*argv) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1


def test_the_tenth_percentile_and_infinite_figures_of_a_score() -> None:
    score = Score.of([10.0, 20.0, 30.0, 40.0, float("inf")])
    assert score == Score(30.0, pytest.approx(np.percentile([10, 20, 30, 40, 100], 10)), 40.0)


@pytest.mark.parametrize("name", ["nano", "full"])
def test_the_bundled_prompts_are_32_or_more_all_different(name: str) -> None:
    prompts = [line.prompt for line in PromptFile(PRESETS[name].calibration_prompts)]
    assert len(prompts) >= 32 and len(set(prompts)) == len(prompts)


def test_nano_is_calibrated_with_scenes_that_are_not_held_out() -> None:
    """Held-out scenes are what quality is measured on.

    Every other prompt is of no scene, since a user's seldom are: words in random order fit, and sentences choose.
    """
    prompts = [line.prompt for line in PromptFile(PRESETS["nano"].calibration_prompts)]
    for prompt in prompts[::2]:
        assert not scenes.is_held_out(scenes.parse_caption(prompt))
    assert prompts[1:96:2] == outside_prompts(48)
    assert prompts[97::2] == [line.prompt for line in PromptFile(PRESETS["full"].calibration_prompts)]


def test_the_notes_of_unfinished_work_are_json(run: Callable[..., int], tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(Trials, "score", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert run("--target", "x0") == 130
    (work,) = (tmp_path / "calibrations").iterdir()
    assert json.loads((work / "settings.json").read_text())["num_fitted"] == 2


def test_a_line_with_settings_of_its_own_is_refused(
    run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "own.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b", "guidance": 7}\n', encoding="utf-8")
    assert run("--prompt_file", str(tmp_path / "own.jsonl")) == 2
    assert "line 2: the line must not set guidance" in capsys.readouterr().err


def test_another_shift_gets_a_file_of_its_own(run: Callable[..., int], tiny_folder: Path, tmp_path: Path) -> None:
    assert run("--target", "x0") == run("--target", "x0", "--shift", "5") == 0
    names = {file_name(tiny_folder, "x0"), file_name(tiny_folder, "x0", "unipc6-shift5-guidance2")}
    assert visible_files(tmp_path / "calibrations") == names
