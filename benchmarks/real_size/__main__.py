"""HiDream-I1 at its published size on a pretended accelerator: what a step computes, and what a drawing keeps.

    python -m benchmarks.real_size

Shapes alone: no number is computed and no second is measured, see `benchmarks.pretended`. It writes the operations of a
step, by kind and beside diffusers' class; the most memory that is alive in each stage, beside the plan's, and on cards
of many sizes; and how many graphs compiled blocks take in a session of several sizes.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.pretended import pretended_device
from benchmarks.real_size.graphs import count_graphs
from benchmarks.real_size.memory import track_cards, track_memory
from benchmarks.real_size.model import NUM_STEPS
from benchmarks.real_size.operations import count_flops
from benchmarks.report import RESULTS, write_json
from hi_diffusers.console import Parser, quiet_libraries, run_script


def run(args: argparse.Namespace) -> None:
    """Count and write the result files."""
    quiet_libraries()
    with pretended_device() as device:
        flops, memory, cards = count_flops(device), track_memory(device), track_cards(device)
    about = {
        "what": "shapes alone, at HiDream-I1's published size; 1024x1024 pixels, guidance 5 (full), bf16",
        "num_steps": NUM_STEPS,
        "seed": 0,
    }
    cpu = torch.device("cpu")
    print(write_json(args.output, "real_size_flops", cpu, about | flops))
    print(write_json(args.output, "real_size_memory", cpu, about | {"cards": cards, "rows": memory}))
    print(
        write_json(args.output, "real_size_graphs", cpu, {"what": "plain bf16 blocks, traced", "rows": count_graphs()})
    )


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = Parser(prog="python -m benchmarks.real_size", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results (default: %(default)s)")
    return run_script(run, parser, argv)


if __name__ == "__main__":
    raise SystemExit(main())
