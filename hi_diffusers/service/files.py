"""Pictures that a server keeps for a while: those behind its URLs, and uploads that wait."""

import re
import secrets
import time
from collections import deque
from pathlib import Path

KEPT_SECONDS, MAX_FILES = 3600.0, 2000


class Files:
    """Files of unguessable names in a folder; the oldest are removed.

    Args:
        folder: an empty folder of its own.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._written: deque[tuple[float, Path]] = deque()  # the oldest first

    def add(self, data: bytes, suffix: str) -> str:
        """Keep a picture; returns its name."""
        return self._write(data, f".{suffix}").name

    def keep(self, data: bytes) -> Path:
        """Keep an upload; whoever asks removes it, and nobody else finds it."""
        return self._write(data, "")

    def find(self, name: str) -> Path | None:
        """The file of a picture's name; None if there is none."""
        path = self._folder / name
        return path if re.fullmatch(r"[\w-]{32}\.(png|jpeg|webp)", name, re.ASCII) and path.is_file() else None

    def _write(self, data: bytes, suffix: str) -> Path:
        now = time.monotonic()
        while self._written and (len(self._written) >= MAX_FILES or self._written[0][0] < now - KEPT_SECONDS):
            self._written.popleft()[1].unlink(missing_ok=True)
        path = self._folder / f"{secrets.token_urlsafe(24)}{suffix}"
        path.write_bytes(data)
        self._written.append((now, path))
        return path
