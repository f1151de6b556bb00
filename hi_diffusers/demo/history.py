"""The pictures of a visit: their files on the server, and what is told of them."""

import hmac
import io
import math
import os
import secrets
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from cache_functions import StepRecord
from cache_functions.config import MAX_STEPS
from hi_diffusers.demo.kept import is_text
from hi_diffusers.demo.starts import fitted_file, own_file, saved
from hi_diffusers.demo.studio import Finished
from hi_diffusers.engine.generation import Seconds
from hi_diffusers.pictures.enlarging import Enlarger
from hi_diffusers.pictures.inputs import InputPicture
from hi_diffusers.pictures.metadata import encode_picture, parse_metadata
from hi_diffusers.request.options import ResolvedOptions

MAX_HISTORY = 24
MAX_COMMAND_CHARS = 50_000
MAX_ARCHIVE_BYTES = 256 * 2**20
SECRET = secrets.token_bytes(32)  # of this process: signs the files that it wrote


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
        metadata: all settings of the picture.
        trace, seconds: as in `Generation`.
        command: the command line that draws it.
        start: what it was drawn from; None for noise alone.
    """

    path: str
    metadata: dict[str, Any]
    trace: tuple[StepRecord, ...]
    seconds: Seconds
    command: str
    start: StartedFrom | None = None

    @property
    def caption(self) -> str:
        """Model and seed."""
        return f"{self.metadata['model']['model_type']}, seed {self.metadata['options']['seed']}"

    def image(self) -> Image.Image:
        """Its pixels; raises ValueError if the file is no longer on the server."""
        check_present(self.path)
        with Image.open(self.path, formats=("PNG",)) as opened:
            return opened.convert("RGB")

    def kept(self) -> dict[str, Any]:
        """What a browser keeps of it, for `restored`; what it was drawn from is not kept."""
        return {
            "path": self.path,
            "signature": _signature(self.path),
            "steps": [[one.kind, one.seconds, one.evaluations] for one in self.trace],
            "encode": self.seconds.encode,
            "decode": self.seconds.decode,
            "command": self.command,
        }


def restored(kept: Any, max_pixels: int) -> Entry:
    """The picture of which a browser kept this.

    Args:
        max_pixels: maximum number of its pixels.

    Raises:
        ValueError: if it is malformed, or the picture is no longer on the server.
    """
    try:
        if not hmac.compare_digest(_signature(kept["path"]), str(kept["signature"])):
            raise ValueError("no picture that this server drew")
        path = own_file(kept["path"])
        trace = tuple(_record(index, *step) for index, step in enumerate(kept["steps"][:MAX_STEPS]))
        denoise = sum(one.seconds for one in trace)
        seconds = Seconds(_seconds(kept["encode"]), denoise, _seconds(kept["decode"]))
        command = kept["command"]
        if path is None or not trace or not is_text(command, MAX_COMMAND_CHARS):
            raise ValueError("nothing of ours")
        os.utime(path)  # it is kept for another while
        with path.open("rb") as file:
            metadata = parse_metadata(file, path.name, max_pixels=max_pixels)
        entry = Entry(str(path), metadata, trace, seconds, command)
        if not (entry.caption and metadata["options"]["width"] and metadata["options"]["height"]):
            raise ValueError("its settings lack what is told of it")
        return entry
    except (KeyError, TypeError, AttributeError, OSError, OverflowError) as error:
        raise ValueError("what the browser kept is malformed") from error


def add_entry(history: Sequence[Entry], entry: Entry) -> list[Entry]:
    """The history with one more picture, without those whose files are no longer on the server."""
    return [entry, *(one for one in history if Path(one.path).is_file())][:MAX_HISTORY]


def check_present(*paths: str) -> None:
    """Raise ValueError if a file was removed from the server."""
    if not all(Path(path).is_file() for path in paths):
        raise ValueError("that picture is no longer on the server")


def write_file(finished: Finished) -> str | None:
    """Write a picture to a file that the server may serve; None if the picture is withheld."""
    if finished.withheld:
        return None
    picture = finished.picture
    data = encode_picture(picture.image, picture.metadata, "PNG")
    return saved(data, f"hidream-{picture.metadata['options']['seed']}.png")


def write_enlarged(entry: Entry, enlarger: Enlarger, factor: int, max_pixels: int) -> str:
    """Write a picture, enlarged, to a file that the server may serve.

    Raises:
        ValueError: if it would have too many pixels, or is no longer on the server.
    """
    image = entry.image()
    width, height = image.width * factor, image.height * factor
    if width * height > max_pixels:
        raise ValueError(f"the enlarged picture would have {width}x{height} pixels; {max_pixels} are allowed")
    metadata = entry.metadata | {"enlarged": {"factor": factor, "method": enlarger.method}}
    data = encode_picture(enlarger(image, factor), metadata, "PNG")
    return saved(data, f"{Path(entry.path).stem}-{factor}x.png")


def write_archive(history: Sequence[Entry]) -> str:
    """Write a zip of the pictures, the oldest first. The same pictures make the same file.

    Raises:
        ValueError: if none is on the server any more, or they are too large together.
    """
    packed = io.BytesIO()
    there = [path for path in (Path(one.path) for one in reversed(history)) if path.is_file()]
    if not there:
        raise ValueError("no picture of this visit is on the server any more")
    size, most = sum(path.stat().st_size for path in there), MAX_ARCHIVE_BYTES
    if size > most:
        raise ValueError(
            f"the pictures take {size >> 20} MiB together; {most >> 20} are allowed: download them one by one"
        )
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_STORED) as archive:  # a PNG is compressed
        for number, path in enumerate(there, 1):
            archive.writestr(zipfile.ZipInfo(f"{number:02}-{path.name}"), path.read_bytes())
    return saved(packed.getvalue(), "hidream.zip")


def _signature(path: str) -> str:
    """Shows that this server wrote a picture: a visitor can upload files, but not sign them."""
    return hmac.new(SECRET, path.encode(), "sha256").hexdigest()


def _record(index: int, kind: Any, seconds: Any, evaluations: Any) -> StepRecord:
    if kind not in ("full", "forecast") or not isinstance(evaluations, int) or not 0 <= evaluations <= MAX_STEPS:
        raise ValueError("no step")
    return StepRecord(index, kind, _seconds(seconds), evaluations)


def _seconds(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise ValueError("no seconds")
    return float(value)
