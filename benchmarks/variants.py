"""One evaluation in other arithmetic, and compiled: ours and diffusers', side by side.

    python -m benchmarks.variants --size small

bf16 on a CPU that multiplies it (AMX, AVX512-BF16), and `--compile`. Each has random weights of its own, drawn from one
seed; all take turns.
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.report import RESULTS, write_json
from benchmarks.sizes import SIZES, Subject, find_size
from benchmarks.speed import Contender, take_turns
from hi_diffusers.console import Parser, quiet_libraries, refuse_errors, run_script
from hi_diffusers.engine.loading import resolve_device
from hi_diffusers.request.placement import compile_blocks


def run(args: argparse.Namespace) -> None:
    """Measure, write the file, print a line each."""
    quiet_libraries()
    device, size = refuse_errors(resolve_device, args.device), find_size(args.size)
    fp32, compiled, bf16 = (
        Subject.build(size, device, dtype, 0) for dtype in (torch.float32, torch.float32, torch.bfloat16)
    )
    compile_blocks(compiled.transformers.ours, fullgraph=True)
    started = time.perf_counter()
    with torch.no_grad():
        compiled.call_ours()
    compiling = time.perf_counter() - started
    timings = take_turns(
        [
            Contender("diffusers, fp32", "", fp32.call_theirs),
            Contender("ours, fp32", "", fp32.call_ours),
            Contender("ours, fp32, compiled", "", compiled.call_ours),
            Contender("diffusers, bf16", "", bf16.call_theirs),
            Contender("ours, bf16", "", bf16.call_ours),
        ],
        args.repeats,
        device,
    )
    medians = {timing.name: round(1000 * timing.spread.median, 2) for timing in timings}
    for name, value in medians.items():
        print(f"{name}: {value} ms")
    content = {"size": args.size, "milliseconds": medians, "seconds of the first compiled call": round(compiling, 1)}
    print(write_json(args.output, f"variants_{args.size}", device, content))


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = Parser("benchmarks.variants", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", choices=SIZES[:2], default="small", help="default: %(default)s")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: auto")
    parser.add_argument("--repeats", type=int, default=15, help="rounds (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the result (default: %(default)s)")
    return run_script(run, parser, argv)


if __name__ == "__main__":
    raise SystemExit(main())
