"""A web page that draws, shows progress, and compares cached with uncached: `python gradio_demo.py`."""

import argparse
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from hi_diffusers import __version__
from hi_diffusers.commands.together import mute_followers, work_together
from hi_diffusers.console import Parser, Refusal, name_flag, quiet_libraries, require, run_script, say
from hi_diffusers.demo.serving import AUTH_VARIABLE, ServingSettings, read_auth
from hi_diffusers.demo.stock_requests import StockOffer
from hi_diffusers.denoising.ranks import Ranks
from hi_diffusers.engine.session import Session
from hi_diffusers.families.table import DEFAULT_MODEL, PRESETS
from hi_diffusers.flags import (
    FOR_PIPELINES,
    add_calibration_argument,
    add_limit_arguments,
    add_model_arguments,
    add_pipeline_arguments,
    add_rank_arguments,
    add_server_arguments,
    check_pipeline_flags,
    placement_from,
    safety_from,
    source_from,
    stock_source_from,
)
from hi_diffusers.pictures.safety import SafetyChecker
from hi_diffusers.service.offered import LoraFolder, OfferedModel, offer_models
from hi_diffusers.service.origins import LOOPBACK, is_loopback
from hi_diffusers.service.requests import Limits, check

DESCRIPTION = "Serve a page that draws with HiDream-I1 (or the bundled small model), most steps forecast."


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Exit codes: 0 stopped by Ctrl-C or SIGTERM, 2 refused before weights are read, 1 failed."""
    return run_script(run, build_parser(), argv)


def build_parser() -> Parser:
    """The command line's parser."""
    parser = Parser(prog="gradio_demo.py", description=DESCRIPTION, version=__version__)
    serving = parser.add_argument_group("serving")
    serving.add_argument("--host", default=LOOPBACK, help="address to listen at (default: %(default)s, this machine)")
    serving.add_argument("--port", type=int, help="port (default: the first free one from 7860 on)")
    serving.add_argument("--share", action="store_true", help="make a public link through gradio's servers")
    serving.add_argument(
        "--auth",
        metavar="USER:PASSWORD|FILE|environment",
        help="who may see the page: one pair (visible to others on this machine), a file with one pair per line, or the"
        f" word environment to read the variable {AUTH_VARIABLE}",
    )
    serving.add_argument("--no_auth", action="store_true", help="let everybody who can reach the page use it")
    serving.add_argument(
        "--max_queue", type=int, default=20, help="maximum number of waiting drawings (default: %(default)s)"
    )
    serving.add_argument("--root_path", default="", help="path under which a proxy serves the page, e.g. /hidream")
    serving.add_argument(
        "--lora_folder",
        type=Path,
        metavar="FOLDER",
        help="folder of .safetensors LoRAs that visitors may choose from, by their names",
    )
    serving.add_argument(
        "--upscaler",
        type=Path,
        metavar="FILE",
        help="super-resolution network that enlarges pictures, any that spandrel reads (default: Lanczos' filter)",
    )
    serving.add_argument(
        "--allow_download",
        action="store_true",
        help="let whoever sees the page download models to this machine; refused where others could see it",
    )
    add_server_arguments(serving)
    add_limit_arguments(parser)
    add_rank_arguments(parser)
    add_model_arguments(parser)
    add_pipeline_arguments(parser)
    add_calibration_argument(parser)
    return parser


def run(args: argparse.Namespace) -> None:
    """Serve the page until it is stopped.

    Raises:
        Refusal: if the request cannot be carried out, before weights are read.
    """
    try:
        mute_followers(args)
        check_pipeline_flags(args)
    except ValueError as error:
        raise Refusal(name_flag(str(error), args)) from error
    work_together(args, args.device, partial(_run, args))


