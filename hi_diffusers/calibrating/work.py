"""The folder of a calibration's unfinished work: whose it is, that nobody else works in it, and what in it is ours."""

import contextlib
import fcntl
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hi_diffusers.pictures.metadata import write_atomically

SETTINGS, TRIALS, LOCK = "settings.json", "trials.jsonl", "lock"
OWN = re.compile(r"settings\.json|trials\.jsonl|lock|picture-\d{4,}\.(?:pt|partial)|\.(?:settings|trials)\..*\.tmp")


class WorkFolder:
    """A folder of unfinished work.

    Args:
        path: made if it is not there.

    Raises:
        OSError: if it cannot be made.
        ValueError: if it is a symbolic link, through which somebody else's files could be removed.
    """

    def __init__(self, path: Path):
        if path.is_symlink():
            raise ValueError(f"{path} is a symbolic link, and must be a folder: remove it")
        path.mkdir(parents=True, exist_ok=True)
        self.path = path

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other runs out.

        Raises:
            ValueError: if another one is at work.
        """
        with (self.path / LOCK).open("ab") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(f"{self.path} is in use: another calibrate.py works for the same model") from None
            yield

    def claim(self, settings: dict[str, Any]) -> list[str]:
        """Note whose work it is.

        Args:
            settings: all that the pictures' bits depend on, JSON values.

        Returns:
            A sentence if what is there cannot be told to be of these settings, and is drawn anew.

        Raises:
            ValueError: if it holds the work of other settings.
        """
        text, path, notices = json.dumps(settings), self.path / SETTINGS, []
        if path.is_file():
            found = path.read_bytes()
            try:
                json.loads(found)
            except (ValueError, RecursionError):
                notices.append(f"{path} was torn: the unfinished work is drawn anew")
                self.clear()
            else:
                if found != text.encode():
                    raise ValueError(
                        f"{self.path} holds the unfinished work of other settings: finish that, or delete the folder"
                    )
        if not path.is_file():
            write_atomically(path, text.encode())
        return notices

    def clear(self) -> None:
        """Remove this software's own files; whatever else lies there stays."""
        for path in self.path.iterdir():
            if OWN.fullmatch(path.name) and path.name != LOCK and (path.is_symlink() or path.is_file()):
                path.unlink()

    def remove(self) -> None:
        """Remove this software's own files, and the folder where nothing else is left."""
        self.clear()
        (self.path / LOCK).unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self.path.rmdir()
