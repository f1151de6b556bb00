"""Compare two runs of sampling.py picture by picture: `python compare.py RUN_A RUN_B --report report.html`."""

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from hi_diffusers import __version__
from hi_diffusers.console import Parser, Refusal, refuse_errors, require, run_script, say
from hi_diffusers.pictures.metadata import write_atomically
from hi_diffusers.pictures.metrics import CAP_DB
from hi_diffusers.runs.comparison import Pair, Run, Summary, Unpaired, compare_pairs, match
from hi_diffusers.runs.scores import (
    CLIP_MODEL,
    RUNS,
    Scorer,
    clip_score,
    image_reward,
    is_installed,
    lpips_distance,
    read_scores,
    scene_claims,
)

DESCRIPTION = "Compare two runs of sampling.py by index and seed; RUN_A is the reference, such as the uncached run."
Table = list[list[str]]


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Exit codes: 0 done, 2 refused, 1 failed, 130 interrupted."""
    return run_script(run, build_parser(), argv)


def build_parser() -> Parser:
    """The command line's parser."""
    parser = Parser(prog="compare.py", description=DESCRIPTION, version=__version__)
    parser.add_argument("run_a", type=Path, metavar="RUN_A", help="folder of the reference")
    parser.add_argument("run_b", type=Path, metavar="RUN_B", help="folder that is compared with it")
    parser.add_argument("--report", type=Path, metavar="FILE.html", help="write a page that shows the worst pairs")
    parser.add_argument("--worst", type=int, default=12, help="number of pairs on that page (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE.json", help="write the figures of all pairs as JSON")
    parser.add_argument(
        "--scores",
        type=Path,
        action="append",
        default=[],
        metavar="FILE.csv",
        help="add scores measured elsewhere; repeatable",
    )
    parser.add_argument(
        "--clip",
        nargs="?",
        const=CLIP_MODEL,
        metavar="MODEL",
        help=f"measure the CLIP score as well (default model: {CLIP_MODEL}, which is downloaded)",
    )
    return parser


def run(args: argparse.Namespace) -> None:
    """Do what the flags say.

    Raises:
        Refusal: if a flag or a run's folder is wrong, before a picture is read.
    """
    for name, path in (("report", args.report), ("json", args.json)):
        if path is not None and (not path.parent.is_dir() or path.is_dir()):
            raise Refusal(f"--{name} must be a file in an existing folder, got {str(path)!r}")
    if args.report is not None and args.report == args.json:
        raise Refusal(f"--report and --json must be two files, got {args.report}")
    if args.worst < 1:
        raise Refusal(f"--worst must be at least 1, got {args.worst}")
    refuse_errors(require, "skimage", "metrics", "SSIM")
    a, b = refuse_errors(Run.read, args.run_a), refuse_errors(Run.read, args.run_b)
    scores = [refuse_errors(read_scores, path) for path in args.scores]
    clip = None if args.clip is None else load_clip(args.clip)
    keys, unpaired = match(a, b)
    measured = list(tqdm(compare_pairs(a, b, keys), total=len(keys), unit="pair"))
    pairs = [one for one in measured if isinstance(one, Pair)]
    unpaired += [one for one in measured if isinstance(one, Unpaired)]
    for one in unpaired:
        say(f"not compared: prompt {one.key[0]}, image {one.key[1]}, {one.reason}")
    if not pairs:
        raise Refusal(f"{args.run_a} and {args.run_b} have no picture in common")
    keys = [pair.key for pair in pairs]
    table, notes = figures(a, b, pairs, clip)
    for found in scores:
        for name, by_run in found.items():
            table += score_rows(name, by_run, keys)
    print(to_text(table))
    for note in notes:
        print(note)
    if args.json:
        write_atomically(args.json, to_json(pairs, unpaired).encode())
    if args.report:
        from hi_diffusers.runs.report import to_html

        worst = sorted(pairs, key=lambda pair: pair.psnr)[: args.worst]
        write_atomically(args.report, to_html(a, b, table, worst, unpaired, notes).encode())
        print(args.report)


def load_clip(model: str) -> Scorer:
    """Load the CLIP score's model; raises Refusal if that fails, before pictures are measured."""
    try:
        return clip_score(model)
    except Exception as error:
        raise Refusal(f"--clip {model} cannot be loaded: {error}") from error


