"""OpenAI's images API from one loaded model: `python serve.py`."""

import argparse
import asyncio
import contextlib
import logging
import signal
import socket
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hi_diffusers import __version__
from hi_diffusers.commands.together import mute_followers, work_together
from hi_diffusers.console import Parser, Refusal, name_flag, quiet_libraries, require, run_script, say
from hi_diffusers.denoising.ranks import Ranks
from hi_diffusers.engine.cluster import check_reachable
from hi_diffusers.engine.session import Session
from hi_diffusers.families.table import DEFAULT_MODEL, PRESETS
from hi_diffusers.flags import (
    add_calibration_argument,
    add_limit_arguments,
    add_model_arguments,
    add_rank_arguments,
    add_server_arguments,
    placement_from,
    safety_from,
    source_from,
)
from hi_diffusers.pictures.safety import SafetyChecker
from hi_diffusers.request.placement import Placement
from hi_diffusers.service.offered import offer_models
from hi_diffusers.service.origins import LOOPBACK, Origins, check_certificate, is_loopback
from hi_diffusers.service.requests import Limits, Request, check

if TYPE_CHECKING:
    from hi_diffusers.service.measures import Measures
    from hi_diffusers.service.queueing import BatchQueue
    from hi_diffusers.service.records import Records

DESCRIPTION = "Serve OpenAI's images API with HiDream-I1 (or the bundled small model), most steps forecast."
LEAVE_SECONDS = 5  # for answers that are being sent when the drawings have ended
WATCH_SECONDS = 1.0
MAX_REPLICAS = 1000
LOGGERS = ("uvicorn.error", "uvicorn.access", "fastapi", "asyncio")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Exit codes: 0 stopped by Ctrl-C or SIGTERM, 2 refused before weights are read, 1 failed."""
    return run_script(run, build_parser(), argv)


def build_parser() -> Parser:
    """The command line's parser."""
    parser = Parser(prog="serve.py", description=DESCRIPTION, version=__version__)
    serving = parser.add_argument_group("serving")
    serving.add_argument("--host", default=LOOPBACK, help="address to listen at (default: %(default)s, this machine)")
    serving.add_argument("--port", type=int, default=8000, help="port (default: %(default)s)")
    serving.add_argument(
        "--api_key",
        type=Path,
        metavar="FILE",
        help="who may ask: lines NAME KEY [pixels=N] [steps=N] [n=N] [per_minute=N]",
    )
    serving.add_argument("--no_auth", action="store_true", help="let everybody who can reach the server use it")
    serving.add_argument(
        "--model_alias", action="append", default=[], metavar="NAME", help="further name of the model; repeatable"
    )
    serving.add_argument("--public_url", default="", metavar="URL", help="address before the paths of pictures' URLs")
    serving.add_argument("--log_prompts", action="store_true", help="log prompts, which are not logged by default")
    add_server_arguments(serving)
    queue = parser.add_argument_group("queue")
    queue.add_argument(
        "--max_batch", type=int, default=4, help="pictures of equal settings drawn together (default: %(default)s)"
    )
    queue.add_argument(
        "--batch_wait_ms",
        type=float,
        default=20.0,
        help="milliseconds that a picture waits for others to join its batch (default: %(default)s)",
    )
    queue.add_argument("--max_queue", type=int, default=64, help="pictures that may wait (default: %(default)s)")
    queue.add_argument(
        "--deadline", type=float, default=600.0, help="seconds from a request to its answer (default: %(default)s)"
    )
    queue.add_argument(
        "--drain_seconds",
        type=float,
        default=60.0,
        help="seconds that SIGTERM leaves for what was admitted (default: %(default)s)",
    )
    queue.add_argument(
        "--unload_encoders_after",
        type=float,
        metavar="SECONDS",
        help="load text encoders apart, and free them after that long without a request",
    )
    scale = parser.add_argument_group("several GPUs or machines, a replica of the model on each")
    scale.add_argument(
        "--engine",
        choices=("local", "ray"),
        default="local",
        help="what draws: this process, or replicas on a Ray cluster by Ray Serve (default: %(default)s)",
    )
    scale.add_argument("--ray_address", help="address of a running Ray cluster (default: start one here)")
    scale.add_argument(
        "--replicas",
        type=_replicas,
        metavar="N|MIN-MAX",
        help="number of replicas; between two numbers it follows the queue (default: 1)",
    )
    add_limit_arguments(parser)
    add_rank_arguments(parser)
    add_model_arguments(parser)
    add_calibration_argument(parser)
    return parser


