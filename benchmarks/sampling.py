"""What batching brings to a whole run: sampling.py over a prompt file at several batch sizes.

    python -m benchmarks.sampling DrawBench200.txt

Every run is the command of a user, a process of its own that loads the model, encodes every prompt (its embeddings
cache is empty) and writes all files. The time is the whole process's; the manifest gives the denoising's part of it.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.report import RESULTS, environment, write_json
from hi_diffusers.console import Parser, Refusal, refuse_errors, run_script
from hi_diffusers.families.table import PRESETS
from hi_diffusers.runs.manifest import MANIFESTS, sha256_of

ROOT = Path(__file__).parents[1]
CACHES = ("off", "taylorseer", "best")


def measure(model_type: str, prompt_file: Path, cache: str, batch_size: int, folder: Path) -> dict[str, Any]:
    """Run sampling.py once, into a new folder below `folder`.

    Raises:
        Refusal: with the run's last line, if it fails.
    """
    output = folder / f"{cache}-{batch_size}"
    command = [sys.executable, str(ROOT / "sampling.py"), "--prompt_file", str(prompt_file)]
    command += ["--output_dir", str(output), "--model_type", model_type, "--cache", cache]
    command += ["--batch_size", str(batch_size), "--add_sampling_metadata"]
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as empty:
        variables = os.environ | {"XDG_CACHE_HOME": empty}
        done = subprocess.run(command, env=variables, capture_output=True, encoding="utf-8", check=False)
    seconds = time.perf_counter() - started
    if done.returncode:
        raise Refusal(f"{' '.join(command[1:])} failed: {done.stderr.strip().splitlines()[-1]}")
    texts = [path.read_text(encoding="utf-8") for path in output.glob(MANIFESTS)]
    lines = [json.loads(line) for text in texts for line in text.splitlines()]
    return {
        "cache": cache,
        "batch_size": batch_size,
        "pictures": len(lines),
        "full_steps": lines[0]["full_steps"],
        "seconds": round(seconds, 2),
        "pictures_per_second": round(len(lines) / seconds, 3),
        "drawing_seconds": round(sum(line["seconds"] for line in lines), 2),
    }


def run(args: argparse.Namespace) -> None:
    """Measure every batch size with every cache, and write the result."""
    prompts = refuse_errors(args.prompt_file.read_bytes)
    if args.folder.exists():
        raise Refusal(f"{args.folder} is there already: a run in it would go on instead of starting anew")
    args.folder.mkdir(parents=True)
    jobs = [(cache, size) for size in args.batch_sizes for cache in args.caches]
    rows = []
    for cache, size in tqdm(jobs, unit="run"):
        rows.append(measure(args.model_type, args.prompt_file, cache, size, args.folder))
        tqdm.write(json.dumps(rows[-1]))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    content = {
        "what": f"sampling.py over {args.prompt_file.name}: whole processes, loading and encoding included",
        "prompt_file_sha256": sha256_of(prompts),
        "model_type": args.model_type,
        "environment": environment(),
        "rows": rows,
    }
    print(write_json(args.output, f"sampling_{args.model_type}", device, content))


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = Parser(prog="python -m benchmarks.sampling", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("prompt_file", type=Path, help="as sampling.py reads it")
    parser.add_argument("-m", "--model_type", choices=tuple(PRESETS), default="nano", help="default: %(default)s")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 4, 16], help="default: 1 4 16")
    parser.add_argument("--caches", choices=CACHES, nargs="+", default=["off", "taylorseer"], help="default: both")
    parser.add_argument(
        "--folder", type=Path, default=Path("outputs/sampling"), help="of the runs, a new one (default: %(default)s)"
    )
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the result (default: %(default)s)")
    return run_script(run, parser, argv)


if __name__ == "__main__":
    raise SystemExit(main())
