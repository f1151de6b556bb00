"""One picture on 1, 2, 4, 8 ranks: seconds, memory and the difference to one rank, beside what arithmetic expects.

    python -m benchmarks.parallel --size real                 # a machine with several GPUs: as many ranks as it has
    OMP_NUM_THREADS=1 python -m benchmarks.parallel --device cpu --size small --ranks 1,2 --num_steps 6

Every arrangement is a run of torchrun; they take turns, round by round. On a CPU the ranks share its cores, which tells
that it works, and what is exchanged, but nothing of the speed on GPUs.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.report import write_json
from benchmarks.sizes import Size, bare_pipeline, build_ours, make_inputs
from benchmarks.speed import add_subject_arguments, subject_of
from cache_functions import CacheConfig, StepRecord
from hi_diffusers.console import Parser, Refusal, quiet_libraries, run_script, say
from hi_diffusers.denoising.ranks import Ranks, Split, join
from hi_diffusers.denoising.schedulers import make_scheduler
from hi_diffusers.families.hidream.transformer import HiDreamImageTransformer2DModel

ARRANGEMENTS = (Split(1), Split(1, True), Split(2), Split(2, True), Split(4), Split(4, True))
CACHES = {"uncached": CacheConfig.off(), "taylorseer": CacheConfig.taylorseer()}
MIB = 2**20

REAL_TFLOP, REAL_TOKENS, REAL_WIDTH, REAL_BLOCKS = 151.63, (4096, 128), 2560, 48
"""Of a guided step at 1024x1024: benchmarks/results/real_size_flops_*.json and the published configuration."""
H100_TFLOPS = 0.6 * 790  # 60 % of 80 % of the 989 on the data sheet, as in docs/performance.md
LINKS = {"NVLink 4": 450e9, "PCIe 5.0 x16": 63e9, "PCIe 4.0 x16": 31.5e9}
"""Bytes a second in one direction, by the data sheets."""


def exchanged(
    split: Split, image: int, text: int, width: int, blocks: int, itemsize: int, latent_bytes: int
) -> tuple[int, int]:
    """Bytes that a rank sends in a full step: for attention, and of the velocity.

    Before attention queries, keys and values are exchanged, tokens for heads, and its output is exchanged back; each
    rank keeps its own 1 / ulysses of what it sends. A block's own text is only read, and of the last block the
    picture's tokens alone are needed: there are fewer queries and outputs than keys and values.

    Args:
        image: tokens of the picture.
        text: tokens of each text encoder; a block sees three times as many.
        latent_bytes: of one branch's velocity, fp32.
    """
    branches = 1 if split.guidance else 2
    queries, keys = (blocks - 1) * (image + 2 * text) + image, blocks * (image + 3 * text)
    share = branches * 2 * (queries + keys) * width * itemsize // split.ulysses
    return share * (split.ulysses - 1) // split.ulysses, latent_bytes if split.guidance else 0


def expected() -> dict[str, Any]:
    """Full steps of HiDream-I1 on H100s, by arithmetic: nothing of it was measured."""
    rows = {}
    alone = REAL_TFLOP / H100_TFLOPS
    for split in ARRANGEMENTS:
        attention, velocity = exchanged(split, *REAL_TOKENS, REAL_WIDTH, REAL_BLOCKS, 2, 16 * 128 * 128 * 4)
        row: dict[str, Any] = {"ranks": split.size, "MiB a step": round((attention + velocity) / MIB, 1)}
        for link, speed in LINKS.items():
            seconds = alone / split.size + (attention + velocity) / speed
            row[link] = {"milliseconds": round(1000 * seconds, 1), "ratio": round(alone / seconds, 2)}
        rows[name_of(split)] = row
    return {
        "what": "computed, not measured: products divided by the ranks, plus bytes over the link, nothing overlapped",
        "from": f"{REAL_TFLOP} TFLOP a guided step at 1024x1024, {H100_TFLOPS:.0f} TFLOP/s reached, bf16",
        "rows": rows,
    }


def name_of(split: Split) -> str:
    """A row's name."""
    parts = [f"ulysses {split.ulysses}"] * (split.ulysses > 1) + ["guidance"] * split.guidance
    return " x ".join(parts) or "one rank"


