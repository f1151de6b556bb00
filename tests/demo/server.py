"""The real page in a process of its own, on this machine's loopback."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Server:
    """A running page.

    Attributes:
        url: where.
        process: of it.
        log: lines that it wrote.
        folder: that its temporary files lie in.
        seconds: from the command to the page.
    """

    url: str
    process: subprocess.Popen[str]
    folder: Path
    log: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def rss(self) -> float:
        """MiB of memory."""
        return psutil.Process(self.process.pid).memory_info().rss / 2**20

    def written(self) -> list[Path]:
        """Its files."""
        return [path for path in self.folder.rglob("*") if path.is_file()]


@contextlib.contextmanager
def running(folder: Path, *flags: Any, environment: dict[str, str] | None = None) -> Iterator[Server]:
    """Serve until the block is left; then it must end by itself and leave nothing behind."""
    folder.mkdir(exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    began = time.monotonic()
    variables = os.environ | {"TMPDIR": str(folder), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "gradio_demo.py"), "--port", str(port), "--device", "cpu", *map(str, flags)],
        env=variables | (environment or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    server = Server(f"http://127.0.0.1:{port}", process, folder)
    serving, loaded = threading.Event(), threading.Event()

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            server.log.append(line.rstrip())
            serving.set() if "serving at" in line else None
            loaded.set() if "is loaded" in line else None
        serving.set()
        loaded.set()

    threading.Thread(target=read, daemon=True).start()
    try:
        assert serving.wait(120) and process.poll() is None, server.log
        server.seconds = time.monotonic() - began
        assert loaded.wait(120) and process.poll() is None, server.log
        yield server
        assert process.poll() is None, f"the server ended: {server.log}"
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            assert process.wait(10) == 0, server.log
        finally:
            process.kill()
    assert server.written() == [], "temporary files were left behind"
