"""Which files a picture or a video may be written to."""

from importlib.util import find_spec
from pathlib import Path

from hi_diffusers.console import require
from hi_diffusers.pictures.metadata import FORMATS

VIDEOS = (".mp4", ".webp")


def check_suffix(path: Path, is_video: bool) -> None:
    """Raise ValueError if a file's suffix does not fit, or what writes it is absent."""
    suffix = path.suffix.lower()
    allowed = VIDEOS if is_video else tuple(FORMATS)
    if suffix not in allowed:
        what = "a video" if is_video else "a picture"
        raise ValueError(f"output must end in {', '.join(allowed)} for {what}, got {path}")
    if suffix == ".mp4":
        require("imageio_ffmpeg", "video", "an .mp4")


def default_suffix(is_video: bool) -> str:
    """The suffix of files that nobody named."""
    if not is_video:
        return ".png"
    return ".mp4" if find_spec("imageio_ffmpeg") is not None else ".webp"
