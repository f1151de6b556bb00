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
        report: its figures, as HTML.
        command: the command line that draws it.
    """

    path: str
    caption: str
    metadata: dict[str, Any]
    start: StartedFrom | None
    report: str = ""
    command: str = ""


def write_file(finished: Finished) -> str | None:
    """Write a picture to a file that the server may serve; None if the picture is withheld."""
    if finished.withheld:
        return None
    picture = finished.picture
    data = encode_picture(picture.image, picture.metadata, "PNG")
    return saved(data, f"hidream-{picture.metadata['options']['seed']}.png")


def caption_of(finished: Finished) -> str:
    """Model and seed of a picture."""
    metadata = finished.picture.metadata
    return f"{metadata['model']['model_type']}, seed {metadata['options']['seed']}"


def add_entry(history: Sequence[Entry], entry: Entry) -> list[Entry]:
    """The history with one more picture, without those whose files are no longer on the server."""
    return [entry, *(one for one in history if Path(one.path).is_file())][:MAX_HISTORY]
