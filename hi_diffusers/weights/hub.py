"""Model files from the hub: found on the disk, or downloaded after a message with size and folder."""

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import (  # type: ignore[attr-defined]
    DryRunError,
    GatedRepoError,
    HFValidationError,
    HTTPError,
    IncompleteSnapshotError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import repo_folder_name

from hi_diffusers.console import say

GB = 1e9
# Weights as safetensors only: a pickle runs code when it is read.
FILES = ("*.json", "*.safetensors", "*.txt", "*.model")


@dataclass(frozen=True)
class Download:
    """A download that begins.

    Attributes:
        repo: owner/name.
        size: bytes that are missing.
        folder: folder of the repository in the cache.
        before: bytes of finished files that lay there when it began.
    """

    repo: str
    size: int
    folder: Path
    before: int

    def done(self) -> int:
        """Bytes that are there by now, of files that are not finished too."""
        return min(self.size, max(0, _bytes_in(self.folder) - self.before))


_watcher: ContextVar[Callable[[Download], None] | None] = ContextVar("watcher", default=None)


@contextlib.contextmanager
def watched(watcher: Callable[[Download], None]) -> Iterator[None]:
    """A context whose downloads are told when they begin."""
    token = _watcher.set(watcher)
    try:
        yield
    finally:
        _watcher.reset(token)


def find(
    repo: str, revision: str | None = None, files: Sequence[str] = FILES, absent: Sequence[str] = ()
) -> Path | None:
    """A repository's folder on the disk; None if it is missing or incomplete. The network is not used.

    Args:
        repo: owner/name.
        revision: branch, tag or commit; None is the downloaded state of main.
        files: patterns of the files that are needed.
        absent: patterns of files among them that are not needed.
    """
    wanted: dict[str, Any] = {"allow_patterns": list(files), "ignore_patterns": list(absent)}
    try:
        return Path(snapshot_download(repo, revision=revision, local_files_only=True, **wanted))
    except (LocalEntryNotFoundError, IncompleteSnapshotError):
        return None
    except HFValidationError:
        raise ValueError(f"{repo!r} is neither a folder nor a repository's owner/name") from None


def download(
    repo: str,
    revision: str | None = None,
    files: Sequence[str] = FILES,
    absent: Sequence[str] = (),
    gated_hint: str = "",
) -> Path:
    """Download the missing files of a repository and return its folder; a broken download keeps its finished files.

    Args:
        repo, revision, files, absent: as in `find`.
        gated_hint: alternative to name if the repository is gated.

    Raises:
        ValueError: in one sentence, why the download failed and what to do.
    """
    settings: dict[str, Any] = {
        "revision": revision,
        "allow_patterns": list(files),
        "ignore_patterns": list(absent),
    }
    try:
        missing = [one for one in snapshot_download(repo, dry_run=True, **settings) if one.will_download]
        if missing:
            _announce(repo, sum(one.file_size for one in missing))
        return Path(snapshot_download(repo, **settings))
    except DryRunError as error:
        raise ValueError(_sentence(repo, revision, gated_hint, error.__cause__ or error)) from error
    except (HTTPError, LocalEntryNotFoundError) as error:
        raise ValueError(_sentence(repo, revision, gated_hint, error)) from error


def _announce(repo: str, num_bytes: int) -> None:
    """Say what is downloaded; raises ValueError if the disk has too little space."""
    folder = Path(constants.HF_HUB_CACHE)
    there = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free = shutil.disk_usage(there).free
    if num_bytes > free:
        raise ValueError(
            f"{repo} needs {num_bytes / GB:.1f} GB in {folder}, where {free / GB:.1f} GB are free: set HF_HUB_CACHE to"
            " a folder on a larger disk"
        )
    say(f"downloading {repo}, {num_bytes / GB:.1f} GB, to {folder} ({free / GB:.0f} GB free)")
    watcher = _watcher.get()
    if watcher is not None:
        own = folder / repo_folder_name(repo_id=repo, repo_type="model")
        watcher(Download(repo, num_bytes, own, _bytes_in(own, begun=False)))


def _bytes_in(folder: Path, begun: bool = True) -> int:
    """Bytes of the files below a folder, links not followed; with `begun` also of those that are not finished."""
    found = 0
    for parent, _, names in os.walk(folder):  # it passes over folders that vanish meanwhile
        for path in (Path(parent, name) for name in names):
            with contextlib.suppress(OSError):  # renamed meanwhile
                counts = path.is_file() and not path.is_symlink() and (begun or path.suffix != ".incomplete")
                found += path.stat().st_size if counts else 0
    return found


def _sentence(repo: str, revision: str | None, gated_hint: str, error: BaseException) -> str:
    if constants.HF_HUB_OFFLINE:
        return f"{repo} is not on this disk, and HF_HUB_OFFLINE is set: unset it, or give a local folder"
    if isinstance(error, GatedRepoError):
        ask = f"ask for access at {constants.ENDPOINT}/{repo} and log in with: hf auth login"
        return f"{repo} is gated: {ask}{gated_hint}"
    if isinstance(error, RevisionNotFoundError):
        return f"{repo} has no revision {revision!r}"
    if isinstance(error, RepositoryNotFoundError):
        return f"{constants.ENDPOINT} has no repository {repo}, or it is private: check the name, or run hf auth login"
    return (
        f"{repo} cannot be downloaded from {constants.ENDPOINT} ({type(error).__name__}): check the network, set"
        " HF_ENDPOINT to a mirror, or give a local folder"
    )
