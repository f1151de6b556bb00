"""Downloads a model's files to the server, for an operator who allowed it."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from hi_diffusers.console import say
from hi_diffusers.families.table import find_family
from hi_diffusers.service.offered import OfferedModel
from hi_diffusers.weights.hub import Download, watched

LOOK_SECONDS = 0.5


@dataclass(frozen=True)
class Fetching:
    """How far a download is.

    Attributes:
        repo: the repository.
        done, whole: bytes.
    """

    repo: str
    done: int
    whole: int


class Fetcher:
    """Downloads one model at a time, in its own thread; a page that is left does not stop it.

    Args:
        look_seconds: seconds between two looks at the disk.
    """

    def __init__(self, look_seconds: float = LOOK_SECONDS):
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="download")
        self._look_seconds = look_seconds
        self._running: dict[str, tuple[Future[None], list[Download]]] = {}

    def fetch(self, model: OfferedModel) -> Iterator[Fetching]:
        """Download a model's missing files; yields how far it is. Whoever asks for the same model watches with.

        Raises:
            ValueError: in one sentence, why it failed and what to do.
        """
        name = model.preset.name
        if name not in self._running or self._running[name][0].done():
            downloads: list[Download] = []
            self._running[name] = self._worker.submit(_fetch, model, downloads.append), downloads
        work, downloads = self._running[name]
        while not work.done():
            time.sleep(self._look_seconds)
            if downloads:
                yield Fetching(downloads[-1].repo, downloads[-1].done(), downloads[-1].size)
        work.result()


def _fetch(model: OfferedModel, tell: Callable[[Download], None]) -> None:
    """Run in the downloading thread."""
    try:
        with watched(tell):
            find_family(model.preset).locate(model.preset, model.source)
        say(f"{model.preset.name} is downloaded")
    except Exception as error:
        say(f"{model.preset.name} was not downloaded: {error}")
        raise