def _replicas(text: str) -> tuple[int, int]:
    """The least and the largest number of replicas, from N or MIN-MAX."""
    least, dash, most = text.partition("-")
    if not (least.isdecimal() and (most.isdecimal() or not dash) and len(text) < 12):
        raise argparse.ArgumentTypeError(f"must be N or MIN-MAX such as 1-4, got {text!r}")
    found = int(least), int(most or least)
    if not 1 <= found[0] <= found[1] <= MAX_REPLICAS:
        raise argparse.ArgumentTypeError(f"must be from 1 to {MAX_REPLICAS}, the smaller one first, got {text!r}")
    return found


def run(args: argparse.Namespace) -> None:
    """Serve until SIGTERM or Ctrl-C.

    Raises:
        Refusal: if the request cannot be carried out, before weights are read.
    """
    try:
        mute_followers(args)
        _check(args)
    except ValueError as error:
        raise Refusal(name_flag(str(error), args)) from error
    work_together(args, args.device, partial(_run, args))


def _run(args: argparse.Namespace, ranks: Ranks | None, device: str) -> None:
    """Serve in this process, the only one or the first of those that draw together; `device` is its own."""
    with tempfile.TemporaryDirectory(prefix="hidream-serve-") as folder:
        try:
            for module in ("fastapi", "uvicorn", "prometheus_client"):
                require(module, "serve", "serve.py")
            asyncio.run(_serve(args, Path(folder), ranks, device))
        except ValueError as error:
            raise Refusal(name_flag(str(error), args)) from error


def _check(args: argparse.Namespace) -> None:
    for name, low, high in (
        ("port", 1, 65535),
        ("max_batch", 1, 256),
        ("max_queue", 1, 10_000),
        ("batch_wait_ms", 0, 60_000),
        ("deadline", 1, 86_400),
        ("drain_seconds", 0, 86_400),
        ("unload_encoders_after", 1, 86_400),
    ):
        value = getattr(args, name)
        if value is not None and not low <= value <= high:
            raise ValueError(f"{name} must be from {low} to {high}, got {value:g}")
    for name in ("ray_address", "replicas"):
        if getattr(args, name) is not None and args.engine != "ray":
            raise ValueError(f"{name} has no effect without --engine ray")
    if args.engine == "ray":
        for name in ("unload_encoders_after", "guidance_parallel"):
            if getattr(args, name):
                raise ValueError(f"{name} has no effect with --engine ray")
        if args.ulysses > 1:
            raise ValueError("ulysses has no effect with --engine ray: a replica draws alone")
        check_reachable(args.ray_address)
    check_certificate(args.ssl_certfile, args.ssl_keyfile)
    if args.api_key is not None and args.no_auth:
        raise ValueError("no_auth has no effect with --api_key: drop one of them")
    if args.api_key is None and not args.no_auth and not is_loopback(args.host):
        raise ValueError(f"host {args.host} lets others draw: give --api_key, or --no_auth to let everybody do it")


