"""The benchmark of a solver's fit, on a few prompts."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import solvers
from cache_functions.solver import Solver


@pytest.mark.slow
def test_every_variant_is_fitted_and_drawn(nano_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(solvers, "NUM_FITTED", 3)
    monkeypatch.setattr(solvers, "NUM_DRAWN", 2)
    assert solvers.main(["--full_steps", "4", "--refine", "6", "--output", str(tmp_path)]) == 0
    (path,) = tmp_path.iterdir()
    content = json.loads(path.read_text())
    scores = {one["variant"]: one for one in content["results"]}
    assert len(scores) == 13 and content["prompts"] == {"fitted": 3, "held out": 2}
    rule = scores["not fitted: the rule that fits are pulled to"]
    usual = next(one for name, one in scores.items() if name.startswith("as calibrated"))
    assert usual["fitted"]["mean"] > rule["fitted"]["mean"] + 1, "a fit to three runs is better on them"
    ends = scores["end to end, 6 rounds of Adam"]
    assert ends["fitted"]["mean"] > usual["fitted"]["mean"], "the loss falls"
    assert scores["runs not weighted"] != scores["ridge 0.1"] != usual


def test_the_usual_fit_is_what_calibrate_fits(tiny_pipe: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """The benchmark's loop is its own, since it varies what `Lockstep.fit` does."""
    pictures = solvers.Pictures(tiny_pipe, ["a red circle", "a blue star"], 5, 3.0)  # type: ignore[arg-type]
    options = pictures.drawings[0].options
    prior = solvers.rule_on(options, (0, 20, 35))
    rows, latents = solvers.run_stages(pictures, prior, solvers.Fit())
    solver, end = pictures.runs.fit(prior, lambda step: pictures.latents[step], solvers.RIDGE)
    torch.testing.assert_close(latents, end)
    assert Solver.of(prior.full_steps, [row.tolist() for row in rows]) == solver
    _, again = solvers.run_stages(pictures, prior, solvers.Fit(), rows)
    torch.testing.assert_close(again, pictures.runs.run(solver))


def test_guided_outputs_as_one_need_half_the_coefficients(tiny_pipe: object) -> None:
    pictures = solvers.Pictures(tiny_pipe, ["a red circle"], 5, 3.0)  # type: ignore[arg-type]
    prior = solvers.rule_on(pictures.drawings[0].options, (0, 25))
    rows, _ = solvers.run_stages(pictures, prior, solvers.Fit(is_guided=True, ridge=1e9))
    assert [len(row) for row in rows] == [2, 3]
    for row, whole in zip(rows, prior.rows, strict=True):
        torch.testing.assert_close(row, torch.tensor(whole[: len(row)], dtype=torch.float64), rtol=1e-4, atol=1e-4)
