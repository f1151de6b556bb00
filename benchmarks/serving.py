"""Throughput of serve.py by --max_batch: real servers, OpenAI's client, every setting in turn, rounds interleaved.

`python -m benchmarks.serving` writes serving_*.json beside the other results.
"""

import argparse
import contextlib
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import torch

from benchmarks.report import RESULTS, write_json
from hi_diffusers.console import Parser, Refusal, run_script

ROOT = Path(__file__).resolve().parents[1]
PROMPT = "a red circle on a blue background"
START_SECONDS = 300.0


@contextlib.contextmanager
def serving(max_batch: int, flags: Sequence[str]) -> Iterator[str]:
    """A server in a process of its own; gives its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "serve.py", "--port", str(port), "--max_batch", str(max_batch), "--max_queue", "1000"]
    process = subprocess.Popen([*command, *flags], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + START_SECONDS
    try:
        while time.monotonic() < deadline:
            if process.poll() is not None:
                raise Refusal(f"serve.py ended: run {' '.join([*command, *flags])} to see why")
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{url}/ready").status_code == 200:
                    break
            time.sleep(0.2)
        yield url
    finally:
        process.terminate()
        process.wait(120)


def one_round(url: str, clients: int, requests: int) -> dict[str, Any]:
    """Seconds of a round in which every client asks `requests` times, one after the other, and of each answer."""
    ask = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=3600).images.generate

    def visit(number: int) -> list[float]:
        seconds = []
        for turn in range(requests):
            began = time.perf_counter()
            ask(prompt=PROMPT, extra_body={"seed": 1000 * number + turn})
            seconds.append(time.perf_counter() - began)
        return seconds

    began = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        answers = [one for found in pool.map(visit, range(clients)) for one in found]
    return {"seconds": time.perf_counter() - began, "answers": answers}


def run(args: argparse.Namespace) -> None:
    """Measure every --max_batch, and write the result file."""
    batches = [int(word) for word in args.max_batch.split(",")]
    rounds: dict[int, list[dict[str, Any]]] = {size: [] for size in batches}
    with contextlib.ExitStack() as stack:
        urls = {size: stack.enter_context(serving(size, args.flags)) for size in batches}
        for url in urls.values():
            one_round(url, max(batches), 1)  # every batch size was met once
        for _ in range(args.rounds):
            for size, url in urls.items():
                rounds[size].append(one_round(url, args.clients, args.requests))
    rows = [row(size, found, args.clients * args.requests) for size, found in rounds.items()]
    for one in rows:
        print(
            f"max_batch {one['max_batch']}: {one['pictures_per_second']:.2f} pictures/s,"
            f" an answer in {one['median_answer_seconds']:.2f} s (slowest tenth above {one['p90_answer_seconds']:.2f})"
        )
    threads = os.environ.get("OMP_NUM_THREADS", "torch's choice")
    content = {"clients": args.clients, "requests": args.requests, "server_threads": threads, "flags": args.flags}
    print(write_json(args.output, "serving", torch.device("cpu"), content | {"rows": rows, "rounds": rounds}))


def row(max_batch: int, rounds: Sequence[dict[str, Any]], pictures: int) -> dict[str, Any]:
    """The figures of one --max_batch: medians over the rounds."""
    answers = [one for found in rounds for one in found["answers"]]
    return {
        "max_batch": max_batch,
        "pictures_per_second": statistics.median(pictures / found["seconds"] for found in rounds),
        "median_answer_seconds": statistics.median(answers),
        "p90_answer_seconds": statistics.quantiles(answers, n=10)[-1],
    }


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = Parser(prog="python -m benchmarks.serving", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--max_batch", default="1,4,16", help="sizes to compare (default: %(default)s)")
    parser.add_argument("--clients", type=int, default=32, help="that ask at once (default: %(default)s)")
    parser.add_argument("--requests", type=int, default=2, help="of each client in a round (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the result file (default: %(default)s)")
    parser.add_argument("flags", nargs="*", help="flags of serve.py, after --")
    return run_script(run, parser, argv)


if __name__ == "__main__":
    raise SystemExit(main())
