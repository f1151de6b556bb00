"""The pictures of a visit: their files on the server, and their metadata."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hi_diffusers.demo.starts import fitted_file, saved
from hi_diffusers.demo.studio import Finished
from hi_diffusers.pictures.inputs import InputPicture
from hi_diffusers.pictures.metadata import encode_picture
from hi_diffusers.request.options import ResolvedOptions

MAX_HISTORY = 24


@dataclass(frozen=True)
class StartedFrom:
    """What a picture was drawn from.

    Attributes:
        image, mask: the picture, and its mask if there was one.
        fitted: file of the picture at the size of the drawing.
    """

    image: InputPicture
    mask: InputPicture | None
    fitted: str

    @classmethod
    def of(cls, options: ResolvedOptions) -> "StartedFrom | None":
        """What a drawing with these options starts from; None for noise alone."""
        if options.image is None:
            return None
        assert options.fit is not None
        fitted = fitted_file(options.image, options.width, options.height, options.fit)
        return cls(options.image, options.mask_image, fitted)


@dataclass(frozen=True)
class Entry:
    """A picture of the visit.

    Attributes:
        path: file that the server serves.
        caption: model and seed.
        metadata: all settings of the picture.
        start: the picture that it was drawn from, its mask, and its file as the drawing began with it.
    """

    path: str
    caption: str
    metadata: dict[str, Any]
    start: StartedFrom | None


def write_file(finished: Finished) -> str | None:
    """Write a picture to a file that the server may serve; None if the picture is withheld."""
    if finished.withheld:
        return None
    picture = finished.picture
    data = encode_picture(picture.image, picture.metadata, "PNG")
    return saved(data, f"hidream-{picture.metadata['options']['seed']}.png")


def new_entry(path: str, finished: Finished, start: StartedFrom | None) -> Entry:
    """The entry of a picture that was written to a file."""
    metadata = finished.picture.metadata
    caption = f"{metadata['model']['model_type']}, seed {metadata['options']['seed']}"
    return Entry(path, caption, metadata, start)


def add_entry(history: Sequence[Entry], entry: Entry) -> list[Entry]:
    """The history with one more picture, without those whose files are no longer on the server."""
    return [entry, *(one for one in history if Path(one.path).is_file())][:MAX_HISTORY]