def draw(ranks: Ranks | None, transformer: HiDreamImageTransformer2DModel, size: Size, args: argparse.Namespace) -> Any:
    """Seconds of loops and full steps, peak memory, bytes of the cache, and the latents, on this rank."""
    device = next(transformer.parameters()).device
    pipe = bare_pipeline(transformer)
    if ranks is not None:
        pipe.draw_with(ranks)
    inputs = make_inputs(size, device, transformer.dtype, args.seed)
    found: dict[str, Any] = {}
    for name, cache in CACHES.items():
        for run in range(1 + args.loops):
            scheduler = make_scheduler(size.preset.scheduler, size.preset.shift)
            scheduler.set_timesteps(args.num_steps, device=device)
            records: list[StepRecord] = []
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            if dist.is_initialized():
                dist.barrier()
            began = time.perf_counter()
            latents = pipe.denoise(
                inputs.latents,
                inputs.embeds,
                scheduler=scheduler,
                guidance=size.preset.guidance,
                cache=cache,
                on_step_end=lambda end, records=records: records.append(end.record),
            )
            latents = latents.cpu()  # waits for the device
            seconds = time.perf_counter() - began
            if run == 0:  # warms up
                continue
            row = found.setdefault(name, {"seconds": [], "full_step": []})
            row["seconds"].append(seconds)
            row["full_step"].append(statistics.median(one.seconds for one in records if one.kind == "full"))
            row["cache_bytes"] = max(one.cache_bytes for one in records)
            row["peak_bytes"] = torch.cuda.max_memory_allocated() if device.type == "cuda" else None
            row["latents"] = latents
    return found


def work(args: argparse.Namespace) -> None:
    """One rank of one arrangement; the first one writes what it found."""
    quiet_libraries()
    size, device, dtype = subject_of(args)
    split, ranks = Split(args.ulysses, args.guidance_parallel), None
    if split.size > 1:
        ranks, own = join(split, device.type)
        device = torch.device(own)
    found = draw(ranks, build_ours(size, device, dtype, args.seed), size, args)
    if ranks is None or ranks.is_first:
        torch.save(found, args.found)
    if ranks is not None:
        dist.destroy_process_group()


def run(args: argparse.Namespace) -> None:
    """Measure all arrangements in turn, write the result, print the table."""
    if args.found is not None:
        work(args)
        return
    size, device, dtype = subject_of(args)
    args.num_steps = args.num_steps or size.steps
    most = torch.cuda.device_count() if device.type == "cuda" else 8
    given = args.ranks.split(",") if args.ranks else [str(n) for n in (1, 2, 4, 8) if n <= most]
    wanted = [int(one) for one in given if one in ("1", "2", "4", "8")]
    if len(wanted) < len(given) or max(wanted) > most:
        raise Refusal(f"--ranks must be some of 1, 2, 4, 8, at most {most} here, got {args.ranks}")
    heads = size.transformer["num_attention_heads"]
    splits = [one for one in ARRANGEMENTS if one.size in wanted and heads % one.ulysses == 0]
    rows: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(args.rounds):
            for split in splits if number % 2 == 0 else splits[::-1]:
                say(f"round {number + 1} of {args.rounds}: {name_of(split)}")
                merge(rows, name_of(split), start(split, args, Path(folder) / "found.pt"))
    result = {
        "what": f"denoising loops of size {size.name} with random weights, {args.num_steps} steps, guidance",
        "device": device.type,
        "rounds": args.rounds,
        "loops a round": args.loops,
        "measured": summed_up(rows, splits, size, dtype),
        "expected of HiDream-I1": expected(),
    }
    path = write_json(args.output, f"parallel_{size.name}", device, result)
    print(to_markdown(result))
    say(f"written: {path}")


def start(split: Split, args: argparse.Namespace, found: Path) -> dict[str, Any]:
    """Run one arrangement, as torchrun does; returns what its first rank found."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(split.size)]
    words = [sys.executable, *(launch if split.size > 1 else []), "-m", "benchmarks.parallel", "--found", str(found)]
    words += ["--size", args.size, "--device", args.device, "--dtype", args.dtype, "--seed", str(args.seed)]
    words += ["--num_steps", str(args.num_steps), "--loops", str(args.loops), "--ulysses", str(split.ulysses)]
    done = subprocess.run(words + ["--guidance_parallel"] * split.guidance, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{name_of(split)} failed: {done.stderr[-600:]}")
    loaded: dict[str, Any] = torch.load(found, weights_only=True)
    return loaded


def merge(rows: dict[str, dict[str, Any]], name: str, found: dict[str, Any]) -> None:
    """Add a round's samples to those before."""
    row = rows.setdefault(name, {})
    for cache, one in found.items():
        kept = row.setdefault(cache, one | {"seconds": [], "full_step": []})
        for key in ("seconds", "full_step"):
            kept[key] = [*kept[key], *one[key]]


