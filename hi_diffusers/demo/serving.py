"""Serves the page: its address, its users, and the clean-up of its files."""

import contextlib
import os
import shutil
import signal
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hi_diffusers.console import say
from hi_diffusers.demo.logs import keep_short
from hi_diffusers.denoising.ranks import Ranks
from hi_diffusers.service.origins import LOOPBACK, Origins, check_certificate, is_loopback

if TYPE_CHECKING:
    import gradio as gr
    from starlette.responses import JSONResponse

AUTH_VARIABLE = "HIDREAM_DEMO_AUTH"
WATCH_SECONDS = 1.0
SWEEP_SECONDS = 60.0
LEAVE_SECONDS = 8.0  # until the process ends although something still runs
QUICK_WAITS = 1000  # events that may wait besides the drawings; each is done in a moment
DRAWING = "drawing"  # gradio's queue of all drawings, one at a time
NUM_SESSIONS = 1000  # number of visits whose state is kept


@dataclass(frozen=True)
class ServingSettings:
    """How the page is served; the values are checked on creation.

    Attributes:
        host, port: address to listen at; port None is the first free one from 7860 on.
        share: make a public link through gradio's servers.
        auth: names and passwords.
        no_auth: let a page that others can reach go without passwords.
        max_queue: maximum number of waiting drawings.
        root_path: prefix that a proxy puts before all paths.
        ssl_certfile, ssl_keyfile: certificate and private key for https.
        allowed_hosts, allow_origins: see `Origins`.
    """

    host: str = LOOPBACK
    port: int | None = None
    share: bool = False
    auth: tuple[tuple[str, str], ...] = ()
    no_auth: bool = False
    max_queue: int = 20
    root_path: str = ""
    ssl_certfile: Path | None = None
    ssl_keyfile: Path | None = None
    allowed_hosts: tuple[str, ...] = ()
    allow_origins: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        Origins(self.allowed_hosts, self.allow_origins)
        if self.port is not None and not 1 <= self.port <= 65535:
            raise ValueError(f"port must be from 1 to 65535, got {self.port}")
        if not 1 <= self.max_queue <= 10_000:
            raise ValueError(f"max_queue must be from 1 to 10000, got {self.max_queue}")
        if self.root_path and not self.root_path.startswith("/"):
            raise ValueError(f"root_path must begin with a slash, got {self.root_path!r}")
        check_certificate(self.ssl_certfile, self.ssl_keyfile)
        if self.auth and self.no_auth:
            raise ValueError("no_auth has no effect with --auth: drop one of them")
        if not self.auth and not self.no_auth and (self.share or not is_loopback(self.host)):
            where = "share" if self.share else f"host {self.host}"
            raise ValueError(f"{where} lets others use the page: give --auth, or --no_auth to let everybody use it")


def read_auth(text: str | None, environment: Mapping[str, str] = os.environ) -> tuple[tuple[str, str], ...]:
    """Names and passwords.

    Args:
        text: "user:password", a file of such lines, or "environment": the variable HIDREAM_DEMO_AUTH holds either.

    Raises:
        ValueError: if there are none.
    """
    if text is None:
        return ()
    if text == "environment":
        text = environment.get(AUTH_VARIABLE, "")
        if not text:
            raise ValueError(f"auth environment needs {AUTH_VARIABLE}, which is not set")
    path = Path(text)
    lines = path.read_text(encoding="utf-8").splitlines() if ":" not in text and path.is_file() else [text]
    pairs = tuple(_pair(line) for line in lines if line.strip())
    if not pairs:
        raise ValueError(f"auth {path} must hold lines user:password, but is empty")
    return pairs


def _pair(line: str) -> tuple[str, str]:
    name, colon, password = line.strip().partition(":")
    if not (name and colon and password):
        raise ValueError(
            "auth must be user:password, a file of such lines, or environment"
        )  # the line may hold a password, so it is not shown
    return name, password


def sweep(folder: Path, kept_seconds: float) -> None:
    """Remove files that were not used for `kept_seconds`, and the folders that become empty."""
    now = time.time()
    for path in sorted(folder.rglob("*"), reverse=True):  # a folder's content comes before the folder
        with contextlib.suppress(OSError):  # used or removed meanwhile, or a folder that is not empty
            age = now - path.stat().st_mtime
            if path.is_dir() and age > SWEEP_SECONDS:  # a new folder may be about to receive a file
                path.rmdir()
            elif path.is_file() and age > kept_seconds:
                path.unlink()


