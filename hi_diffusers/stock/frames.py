"""Reads the frames of a saved picture or video."""

from pathlib import Path

import numpy as np
from PIL import Image

from hi_diffusers.console import require

MAX_PIXELS = 4096 * 4096
MAX_FRAMES = 10_000


def read_frames(path: Path, count: int = 0) -> list[Image.Image]:
    """The frames of a file, RGB; one of a picture.

    Args:
        count: number of frames that were written: equal neighbours lie in a .webp as one long frame. 0 is unknown.

    Raises:
        ValueError: if it cannot be read, or is too large.
    """
    try:
        return _read_mp4(path) if path.suffix.lower() == ".mp4" else _read_pictures(path, count)
    except (OSError, SyntaxError, EOFError, RuntimeError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error  # a broken PNG is a SyntaxError


def _read_pictures(path: Path, count: int) -> list[Image.Image]:
    with Image.open(path, formats=("PNG", "JPEG", "WEBP")) as opened:
        number = getattr(opened, "n_frames", 1)
        _check_size(*opened.size, max(number, count))
        frames, durations = [], []
        for place in range(number):
            opened.seek(place)
            frames.append(opened.convert("RGB"))
            durations.append(opened.info.get("duration", 0))
    unit = sum(durations) / count if count > number else 0
    if not unit:
        return frames
    return [frame for frame, long in zip(frames, durations, strict=True) for _ in range(round(long / unit))]


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