def _run(args: argparse.Namespace, ranks: Ranks | None, device: str) -> None:
    """Serve in this process, the only one or the first of those that draw together; `device` is its own."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    with tempfile.TemporaryDirectory(prefix="hidream-demo-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder  # all files that gradio writes and serves
        try:
            _serve(args, Path(folder), ranks, device)
        except ValueError as error:
            raise Refusal(name_flag(str(error), args)) from error


def _serve(args: argparse.Namespace, folder: Path, ranks: Ranks | None, device: str) -> None:
    for module in ("gradio", "skimage"):
        require(module, "page", "the page")
    settings = ServingSettings(
        host=args.host,
        port=args.port,
        share=args.share,
        auth=read_auth(args.auth),
        no_auth=args.no_auth,
        max_queue=args.max_queue,
        root_path=args.root_path.rstrip("/"),
        ssl_certfile=args.ssl_certfile,
        ssl_keyfile=args.ssl_keyfile,
        allowed_hosts=tuple(args.allowed_host),
        allow_origins=tuple(args.allow_origin),
    )
    reached = args.share or args.root_path or args.allowed_host or args.allow_origin or not is_loopback(args.host)
    if args.allow_download and reached:
        raise ValueError("allow_download lets whoever sees the page fill this disk: serve it to this machine alone")
    limits = Limits(prompt_chars=args.max_prompt_chars, num_steps=args.max_steps, num_images=args.max_images)
    if args.pipeline is not None:
        _serve_pipeline(args, settings, limits, folder)
        return
    placement, source, chosen = placement_from(args), source_from(args), args.model_type or DEFAULT_MODEL
    if ranks is not None:
        ranks.check_one_group()
        placement = replace(placement, device=device)
    session, safety = Session(PRESETS[chosen], source, placement), safety_from(args)
    for notice in session.check():
        say(notice)
    assert session.files  # missing files are refused before the page is made
    loras = LoraFolder(args.lora_folder)
    if args.lora_folder is not None:
        require("peft", "lora", "lora_folder")
    if args.upscaler is not None:
        require("spandrel", "upscaler", "upscaler")

    def offer() -> Mapping[str, OfferedModel]:
        return offer_models(chosen, source, args.calibration_dir)

    models = offer()
    say("loading the page's libraries")
    quiet_libraries()
    from hi_diffusers.demo.page import KEPT_SECONDS, Page
    from hi_diffusers.demo.serving import serve
    from hi_diffusers.demo.studio import Studio
    from hi_diffusers.pictures.enlarging import Enlarger
    from hi_diffusers.service.loader import Loader

    checker = None if safety is None else SafetyChecker(safety, "cpu")
    loader = Loader(placement, args.vram, ranks=ranks)
    enlarger = Enlarger(args.upscaler, loader.device)
    studio = Studio(loader, None if checker is None else checker.judges)
    try:
        page = Page(models, chosen, studio, loader, limits, loras, enlarger, offer if args.allow_download else None)
        studio.warm_up(check({"model": chosen, "prompt": PRESETS[chosen].example}, limits, models))
        if settings.no_auth and not settings.share:
            say(f"everybody who reaches {settings.host} may draw here")
        serve(page.blocks, settings, folder, limits.upload_bytes, KEPT_SECONDS, ranks)
    finally:
        studio.close()


def _serve_pipeline(args: argparse.Namespace, settings: ServingSettings, limits: Limits, folder: Path) -> None:
    """Serve the page of a pipeline of diffusers."""
    for name in FOR_PIPELINES:
        if getattr(args, name):
            raise ValueError(f"{name} has no effect here: visitors choose it")
    for name in ("lora_folder", "upscaler", "allow_download"):
        if getattr(args, name):
            raise ValueError(f"{name} has no effect with --pipeline")
    safety = safety_from(args)
    say("loading the page's libraries")
    quiet_libraries()
    source = stock_source_from(args)
    offer = StockOffer(source, args.calibration_dir, limits)
    source.check()
    from hi_diffusers.demo.page import KEPT_SECONDS
    from hi_diffusers.demo.serving import serve
    from hi_diffusers.demo.stock_page import StockPage

    checker = None if safety is None else SafetyChecker(safety, "cpu")
    page = StockPage(offer, None if checker is None else checker.judges)
    try:
        page.warm_up()
        serve(page.blocks, settings, folder, limits.upload_bytes, KEPT_SECONDS)
    finally:
        page.close()
