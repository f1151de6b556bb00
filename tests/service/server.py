"""A real server in a process of its own, on this machine's loopback."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

from tests.demo.server import ROOT, Server


def free_port() -> int:
    """A port that nobody listens to."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


@contextlib.contextmanager
def running(folder: Path, *flags: Any, ends: bool = True) -> Iterator[Server]:
    """Serve until the block is left; then it must end by itself and leave nothing behind.

    Args:
        ends: whether SIGTERM is sent at the end; False if the block does it.
    """
    folder.mkdir(exist_ok=True)
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "serve.py"), "--port", str(port), "--device", "cpu", *map(str, flags)],
        env=os.environ | {"TMPDIR": str(folder), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    server = Server(f"http://127.0.0.1:{port}", process, folder)

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            server.log.append(line.rstrip())

    threading.Thread(target=read, daemon=True).start()
    try:
        wait_until_ready(server)
        yield server
        if ends:
            process.send_signal(signal.SIGTERM)
        assert process.wait(90) == 0, server.log
        assert server.written() == [], "temporary files were left behind"
    finally:
        process.kill()


def wait_until_ready(server: Server, seconds: float = 120) -> None:
    """Wait until the model is loaded."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        assert server.process.poll() is None, server.log
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"{server.url}/ready").status_code == 200:
                return
        time.sleep(0.1)
    raise AssertionError(server.log)
