"""The quality benchmark's files: JSON with every figure, a Markdown table, and a Pareto plot."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.report import Hardware, today, versions
from hi_diffusers.pictures.metrics import CAP_DB

NUM_RESAMPLES = 2_000
COST_BUDGET = 13  # or the nearest one drawn, for what is not shown at every budget
FEWER = "fewer steps"
DEFAULT = "best"


def summary(row: Any) -> dict[str, float | None]:
    """Median, mean and 10th percentile of a row's PSNR and SSIM, and what it cost."""
    decibels, similarity = capped(row.psnr), np.array(row.ssim)
    return {
        "psnr_median": round(float(np.median(decibels)), 2),
        "psnr_mean": round(float(decibels.mean()), 2),
        "psnr_p10": round(float(np.percentile(decibels, 10)), 2),
        "psnr_worst": round(float(decibels.min()), 2),
        "ssim_median": round(float(np.median(similarity)), 4),
        "ssim_mean": round(float(similarity.mean()), 4),
        "ssim_p10": round(float(np.percentile(similarity, 10)), 4),
        "all_claims": row.claims.get("all"),
        "evaluations": row.evaluations,
        "seconds": row.seconds,
        "cache_bytes": row.cache_bytes,
    }


def capped(values: Sequence[float]) -> np.ndarray:
    """Decibels, those of identical pictures at CAP_DB."""
    return np.minimum(np.array(values, dtype=np.float64), CAP_DB)


def score(values: Sequence[float]) -> dict[str, float]:
    """Median, mean, 10th percentile and worst of a row's PSNR, dB."""
    decibels = capped(values)
    found = {name: statistic(decibels) for name, statistic in STATISTICS.items()} | {"worst": decibels.min()}
    return {name: round(float(value), 2) for name, value in found.items()}


def paired_difference(one: Any, other: Any, seed: int = 0) -> dict[str, Any]:
    """Differences of two rows' PSNR in dB: of median, mean and 10th percentile, and of the worst picture.

    Returns:
        Statistic -> [difference, low and high end of its 95 % interval by a bootstrap over the prompts]; "worst" -> the
        difference alone.
    """
    a, b = capped(one.psnr), capped(other.psnr)
    index = np.random.default_rng(seed).integers(len(a), size=(NUM_RESAMPLES, len(a)))
    found: dict[str, Any] = {}
    for name, statistic in STATISTICS.items():
        resampled = statistic(a[index]) - statistic(b[index])
        ends = np.percentile(resampled, [2.5, 97.5])
        found[name] = [round(float(value), 2) for value in (statistic(a) - statistic(b), *ends)]
    return found | {"worst": round(float(a.min() - b.min()), 2)}


STATISTICS: dict[str, Callable[[np.ndarray], Any]] = {
    "median": lambda values: np.median(values, axis=-1),
    "mean": lambda values: values.mean(axis=-1),
    "p10": lambda values: np.percentile(values, 10, axis=-1),
}


def comparisons(rows: Sequence[Any]) -> list[dict[str, Any]]:
    """The default against the best of each kind of rival, by its mean."""
    found = []
    for block, guidance, budget in sorted({(row.block, row.guidance, row.budget) for row in rows}, reverse=True):
        here = {row.method: row for row in rows if (row.block, row.guidance, row.budget) == (block, guidance, budget)}
        if DEFAULT not in here:
            continue
        others = [row for name, row in here.items() if name != DEFAULT]
        rivals = {
            "fewer steps": [row for row in others if row.method.startswith(FEWER)],
            "a fixed rule, evenly spaced": [row for row in others if row.settings.get("schedule") == "interval"],
            "learned forecasts": [row for row in others if row.settings.get("basis") == "learned"],
            "TaylorSeer order 1": [row for row in others if row.method.startswith("TaylorSeer") and "1" in row.method],
            "another paper's": [row for row in others if "published" in row.settings],
        }
        for what, candidates in rivals.items():
            if not candidates:
                continue
            rival = max(candidates, key=lambda row: capped(row.psnr).mean())
            found.append(
                {
                    "block": block,
                    "guidance": guidance,
                    "budget": budget,
                    "rival": what,
                    "method": rival.method,
                    **paired_difference(here[DEFAULT], rival),
                }
            )
    return found


