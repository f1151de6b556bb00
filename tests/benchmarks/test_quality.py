"""The quality benchmark: rows, how they are summarised and compared, and that a stopped run goes on."""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import published, quality
from benchmarks.contenders import Block, Method, methods, screened
from benchmarks.published import PUBLISHED, History, even, growing, mean_cache, spectrum, vde
from benchmarks.quality import Bench, Row
from benchmarks.quality_report import comparisons, paired_difference, summary, to_markdown, write_report
from benchmarks.teacache import teacache_mask
from cache_functions import CacheConfig
from hi_diffusers import SamplingOptions, generate, load_pipeline
from hi_diffusers.pictures.metrics import psnr

ROW = Row(
    block="unipc",
    guidance=2.0,
    method="best",
    budget=13,
    num_prompts=4,
    settings={"schedule": "mask"},
    psnr=[30.0, 40.0, 50.0, float("inf")],
    ssim=[0.9, 0.91, 0.92, 1.0],
    claims={"all": 0.5},
    seconds=0.1,
    evaluations=26,
    cache_bytes=100,
)
FACTS = {
    "kind": "quick",
    "hardware": "a CPU",
    "date": "today",
    "versions": "torch 0",
    "weights": "ab",
    "num_prompts": 4,
    "num_drawbench": 0,
}


def test_a_summary_is_median_mean_and_10th_percentile() -> None:
    """A picture identical to the uncached one counts 100 dB: a mean of infinities would say nothing."""
    result = summary(ROW)
    assert (result["psnr_median"], result["psnr_mean"]) == (45.0, 55.0)
    assert result["psnr_p10"] == pytest.approx(np.percentile([30, 40, 50, 100], 10), abs=0.01)
    assert result["ssim_median"] == 0.915


def test_a_difference_is_paired_and_has_its_interval() -> None:
    rng = np.random.default_rng(0)
    base = rng.normal(40, 5, 64)
    one = replace(ROW, psnr=list(base + 3))
    other = replace(ROW, psnr=list(base))
    difference = paired_difference(one, other)
    for name in ("median", "mean", "p10"):
        assert difference[name] == pytest.approx([3.0, 3.0, 3.0], abs=0.02), "unpaired it would be 3 +- 2"
    assert difference["worst"] == pytest.approx(3.0, abs=0.01)


def test_the_default_is_compared_with_the_best_of_each_kind() -> None:
    rows = [
        ROW,
        replace(ROW, method="fewer steps, UniPC", psnr=[20.0] * 4, settings={"target": "off"}),
        replace(ROW, method="fewer steps, Euler", psnr=[25.0] * 4, settings={"target": "off"}),
        replace(ROW, method="x0, reuse", psnr=[28.0] * 4, settings={"schedule": "interval", "basis": "reuse"}),
        replace(ROW, method="x0, cosine", psnr=[44.0] * 4, settings={"schedule": "cosine"}),
    ]
    first, second = comparisons(rows)
    assert (first["method"], first["median"][0]) == ("fewer steps, Euler", 20.0)
    assert (second["method"], second["median"][0]) == ("x0, reuse", 17.0)


def test_a_table_has_a_line_a_method_and_a_column_a_budget() -> None:
    rows = [ROW, replace(ROW, budget=8), replace(ROW, method="x0, reuse", budget=8)]
    text = to_markdown(rows, FACTS)
    assert "| | K = 13 | K = 8 |" in text
    assert "| best | 45.0 / 33.0 / 30.0 | 45.0 / 33.0 / 30.0 |" in text
    assert "| x0, reuse | - | 45.0 / 33.0 / 30.0 |" in text


def test_the_json_holds_every_figure(tmp_path: Path) -> None:
    paths = write_report([replace(ROW, psnr=[30.0, 40.0])], "quick", "ab", tmp_path, None)
    content = json.loads(paths[0].read_text())
    assert content["rows"][0]["psnr"] == [30.0, 40.0] and content["rows"][0]["psnr_median"] == 35.0
    assert content["weights"] == "ab" and {path.suffix for path in paths} == {".json", ".md"}


def test_every_method_can_be_configured_at_every_budget() -> None:
    for renoises in (False, True):
        names = [method.name for method in methods(renoises)]
        assert len(set(names)) == len(names)
        for method in methods(renoises):
            for budget in (13, 8):
                assert method.cache(budget) is not None


def test_the_screen_has_every_target_and_basis() -> None:
    names = " ".join(method.name for method in screened())
    for word in ("module", "residual", "velocity", "x0", "reuse", "taylor", "hermite", "newton", "cosine", "interval"):
        assert word in names


