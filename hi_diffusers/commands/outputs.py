"""Names of the files that are written, and whether they can be."""

import os
import stat
from collections.abc import Sequence
from itertools import chain, count
from pathlib import Path

from hi_diffusers.console import Refusal
from hi_diffusers.pictures.metadata import FORMATS

MAX_IMAGES = 1000


def comparison_paths(output: Path) -> tuple[Path, Path]:
    """The files that --compare writes beside a picture: the uncached picture, and the side-by-side one."""
    return output.with_name(f"{output.stem}_uncached{output.suffix}"), output.with_name(f"{output.stem}_compare.png")


def free_name(path: Path) -> Path:
    """The path if no file is there, else with the lowest number that makes it new: a.png, a-2.png, a-3.png.

    The files that --compare writes beside a picture count as well.
    """
    names = chain([path], (path.with_name(f"{path.stem}-{number}{path.suffix}") for number in count(2)))
    return next(one for one in names if not any(beside.exists() for beside in (one, *comparison_paths(one))))


def check_output(output: Path, suffixes: Sequence[str] = tuple(FORMATS)) -> None:
    """Raise Refusal if a picture's file cannot be written."""
    parent = output.parent
    if output.suffix.lower() not in suffixes:
        raise Refusal(f"--output must end in {', '.join(suffixes)}, got {output}")
    if not parent.is_dir():
        raise Refusal(f"--output must lie in an existing folder, got {output}: there is no folder {parent}")
    try:
        is_folder = stat.S_ISDIR(output.stat().st_mode)
    except FileNotFoundError:
        is_folder = False
    except OSError as error:
        raise Refusal(f"--output must be a file that can be written, got {output}: {error.strerror}") from error
    if is_folder:
        raise Refusal(f"--output must be a file, got {output}, which is a folder")
    if not os.access(parent, os.W_OK):
        raise Refusal(f"--output must lie in a writable folder, got {output}: {parent} is not writable")