def to_markdown(rows: Sequence[Any], facts: dict[str, Any]) -> str:
    """The tables: one per block and guidance, a line per method, a column per budget."""
    lines = [
        f"# Quality of cached pictures ({facts['kind']})",
        "",
        f"{facts['hardware']}; {facts['date']}; {facts['versions']}; nano's weights {facts['weights']}.",
        "",
        "PSNR in dB of the float picture to the uncached one of the same seed: median / 10th percentile / worst"
        f" picture. {facts['num_prompts']} held-out prompts, of DrawBench {facts['num_drawbench']}. K full steps, which"
        " for fewer steps is their number.",
    ]
    for block, guidance in dict.fromkeys((row.block, row.guidance) for row in rows):
        here = [row for row in rows if (row.block, row.guidance) == (block, guidance)]
        budgets = sorted({row.budget for row in here}, reverse=True)
        lines += [
            "",
            f"## {block}, guidance {guidance:g}",
            "",
            f"| | {' | '.join(f'K = {budget}' for budget in budgets)} |",
            f"|---|{'---|' * len(budgets)}",
        ]
        for method in dict.fromkeys(row.method for row in here):
            cells = {row.budget: summary(row) for row in here if row.method == method}
            shown = [
                " / ".join(f"{cells[k][name]:.1f}" for name in ("psnr_median", "psnr_p10", "psnr_worst"))
                if k in cells
                else "-"
                for k in budgets
            ]
            lines.append(f"| {method} | {' | '.join(shown)} |")
        shown_at = min(budgets, key=lambda k: abs(k - COST_BUDGET))
        lines += [
            "",
            f"At K = {shown_at}: SSIM; share of the pictures that are as their prompts say; and for each picture model"
            " evaluations, seconds of the denoising loop (in batches: no speed benchmark) and what the cache kept.",
            "",
            "| | SSIM median / 10th percentile | all claims | evaluations | seconds | cache, KiB |",
            "|---|---|---|---|---|---|",
            *(_cost_line(row) for row in here if row.budget == shown_at),
        ]
    compared = comparisons(rows)
    if compared:
        lines += [
            "",
            "## The default against its rivals",
            "",
            "Differences in dB, with the 95 % interval of a paired bootstrap over the prompts. An interval that"
            " includes 0 is a draw.",
            "",
            "| block | guidance | K | against | which was | median | mean | 10th percentile | worst |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        lines += [
            f"| {one['block']} | {one['guidance']:g} | {one['budget']} | {one['rival']} | {one['method']} | "
            + " | ".join("{:+.1f} ({:+.1f} .. {:+.1f})".format(*one[name]) for name in STATISTICS)
            + f" | {one['worst']:+.1f} |"
            for one in compared
        ]
    return "\n".join(lines) + "\n"


def _cost_line(row: Any) -> str:
    found = summary(row)
    claims = "-" if found["all_claims"] is None else f"{100 * found['all_claims']:.1f} %"
    return (
        f"| {row.method} | {found['ssim_median']:.4f} / {found['ssim_p10']:.4f} | {claims} |"
        f" {row.evaluations} | {row.seconds:.2f} | {row.cache_bytes / 1024:.0f} |"
    )


def write_report(rows: Sequence[Any], kind: str, weights: str, folder: Path, plot: Path | None) -> list[Path]:
    """Write the JSON and the Markdown, and the plot if it is asked for; returns the paths."""
    hardware = Hardware.of(torch.device("cpu"))
    facts = {
        "kind": kind,
        "date": today(),
        "hardware": f"{hardware.name}, {hardware.threads} threads",
        "versions": ", ".join(f"{name} {version}" for name, version in versions().items()),
        "weights": weights,
        "num_prompts": max((row.num_prompts for row in rows if row.claims), default=0),
        "num_drawbench": max((row.num_prompts for row in rows if not row.claims), default=0),
    }
    content = {
        **facts,
        "rows": [{**asdict(row), **summary(row)} for row in rows],
        "comparisons": comparisons(rows),
    }
    folder.mkdir(exist_ok=True)
    stem = f"quality_{kind}_{hardware.slug}_{today()}"
    paths = [folder / f"{stem}.json", folder / f"{stem}.md"]
    paths[0].write_text(_one_row_a_line(content), encoding="utf-8")
    paths[1].write_text(to_markdown(rows, facts), encoding="utf-8")
    if plot is not None:
        draw_plot(rows, plot)
        paths.append(plot)
    return paths


def _one_row_a_line(content: dict[str, Any]) -> str:
    rows = ",\n".join(json.dumps(row) for row in content["rows"])
    rest = {name: value for name, value in content.items() if name != "rows"}
    return json.dumps(rest, indent=1)[:-2] + ',\n "rows": [\n' + rows + "\n]}\n"


def draw_plot(rows: Sequence[Any], path: Path) -> None:
    """Median PSNR over model evaluations for the first block, a line per method."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    block, guidance = rows[0].block, rows[0].guidance
    here = [row for row in rows if (row.block, row.guidance) == (block, guidance)]
    figure, axes = pyplot.subplots(figsize=(9, 6))
    for method in dict.fromkeys(row.method for row in here):
        points = sorted((row.evaluations, summary(row)["psnr_median"]) for row in here if row.method == method)
        style = "-o" if method == DEFAULT else "--s" if method.startswith(FEWER) else "-"
        axes.plot(*zip(*points, strict=True), style, label=method, linewidth=3 if method == DEFAULT else 1.2)
    axes.set_xlabel("model evaluations a picture (two a guided step)")
    axes.set_ylabel("PSNR to the uncached picture, dB, median")
    axes.set_title(f"nano, {block}, guidance {guidance:g}, {here[0].num_prompts} held-out prompts")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120, metadata={"Software": None})
    pyplot.close(figure)
