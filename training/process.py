"""What a training process needs from its surroundings: kept memory, input that is there, output that is whole."""

import os
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TRIM_THRESHOLD_": "8589934592",
    "MALLOC_TOP_PAD_": "268435456",
    "MALLOC_MMAP_MAX_": "0",
}
"""glibc's settings; else a CPU training step maps and unmaps every large tensor and takes 4 to 7 times as long."""

DIFFUSERS_FILES = ("config.json", "diffusion_pytorch_model.safetensors")
"""What diffusers writes of a VAE or a transformer."""


def ensure_allocator() -> None:
    """Start this program anew with ALLOCATOR in its environment, unless it is there already; Linux only.

    Elsewhere nothing is done. The C library reads these variables once, before `main`: setting them from inside
    would have no effect.
    Call it where a file is run as a program, never from a function: a test that called that would start anew, too.
    """
    if not sys.platform.startswith("linux") or "MALLOC_TRIM_THRESHOLD_" in os.environ:
        return
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **ALLOCATOR})


def require_files(flag: str, folder: Path, names: Iterable[str]) -> None:
    """Check that an earlier part of the recipe left its files.

    Args:
        flag: what the folder was given as, for the message.
        names: paths inside `folder`.

    Raises:
        ValueError: naming the first file that is missing.
    """
    if not folder.is_dir():
        raise ValueError(f"{flag} must be a folder that training wrote, got {folder}: there is no such folder")
    for name in names:
        if not (folder / name).is_file():
            raise ValueError(f"{flag} must be a folder that training wrote, got {folder}: it has no {name}")


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A name beside `path` for a file or folder; what is written there takes `path`'s place at the end.

    A run killed meanwhile leaves the old file or the new one. Of a folder, which cannot be replaced in one go, it may
    leave neither, so whoever writes folders writes them again when the run goes on.
    """
    partial = path.with_name(path.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    yield partial
    if partial.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    os.replace(partial, path)