async def _serve(args: argparse.Namespace, folder: Path, ranks: Ranks | None, device: str) -> None:
    from hi_diffusers.service.keys import Keys

    limits = Limits(prompt_chars=args.max_prompt_chars, num_steps=args.max_steps, num_images=args.max_images)
    origins, keys = Origins((args.host, *args.allowed_host), tuple(args.allow_origin)), Keys(args.api_key)
    placement, source, chosen = placement_from(args), source_from(args), args.model_type or DEFAULT_MODEL
    if ranks is not None:
        ranks.check_one_group()
        placement = replace(placement, device=device)
    session = Session(PRESETS[chosen], source, placement)
    if args.engine == "local":  # replicas have their own machines
        for notice in session.check():
            say(notice)
    assert session.files  # missing files are refused before the server is made
    model = offer_models(chosen, source, args.calibration_dir)[chosen]
    quiet_libraries()
    import uvicorn

    from hi_diffusers.service.api import Service, ServiceSettings, make_app
    from hi_diffusers.service.door import Door
    from hi_diffusers.service.files import Files
    from hi_diffusers.service.measures import Measures
    from hi_diffusers.service.records import JsonHandler, Records

    example = check({"prompt": PRESETS[chosen].example}, limits, {chosen: model})
    records, measures = Records(args.log_prompts), Measures()
    with _listening(args.host, args.port) as listener:
        engine = _start(args, ranks, placement, example, measures, records)
        try:
            measures.watch(engine)
            settings = ServiceSettings(limits, args.deadline, tuple(args.model_alias), args.public_url.rstrip("/"))
            service = Service(engine, model, settings, keys, Files(folder), measures, records)
            app = Door(make_app(service), origins, measures, records, 2 * limits.upload_bytes)
            for name in LOGGERS:
                logger = logging.getLogger(name)
                logger.handlers, logger.propagate = [JsonHandler(records)], False
            config = uvicorn.Config(
                app,
                ssl_certfile=args.ssl_certfile,
                ssl_keyfile=args.ssl_keyfile,
                log_config=None,
                access_log=False,
                log_level="warning",
                limit_concurrency=4 * args.max_queue + 64,
                timeout_graceful_shutdown=LEAVE_SECONDS,
                server_header=False,
            )
            scheme = "http" if args.ssl_certfile is None else "https"
            print(f"serving at {scheme}://{args.host}:{args.port}", flush=True)
            await _until_stopped(uvicorn.Server(config), listener, engine, records, args.drain_seconds, ranks)
        except BaseException:
            engine.drain(0)
            raise


def _start(
    args: argparse.Namespace,
    ranks: Ranks | None,
    placement: Placement,
    example: Request,
    measures: "Measures",
    records: "Records",
) -> "BatchQueue":
    """Start what draws, here or on a cluster."""
    from hi_diffusers.service.engine import Engine
    from hi_diffusers.service.loader import Loader

    safety = safety_from(args)
    queue = {
        "max_batch": args.max_batch,
        "batch_wait": args.batch_wait_ms / 1000,
        "max_queue": args.max_queue,
        "is_withheld": None if safety is None else SafetyChecker(safety, "cpu").judges,
        "on_batch": measures.note_batch,
        "say": records.say,
    }
    if args.engine == "ray":
        from hi_diffusers.service.ray_engine import RayEngine, Recipe, replicas_of

        recipe = Recipe(placement, args.vram, args.max_batch, example)
        return RayEngine(*replicas_of(recipe, args.replicas or (1, 1)), args.ray_address, **queue)
    separate = args.unload_encoders_after is not None
    loader = Loader(placement, args.vram, separate, batch_size=args.max_batch, ranks=ranks)
    return Engine(loader, example, idle_encoders=args.unload_encoders_after, **queue)


def _listening(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise ValueError(f"port {port} of {host} cannot be used: {error.strerror}") from error


async def _until_stopped(
    server: Any,
    listener: socket.socket,
    engine: "BatchQueue",
    records: "Records",
    drain_seconds: float,
    ranks: Ranks | None,
) -> None:
    """Serve until a signal; then finish what was admitted. SIGHUP loads the model again."""
    loop, stopping = asyncio.get_running_loop(), asyncio.Event()
    server.capture_signals = contextlib.nullcontext  # uvicorn would answer them at once
    loop.add_signal_handler(signal.SIGHUP, engine.reload)
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stopping.set)
    serving, stopped = asyncio.create_task(server.serve([listener])), asyncio.create_task(stopping.wait())
    while not serving.done() and not stopped.done() and not (ranks is not None and ranks.is_lost):
        await asyncio.wait({serving, stopped}, return_when=asyncio.FIRST_COMPLETED, timeout=WATCH_SECONDS)
    records.write("draining", seconds=drain_seconds)
    is_finished = await loop.run_in_executor(None, engine.drain, drain_seconds)
    records.write("drained", finished=is_finished)
    server.should_exit = True
    stopped.cancel()
    await serving
    if ranks is not None:
        ranks.check_in_touch()