def figures(a: Run, b: Run, pairs: Sequence[Pair], clip: Scorer | None) -> tuple[Table, list[str]]:
    """The table, whose first row is its head, and the sentences below it."""
    table = [["", "median (95 %)", "mean (95 %)", "10th percentile", "pairs"]]
    table.append(row("PSNR in dB", [min(pair.psnr, CAP_DB) for pair in pairs]))
    table.append(row("SSIM", [pair.ssim for pair in pairs]))
    keys = [pair.key for pair in pairs]
    absent = []
    if is_installed("lpips"):
        distance = lpips_distance()
        table.append(row("LPIPS", [distance(a.picture(key), b.picture(key)) for key in keys]))
    else:
        absent.append("LPIPS (pip install lpips)")
    scorers = {
        "CLIP score": (clip, "--clip"),
        "ImageReward": (
            image_reward() if is_installed("ImageReward") else None,
            "pip install image-reward, or --scores",
        ),
    }
    for name, (score, how) in scorers.items():
        if score is None:
            absent.append(f"{name} ({how})")
            continue
        for run, each in (("A", a), ("B", b)):
            values = [score(each.picture(key), each.lines[key]["prompt"]) for key in keys]
            table.append(row(f"{name}, {run}", values))
    identical = sum(pair.psnr == float("inf") for pair in pairs)
    counted = f"{identical} of {len(pairs)} pairs are identical; PSNR is capped at {CAP_DB:g} dB"
    notes = [f"Measured on the saved 8-bit pictures; {counted}."]
    seconds = np.nanmedian([pair.seconds for pair in pairs], axis=0)
    speedup = f"so B has {seconds[0] / seconds[1]:.2f}x the speed"
    notes.append(f"Median seconds per picture: A {seconds[0]:.3f}, B {seconds[1]:.3f}, {speedup}.")
    if all(str(each.configuration["fixed"].get("model_type")).startswith("nano") for each in (a, b)):
        for name, claims in zip("AB", scene_claims((a, b), keys), strict=False):
            notes.append(f"Claims of the prompts that hold in {name}: {claims}.")
    if absent:
        notes.append(f"Not measured: {', '.join(absent)}.")
    return table, notes


def row(name: str, values: Sequence[float]) -> list[str]:
    """The table's row of one figure."""
    found, digits = Summary.of(values), 4 if name in ("SSIM", "LPIPS") else 2
    median = (
        f"{found.median:.{digits}f} ({found.median_interval[0]:.{digits}f} .. {found.median_interval[1]:.{digits}f})"
    )
    mean = f"{found.mean:.{digits}f} ({found.mean_interval[0]:.{digits}f} .. {found.mean_interval[1]:.{digits}f})"
    return [name, median, mean, f"{found.p10:.{digits}f}", str(found.count)]


def score_rows(name: str, by_run: dict[str, dict[tuple[int, int], float]], keys: Sequence[tuple[int, int]]) -> Table:
    """The rows of a score measured elsewhere: each run's, and B minus A where both runs have it."""
    of_pairs = {run: [values[key] for key in keys if key in values] for run, values in by_run.items()}
    rows = [row(f"{name}, {run.upper()}", values) for run, values in of_pairs.items() if values]
    both = [key for key in keys if all(key in by_run[run] for run in RUNS)]
    if both:
        rows.append(row(f"{name}, B - A", [by_run["b"][key] - by_run["a"][key] for key in both]))
    return rows


def to_text(table: Table) -> str:
    """The table as text, its columns aligned with blanks."""
    widths = [max(len(line[i]) for line in table) for i in range(len(table[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in table
    )


def to_json(pairs: Sequence[Pair], unpaired: Sequence[Unpaired]) -> str:
    """Every pair's figures as JSON; an infinite PSNR and missing figures are null."""
    content = {
        "pairs": [
            {
                "index": pair.key[0],
                "image": pair.key[1],
                "seed": pair.seed,
                "psnr": None if pair.psnr == float("inf") else round(pair.psnr, 4),
                "ssim": None if math.isnan(pair.ssim) else round(pair.ssim, 6),
                "seconds": [None if math.isnan(seconds) else seconds for seconds in pair.seconds],
            }
            for pair in pairs
        ],
        "not_compared": [{"index": one.key[0], "image": one.key[1], "reason": one.reason} for one in unpaired],
    }
    return json.dumps(content, indent=1, allow_nan=False) + "\n"