def summed_up(
    rows: dict[str, dict[str, Any]], splits: Sequence[Split], size: Size, dtype: torch.dtype
) -> dict[str, dict[str, Any]]:
    """Medians, their ratios to one rank, and the largest difference of the latents to it."""
    config, alone = size.transformer, rows.get("one rank")
    width = config["attention_head_dim"] * config["num_attention_heads"]
    tokens, blocks = (
        (size.num_image_tokens, size.num_text_tokens),
        config["num_layers"] + config["num_single_layers"],
    )
    latent = 4 * config["in_channels"] * config["max_resolution"][0] * config["max_resolution"][1]
    summed = {}
    for split in splits:
        row: dict[str, Any] = {"ranks": split.size}
        sent = exchanged(split, *tokens, width, blocks, dtype.itemsize, latent)
        row["MiB a full step"] = round(sum(sent) / MIB, 2)
        for cache, one in rows[name_of(split)].items():
            seconds = statistics.median(one["seconds"])
            figures = {
                "seconds": one["seconds"],
                "median": seconds,
                "full step": statistics.median(one["full_step"]),
                "cache MiB a rank": round(one["cache_bytes"] / MIB, 3),
                "peak GiB": None if one["peak_bytes"] is None else round(one["peak_bytes"] / 2**30, 2),
            }
            if alone is not None:
                figures["ratio"] = statistics.median(alone[cache]["seconds"]) / seconds
                figures["largest difference"] = float((one["latents"] - alone[cache]["latents"]).abs().max())
            row[cache] = figures
        summed[name_of(split)] = row
    return summed


def to_markdown(result: dict[str, Any]) -> str:
    """Both tables."""
    lines = ["| arrangement | ranks | MiB a full step | " + " | ".join(f"{one}: s, ratio" for one in CACHES) + " |"]
    lines.append("|---" * (3 + len(CACHES)) + "|")
    for name, row in result["measured"].items():
        cells = [f"{row[one]['median']:.3g}, {row[one].get('ratio', 1):.2f}" for one in CACHES]
        lines.append(f"| {name} | {row['ranks']} | {row['MiB a full step']} | {' | '.join(cells)} |")
    computed = result["expected of HiDream-I1"]
    lines += ["", f"{computed['what']} ({computed['from']})", ""]
    lines.append(f"| arrangement | ranks | MiB a step | {' | '.join(f'{one}: ms, ratio' for one in LINKS)} |")
    lines.append("|---" * (3 + len(LINKS)) + "|")
    for name, row in computed["rows"].items():
        cells = [f"{row[one]['milliseconds']}, {row[one]['ratio']}" for one in LINKS]
        lines.append(f"| {name} | {row['ranks']} | {row['MiB a step']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def make_parser() -> Parser:
    """The flags."""
    parser = Parser("benchmarks.parallel", description=(__doc__ or "").splitlines()[0])
    add_subject_arguments(parser)
    parser.add_argument("--ranks", metavar="N,N", help="numbers of ranks (default: 1,2,4,8 as far as there are GPUs)")
    parser.add_argument("--num_steps", type=int, help="steps of a loop (default: the size's)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds over the arrangements (default: %(default)s)")
    parser.add_argument("--loops", type=int, default=2, help="timed loops of a round (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and inputs (default: %(default)s)")
    for name in ("--found", "--ulysses"):  # of the runs that it starts
        parser.add_argument(name, type=Path if name == "--found" else int, help=argparse.SUPPRESS)
    parser.add_argument("--guidance_parallel", action="store_true", help=argparse.SUPPRESS)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; exit codes as every script's."""
    return run_script(run, make_parser(), argv)


if __name__ == "__main__":
    raise SystemExit(main())