def leave_after(seconds: float, folder: Path) -> None:
    """End the process after a while, whatever still runs in it, without the folder of its files."""

    def leave() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        os._exit(0)

    timer = threading.Timer(seconds, leave)
    timer.daemon = True
    timer.start()


async def _refuse_fields(*_: Any) -> "JSONResponse":
    """Answer a request whose fields are not the API's, without repeating them."""
    from starlette.responses import JSONResponse

    return JSONResponse({"detail": "the request's fields are not those of the API"}, 422)


def serve(
    blocks: "gr.Blocks",
    settings: ServingSettings,
    folder: Path,
    upload_bytes: int,
    kept_seconds: float,
    ranks: Ranks | None = None,
) -> None:
    """Serve a page until Ctrl-C or SIGTERM.

    Args:
        folder: folder of all files that it serves.
        upload_bytes: maximum size of an uploaded file.
        kept_seconds: how long files are kept.
        ranks: the processes that draw together.

    Raises:
        ValueError: if the port is taken.
        RuntimeError: if the processes lost each other.
    """
    import gradio.queueing
    import gradio.routes
    from fastapi.exceptions import RequestValidationError
    from starlette.middleware import Middleware
    from starlette.middleware.cors import CORSMiddleware

    from hi_diffusers.demo.gate import Gate
    from hi_diffusers.demo.looks import theme
    from hi_diffusers.demo.turns import Turns

    keep_short((gradio.routes, gradio.queueing))
    stop = threading.Event()
    blocks.queue(max_size=settings.max_queue + QUICK_WAITS, api_open=False)
    hosts = (settings.host, *settings.allowed_hosts)
    origins = Origins(hosts, settings.allow_origins, settings.share)
    turns = Turns(blocks._queue, DRAWING, settings.max_queue)
    gate = Middleware(Gate, root_path=settings.root_path, upload_bytes=upload_bytes, origins=origins, turns=turns)
    cors = Middleware(
        CORSMiddleware,
        allow_origins=settings.allow_origins,
        allow_credentials=True,
        allow_methods=["*"],
        allow_headers=["*"],
    )
    try:
        app, url, shared = blocks.launch(
            server_name=settings.host,
            server_port=settings.port,
            share=settings.share,
            auth=list(settings.auth) or None,
            root_path=settings.root_path or None,
            ssl_certfile=settings.ssl_certfile and str(settings.ssl_certfile),
            ssl_keyfile=settings.ssl_keyfile and str(settings.ssl_keyfile),
            ssl_verify=False,  # gradio first visits its own page, under a name that the certificate does not have
            max_file_size=upload_bytes,
            theme=theme(),
            css_paths=[Path(__file__).with_name("style.css")],
            app_kwargs={"middleware": [gate, cors], "exception_handlers": {RequestValidationError: _refuse_fields}},
            state_session_capacity=NUM_SESSIONS,
            prevent_thread_lock=True,
            quiet=True,
            show_error=False,
            ssr_mode=False,
            mcp_server=False,
            enable_monitoring=False,
            run_history=False,
            footer_links=[],
        )
    except OSError as error:
        raise ValueError(f"port {settings.port or 7860} of {settings.host} cannot be used: {error}") from error
    # gradio's own answer to other origins, "welcome, with your user's cookie", stands outside of the gate.
    app.user_middleware = [one for one in app.user_middleware if one.cls in (Gate, CORSMiddleware)]
    app.middleware_stack = app.build_middleware_stack()
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: stop.set())
        print(f"serving at {url}", flush=True)
        if settings.share:
            print(f"shared at {shared}" if shared else "no public link could be made", flush=True)
        swept = time.monotonic()
        while not stop.wait(WATCH_SECONDS):
            if ranks is not None:
                ranks.check_in_touch()
            if time.monotonic() > swept + min(SWEEP_SECONDS, kept_seconds):
                swept = time.monotonic()
                sweep(folder, kept_seconds)
        say("stopping")
    finally:
        leave_after(LEAVE_SECONDS, folder)
        blocks.close(verbose=False)