def test_a_row_is_what_was_drawn_and_is_drawn_once(
    nano_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quality, "BATCH_SIZE", 2)
    block = Block("few", "nano", scheduler="euler", budgets=(3,))
    block = replace(block)
    few = {"num_steps": 6}
    monkeypatch.setattr(Block, "options", _with(Block.options, few))
    bench = Bench(tmp_path, 3)
    method = Method("x0, reuse", lambda budget: CacheConfig(target="x0", basis="reuse", fresh_threshold=3))
    bench.complete([(block, method, 2)])
    (row,) = bench.rows()
    assert len(row.psnr) == len(row.ssim) == 3
    assert row.evaluations == 2 * 2, "two guided full steps"
    channels = bench.pipe("nano").transformer.config.in_channels
    assert row.cache_bytes == 2 * channels * 16 * 16 * 4, "two latents, order 1, fp32"
    assert row.settings["target"] == "x0"
    uncached = bench.reference(block)
    again = [one.pixels for one in bench._draw(block, block.options(), CacheConfig.off())]
    assert psnr(again[2], uncached[2]) > 60, "reference pictures are those of the prompts' seeds"
    monkeypatch.setattr(Bench, "measure", lambda *_: pytest.fail("the row was drawn again"))
    bench.complete([(block, method, 2)])


def _with(options: Any, more: dict[str, Any]) -> Any:
    return lambda self, **changes: options(self, **(more | changes))


def test_a_budget_that_an_interval_cannot_make_is_left_out(nano_folder: Path, tmp_path: Path) -> None:
    method = Method("x0, reuse", lambda budget: CacheConfig(target="x0", basis="reuse", full_steps=budget))
    assert Bench(tmp_path, 1).measure(Block("unipc", "nano"), method, 12) is None


def test_teacache_computes_first_and_last_step_and_those_where_the_rescaled_change_adds_up() -> None:
    """Changes of 1 at every step, rescaled by a polynomial that fits the residual's exactly: evenly spaced steps."""
    of_input = np.array([0.0, *np.linspace(0.1, 1.0, 20)])
    changes = (of_input, np.array([0.0, *np.ones(20)]))
    assert teacache_mask(changes, 6) == (0, 4, 8, 12, 16, 20)
    assert teacache_mask(changes, 21) == tuple(range(21))


def test_teacache_spends_its_steps_where_the_residual_changes() -> None:
    of_input = np.array([0.0, *np.linspace(1.0, 0.1, 20)])
    mask = teacache_mask((of_input, of_input**2), 8)
    assert mask is not None and sum(step <= 10 for step in mask) > sum(step > 10 for step in mask)


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_with_every_step_full_a_published_cache_draws_the_uncached_picture(nano_folder: Path, name: str) -> None:
    """MeanCache averages, and so differs from Euler's steps by what the velocity bends within one."""
    pipe = load_pipeline("nano", device="cpu")
    cache, few = PUBLISHED[name], SamplingOptions("a red circle", seed=1, num_steps=6, guidance=2.0)
    one = replace(few, scheduler=cache.scheduler)
    uncached = generate(pipe, one, CacheConfig.off()).pixels
    (drawn,) = replace(cache, schedule=even).draw(pipe, [few.resolve(pipe.preset)], 6)
    (cached,) = cache.draw(pipe, [few.resolve(pipe.preset)], 4)
    assert psnr(drawn, uncached) > (20 if cache.averages else 90)
    assert 10 < psnr(cached, uncached) < 60


def test_published_forecasts_are_exact_where_their_papers_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spectrum of a line (but for its ridge), VDE of a velocity along the latents, MeanCache of a linear velocity."""
    sigmas = [1.0, 0.8, 0.6, 0.4, 0.2, 0.0]
    latents = torch.randn(1, 4, 4, 4)
    history = History(sigmas, (0, 2, 4), [0, 2], [latents, latents * 0.5], [latents, latents * 0.5])
    torch.testing.assert_close(vde(history, latents * 0.3, 3), latents * 0.3)
    ones = torch.ones(1, 4, 4, 4)
    rising = History(sigmas, (0, 2, 4), [0, 2], [ones, ones], [1.0 * ones, 0.6 * ones])
    torch.testing.assert_close(mean_cache(rising, ones, 3), (0.6 + 0.2) / 2 * ones)  # velocity = sigma
    line = History([1.0] * 11, (), list(range(6)), [ones] * 6, [step * ones for step in range(6)])
    assert float((spectrum(line, ones, 7) - 7 * ones).abs().max()) > 0.1
    monkeypatch.setattr(published, "CHEBYSHEV_RIDGE", 1e-9)
    torch.testing.assert_close(spectrum(line, ones, 7), 7 * ones, rtol=0, atol=1e-3)


@pytest.mark.parametrize("budget", [5, 6, 7, 8, 10, 13, 17, 25])
def test_spectrums_gaps_grow_within_the_budget(budget: int) -> None:
    steps = growing(50, budget)
    gaps = np.diff(steps)
    assert len(steps) == budget and (np.diff(gaps) >= 0).all() and gaps[0] == 1 and steps[-1] < 50


def test_drawbench_is_a_block_of_its_own_where_its_file_is_given(nano_folder: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "drawbench.txt"
    prompts.write_text("".join(f"a photo of {number} dogs\n" for number in range(200)))
    arguments = argparse.Namespace(quick=False, screen=False)
    blocks_of = {
        found: {job[0].name for job in quality.plan_jobs(arguments, Bench(tmp_path, 1, found))}
        for found in (None, prompts)
    }
    assert blocks_of[prompts] - blocks_of[None] == {"unipc, DrawBench"}
    assert len(Bench(tmp_path, 1, prompts).prompts["DrawBench"]) == 64
