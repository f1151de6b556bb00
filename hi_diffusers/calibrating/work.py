"""The folder of a calibration's unfinished work: its owner, its lock, and the removal of its files."""

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
        path: the folder; made if it does not exist.

    Raises:
        OSError: if it cannot be made.
        ValueError: if it is a symbolic link, through which other files could be removed.
    """

    def __init__(self, path: Path):
        if path.is_symlink():
            raise ValueError(f"{path} is a symbolic link, but must be a folder: remove it")
        path.mkdir(parents=True, exist_ok=True)
        self.path = path

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Lock the folder against other runs.

        Raises:
            ValueError: if another run has locked it.
        """
        with (self.path / LOCK).open("ab") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(f"{self.path} is in use: another calibrate.py is running for the same model") from None
            yield

    def claim(self, settings: dict[str, Any]) -> list[str]:
        """Write the settings of the work into the folder.

        Args:
            settings: all settings that the pictures' bits depend on, JSON values.

        Returns:
            A sentence if the folder's settings are damaged, so that its work is dropped.

        Raises:
            ValueError: if it holds work with other settings.
        """
        text, path, notices = json.dumps(settings), self.path / SETTINGS, []
        if path.is_file():
            found = path.read_bytes()
            try:
                json.loads(found)
            except (ValueError, RecursionError):
                notices.append(f"{path} is damaged: the unfinished work is drawn again")
                self.clear()
            else:
                if found != text.encode():
                    raise ValueError(
                        f"{self.path} holds unfinished work of a run with other settings:"
                        " finish that run, or delete the folder"
                    )
        if not path.is_file():
            write_atomically(path, text.encode())
        return notices

    def clear(self) -> None:
        """Remove this software's own files; other files stay."""
        for path in self.path.iterdir():
            if OWN.fullmatch(path.name) and path.name != LOCK and (path.is_symlink() or path.is_file()):
                path.unlink()

    def remove(self) -> None:
        """Remove this software's own files, and the folder if it is empty then."""
        self.clear()
        (self.path / LOCK).unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self.path.rmdir()
