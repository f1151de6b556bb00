"""Pictures that a server keeps for a while: those behind its URLs, and uploads that wait."""

import contextlib
import re
import secrets
import time
from pathlib import Path

KEPT_SECONDS, MAX_FILES = 3600.0, 2000


class Files:
    """Files of unguessable names in a folder; the oldest are removed.

    Args:
        folder: an empty folder of its own.
    """

    def __init__(self, folder: Path):
        self._folder = folder

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
        self.sweep()
        path = self._folder / f"{secrets.token_urlsafe(24)}{suffix}"
        path.write_bytes(data)
        return path

    def sweep(self) -> None:
        """Remove what is older than an hour, and the oldest beyond MAX_FILES."""
        found = sorted(self._folder.iterdir(), key=_age)
        now = time.time()
        for number, path in enumerate(found):
            if number >= MAX_FILES - 1 or _age(path, now) > KEPT_SECONDS:
                path.unlink(missing_ok=True)


def _age(path: Path, now: float | None = None) -> float:
    with contextlib.suppress(OSError):  # removed meanwhile
        return (time.time() if now is None else now) - path.stat().st_mtime
    return 0.0
