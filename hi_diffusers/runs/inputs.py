"""The pictures that the lines of a prompt file start from."""

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


class InputHash:
    """One hash over the pictures that the lines of a run start from."""

    def __init__(self) -> None:
        self._digest, self._any = hashlib.sha256(), False

    def add(self, hashes: Iterable[str]) -> None:
        """Add the SHA-256 of a line's pictures."""
        for one in hashes:
            self._digest.update(one.encode())
            self._any = True

    def values(self) -> list[str]:
        """The hash; empty if no line has a picture."""
        return [self._digest.hexdigest()] if self._any else []


def with_files(overrides: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """A line's overrides, named as in `SamplingOptions`, with the files that its pictures name.

    Args:
        folder: folder of the prompt file, resolved.

    Raises:
        ValueError: if one lies outside that folder.
    """
    found = dict(overrides)
    for name in ("image", "mask"):
        if name in found:
            found[name] = (folder / found[name]).resolve()
            if not found[name].is_relative_to(folder):
                raise ValueError(f"{name} must lie in the prompt file's folder, got {overrides[name]!r}")
    if "mask" in found:
        found["mask_image"] = found.pop("mask")
    return found
