"""Checks single files of weights by their headers, without reading weights."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from hi_diffusers.console import require
from hi_diffusers.weights.scaled import stored_weights
from hi_diffusers.weights.source import LFS_POINTER

MAX_HEADER_BYTES = 100_000_000  # safetensors' own limit


def safetensors_header(path: Path) -> dict[str, Any]:
    """The header of a safetensors file: name -> dtype, shape and place.

    Raises:
        ValueError: if the header is invalid, or the file has another size than it says, as after a broken download.
    """
    size = path.stat().st_size
    with path.open("rb") as stream:
        start = stream.read(8)
        length = int.from_bytes(start, "little")
        if start == LFS_POINTER[:8]:
            raise ValueError(f"{path} is a pointer of Git LFS, not the file: fetch it with git lfs pull")
        try:
            found: Any = json.loads(stream.read(length)) if 8 + length <= min(size, MAX_HEADER_BYTES) else None
            header = {name: _entry(entry) for name, entry in found.items() if name != "__metadata__"}
            end = max(entry["data_offsets"][1] for entry in header.values())
        except (AttributeError, LookupError, TypeError, ValueError, RecursionError):
            raise ValueError(f"{path} is not a complete safetensors file: its header cannot be read") from None
    if size != 8 + length + end:
        raise ValueError(f"{path} is not a complete safetensors file: {size} bytes, its header says {8 + length + end}")
    try:
        with safe_open(path, "pt"):
            return header
    except SafetensorError as error:
        raise ValueError(f"{path} is not a complete safetensors file: {error}") from None


def _entry(entry: Any) -> dict[str, Any]:
    """Check a tensor's entry in a header; raises ValueError or LookupError if it is invalid."""
    numbers = [*entry["shape"], *entry["data_offsets"]]
    whole = all(isinstance(one, int) and not isinstance(one, bool) and one >= 0 for one in numbers)
    if not (isinstance(entry["dtype"], str) and whole and len(entry["data_offsets"]) == 2):
        raise ValueError("an entry has a dtype, a shape and two offsets")
    found: dict[str, Any] = entry
    return found


def check_transformer_file(path: Path) -> None:
    """Raise ValueError unless the file is a complete .safetensors file of floating-point weights or a .gguf file."""
    if path.suffix == ".gguf":
        require("gguf", "gguf", str(path))
        with path.open("rb") as stream:
            if stream.read(4) != b"GGUF":
                raise ValueError(f"{path} is not a GGUF file")
    elif path.suffix == ".safetensors":
        header = safetensors_header(path)
        dtypes = {header[stored.weight]["dtype"] for stored in stored_weights(path, header).values()}
        if not all(dtype.startswith(("F", "BF")) for dtype in dtypes):
            raise ValueError(
                f"{path} holds weights of {', '.join(sorted(dtypes))}: only floating-point ones can be read"
            )
    else:
        raise ValueError(
            f"transformer must be a .safetensors or .gguf file, got {path}: other formats can run code when read"
        )


def check_shapes(path: Path, wanted: Mapping[str, Sequence[int]]) -> None:
    """Raise ValueError unless a file holds exactly these weights.

    Args:
        path: a .safetensors file.
        wanted: name -> shape of every weight of the transformer.

    Raises:
        ValueError: naming a weight that is missing, unknown or of another shape.
    """
    found = safetensors_header(path)
    header = {name: found[stored.weight] for name, stored in stored_weights(path, found).items()}
    for name, entry in header.items():
        if name not in wanted:
            raise ValueError(f"{path} is another model's: the transformer has no weight {name}")
        if entry["shape"] != list(wanted[name]):
            raise ValueError(f"{path} is another model's: {name} has shape {entry['shape']}, not {list(wanted[name])}")
    missing = [name for name in wanted if name not in header]
    if missing:
        raise ValueError(f"{path} lacks {len(missing)} of the transformer's weights, among them {missing[0]}")
