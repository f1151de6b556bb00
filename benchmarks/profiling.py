"""Where the time of one uncached evaluation goes, by kind of operation.

    python -m benchmarks.profiling --size small

torch's profiler over diffusers' class, ours with every faster way turned off, and ours; on the same weights, in one
process. Milliseconds an evaluation of both guidance branches.
"""

import argparse
from collections.abc import Callable, Sequence

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.report import write_json
from benchmarks.sizes import Subject
from benchmarks.speed import add_subject_arguments, subject_of
from hi_diffusers.console import Parser, quiet_libraries, run_script
from hi_diffusers.families.hidream.fast_paths import FastPaths, set_fast_paths

WARM_UP = 3
# Kind -> beginnings of the names of torch's operations; what begins with none of them is "the rest".
KINDS = {
    "matrix products": ("mm", "addmm", "bmm", "_scaled_mm", "_grouped_mm"),
    "attention": ("_scaled_dot_product",),
    "norms and softmax": ("native_layer_norm", "pow", "mean", "rsqrt", "sum", "_softmax", "_fused_rms_norm"),
    "products, sums, activations": ("mul", "add", "sub", "div", "silu", "neg"),
    "gathers, copies, joins": ("cat", "copy", "clone", "index", "scatter", "sort", "stack", "gather", "topk", "fill"),
}


def kind_of(operation: str) -> str:
    """The kind that an operation of the profiler's table is of."""
    name = operation.removeprefix("aten::")
    fitting = (kind for kind, beginnings in KINDS.items() if name.startswith(beginnings))
    return next(fitting, "the rest")


def take(run: Callable[[], object], device: torch.device, repeats: int) -> dict[str, float]:
    """Milliseconds a run, by kind, the longest first."""
    on_cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])]
    with torch.no_grad():
        for _ in range(WARM_UP):
            run()
        with profile(activities=activities) as profiler:
            for _ in range(repeats):
                run()
    milliseconds = dict.fromkeys([*KINDS, "the rest"], 0.0)
    for event in profiler.key_averages():
        if on_cuda and not event.key.startswith("aten::"):
            continue  # a kernel, whose time its operation has already
        own = event.self_device_time_total if on_cuda else event.self_cpu_time_total
        milliseconds[kind_of(event.key)] += own / 1000 / repeats
    return {kind: round(value, 3) for kind, value in milliseconds.items()}


def run(args: argparse.Namespace) -> None:
    """Profile, write the file, print the table."""
    size, device, dtype = subject_of(args)
    quiet_libraries()
    subject = Subject.build(size, device, dtype, 0)
    found = {"diffusers' class": take(subject.call_theirs, device, args.repeats)}
    for name, paths in (("ours, plain", FastPaths.none()), ("ours", FastPaths())):
        set_fast_paths(subject.transformers.ours, paths)
        found[name] = take(subject.call_ours, device, args.repeats)
    for name, kinds in found.items():
        print(
            f"{name}: {sum(kinds.values()):.1f} ms;", ", ".join(f"{kind} {value:.1f}" for kind, value in kinds.items())
        )
    content = {"size": args.size, "dtype": str(dtype).removeprefix("torch."), "milliseconds": found}
    print(write_json(args.output, f"profile_{args.size}", device, content))


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = Parser("benchmarks.profiling", description=(__doc__ or "").splitlines()[0])
    add_subject_arguments(parser)
    parser.add_argument("--repeats", type=int, default=10, help="evaluations (default: %(default)s)")
    return run_script(run, parser, argv)


if __name__ == "__main__":
    raise SystemExit(main())
