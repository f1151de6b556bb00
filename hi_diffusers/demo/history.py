"""The pictures of a visit: their files on the server, and their metadata."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gradio.processing_utils import save_bytes_to_cache
from gradio.utils import get_upload_folder

from hi_diffusers.demo.studio import Finished
from hi_diffusers.pictures.metadata import encode_picture

MAX_HISTORY = 24


@dataclass(frozen=True)
class Entry:
    """A picture of the visit.

    Attributes:
        path: file that the server serves.
        caption: model and seed.
        metadata: all settings of the picture.
    """

    path: str
    caption: str
    metadata: dict[str, Any]


def write_file(finished: Finished) -> str | None:
    """Write a picture to a file that the server may serve; None if the picture is withheld."""
    if finished.withheld:
        return None
    picture = finished.picture
    data = encode_picture(picture.image, picture.metadata, "PNG")
    path: str = save_bytes_to_cache(data, f"hidream-{picture.metadata['options']['seed']}.png", get_upload_folder())
    return path


def add_entry(history: Sequence[Entry], path: str | None, finished: Finished) -> list[Entry]:
    """The history with one more picture, without those whose files are no longer on the server."""
    if path is None:
        return list(history)
    metadata = finished.picture.metadata
    caption = f"{metadata['model']['model_type']}, seed {metadata['options']['seed']}"
    kept = [one for one in history if Path(one.path).is_file()]
    return [Entry(path, caption, metadata), *kept][:MAX_HISTORY]
