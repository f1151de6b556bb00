"""Reads the frames of a saved picture or video."""

from pathlib import Path

import numpy as np
from PIL import Image

from hi_diffusers.console import require

MAX_PIXELS = 4096 * 4096
MAX_FRAMES = 10_000


def read_frames(path: Path) -> list[Image.Image]:
    """The frames of a file, RGB; one of a picture.

    Raises:
        ValueError: if it cannot be read, or is too large.
    """
    try:
        return _read_mp4(path) if path.suffix.lower() == ".mp4" else _read_pictures(path)
    except (OSError, SyntaxError, EOFError, RuntimeError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error  # a broken PNG is a SyntaxError


def _read_pictures(path: Path) -> list[Image.Image]:
    with Image.open(path, formats=("PNG", "JPEG", "WEBP")) as opened:
        count = getattr(opened, "n_frames", 1)
        _check_size(*opened.size, count)
        frames = []
        for number in range(count):
            opened.seek(number)
            frames.append(opened.convert("RGB"))
    return frames


def _read_mp4(path: Path) -> list[Image.Image]:
    require("imageio_ffmpeg", "video", "an .mp4")
    import imageio_ffmpeg

    reader = imageio_ffmpeg.read_frames(str(path))
    frames: list[Image.Image] = []
    try:
        width, height = next(reader)["size"]
        for data in reader:
            _check_size(width, height, len(frames) + 1)
            frames.append(Image.fromarray(np.frombuffer(data, np.uint8).reshape(height, width, 3)))
    finally:
        reader.close()
    return frames


def _check_size(width: int, height: int, count: int) -> None:
    if width * height > MAX_PIXELS:
        raise ValueError(f"{width}x{height} pixels, {MAX_PIXELS} are allowed")
    if count > MAX_FRAMES:
        raise ValueError(f"more than {MAX_FRAMES} frames")
