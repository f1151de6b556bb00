"""Pictures to start from: read within bounds, turned upright, converted to RGB, and fitted to a size.

Shapes: B pictures, H x W pixels.
"""

import hashlib
import io
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

MAX_PIXELS, MAX_BYTES, MIN_SIDE = 100_000_000, 256 * 2**20, 16
FORMATS = ("PNG", "JPEG", "WEBP")
FITS = ("cover", "pad")
"""How a picture of another shape is fitted: cut at two sides, or with black bars at two sides."""
BEHIND = {"image": "white", "mask_image": "black"}
"""The colour behind what is transparent."""

OF_PIXELS = "pixels:"
UNREADABLE = (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError)
"""What Pillow raises for a file that is damaged or hostile."""


@dataclass(frozen=True)
class InputPicture:
    """A picture that was read and checked; its pixels are read anew when they are needed.

    Two are equal if their contents are.

    Attributes:
        sha256: SHA-256 of the file; "pixels:" and that of the RGB pixels, if it never was a file.
        role: "image" or "mask_image".
        width, height: pixels, turned upright.
        file: its file; None if it is held in memory.
        held: its pixels, if it never was a file.
    """

    sha256: str
    role: str
    width: int = field(compare=False)
    height: int = field(compare=False)
    file: Path | None = field(compare=False, default=None)
    held: Image.Image | None = field(compare=False, default=None, repr=False)

    @classmethod
    def of(
        cls,
        given: str | Path | Image.Image,
        role: str = "image",
        max_pixels: int = MAX_PIXELS,
        name: str | None = None,
    ) -> "InputPicture":
        """Read and check a picture.

        Args:
            given: its file, or the picture itself.
            role: "image" or "mask_image", for error messages and for what is behind transparent pixels.
            max_pixels: maximum number of its pixels.
            name: its file's name in error messages; None is the path.

        Raises:
            ValueError: if it cannot be read as one picture.
        """
        if isinstance(given, Image.Image):
            _check_size(given, role, "given", max_pixels)
            if given.mode in ("I", "F"):
                raise ValueError(f"{role} must have 8 or 16 bits, got a picture of mode {given.mode}")
            picture = _upright(given, role)
            return cls(_hash_of_pixels(picture), role, *picture.size, held=picture)
        picture, sha256 = read_picture(Path(given), role, max_pixels, name)
        return cls(sha256, role, *picture.size, file=Path(given).absolute())

    @property
    def size(self) -> tuple[int, int]:
        """Width and height."""
        return self.width, self.height

    def pixels(self) -> Image.Image:
        """The picture in RGB.

        Raises:
            ValueError: if its file is another one than when it was checked.
        """
        if self.held is not None:
            return self.held
        assert self.file is not None
        picture, sha256 = read_picture(self.file, self.role)
        if sha256 != self.sha256:
            raise ValueError(f"{self.role} {self.file} was changed since it was checked")
        return picture

    def fitted(self, width: int, height: int, fit: str) -> np.ndarray:
        """The picture at a size, [H,W,3], float32 in 0..1; a mask [H,W].

        Args:
            fit: one of FITS: "cover" scales it until both sides are covered and cuts the rest off evenly; "pad" scales
                it until it is inside, and fills the rest with black.
        """
        picture = self.pixels() if self.role == "image" else self.pixels().convert("L")
        how = ImageOps.fit if fit == "cover" else ImageOps.pad
        # a mask's black stays black: a sharper filter would ring
        filter = Image.Resampling.LANCZOS if self.role == "image" else Image.Resampling.BOX
        if picture.size != (width, height):
            picture = how(picture, (width, height), filter)
        return np.asarray(picture).astype(np.float32) / 255


@dataclass(frozen=True)
class Fitted:
    """The pictures of a batch at the size that is drawn.

    Attributes:
        pictures: [B,H,W,3], float32 in 0..1.
        masks: the share of each pixel that is drawn anew, [B,H,W], float32; None: all of them.
    """

    pictures: np.ndarray
    masks: np.ndarray | None = None

    def keep_rest(self, drawn: np.ndarray) -> np.ndarray:
        """Drawn pictures [B,H,W,3], float in 0..1, with what was not to be drawn put back."""
        if self.masks is None:
            return drawn
        share = self.masks[..., None]
        return share * drawn + (1 - share) * self.pictures


def check_mask(size: tuple[int, int] | None, mask: tuple[int, int]) -> None:
    """Raise ValueError for a mask of another size than the picture's.

    Args:
        size: width and height of the picture; None if there is no picture.
        mask: width and height of the mask.
    """
    if size is None:
        raise ValueError("mask_image has no effect without an image: give one, or drop it")
    if mask != size:
        raise ValueError(f"mask_image must have the image's size {size[0]}x{size[1]}, got {mask[0]}x{mask[1]}")


def check_white(mask: np.ndarray) -> None:
    """Raise ValueError for a mask [H,W] that leaves nothing to draw."""
    if not mask.any():
        raise ValueError("mask_image is black everywhere, so nothing would be drawn: white is what is drawn anew")


def read_picture(
    path: Path, role: str = "image", max_pixels: int = MAX_PIXELS, name: str | None = None
) -> tuple[Image.Image, str]:
    """A picture file's RGB pixels, turned as its EXIF says, and its SHA-256.

    Args:
        role, max_pixels, name: as in `InputPicture.of`.

    Raises:
        ValueError: if it cannot be read as one picture.
    """
    name = str(path) if name is None else name
    try:
        if path.exists() and (not path.is_file() or path.stat().st_size > MAX_BYTES):  # a device may be endless
            raise ValueError(f"{role} must be a file of at most {MAX_BYTES // 2**20} MiB, got {name}")
        data = path.read_bytes()
    except OSError as error:
        raise ValueError(
            f"{role} must be a PNG, JPEG or WebP picture, got {name}: {error.strerror or error}"
        ) from error
    return decode_picture(data, role, name, max_pixels), hashlib.sha256(data).hexdigest()


def decode_picture(data: bytes, role: str = "image", name: str = "given", max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The RGB pixels of a picture file's content, turned as its EXIF says.

    Args:
        role, max_pixels: as in `InputPicture.of`.
        name: its name in error messages.

    Raises:
        ValueError: if it cannot be read as one picture.
    """
    try:
        opened = Image.open(io.BytesIO(data), formats=FORMATS)
        num_frames = getattr(opened, "n_frames", 1)
    except UnidentifiedImageError as error:
        raise ValueError(f"{role} must be a PNG, JPEG or WebP picture, got {name}") from error
    except UNREADABLE as error:
        raise ValueError(f"{role} {name} cannot be read as a picture") from error
    _check_size(opened, role, name, max_pixels)
    if num_frames > 1 and opened.format != "MPO":  # phones put a second picture behind the first one
        raise ValueError(f"{role} {name} has several frames, and one picture is needed")
    try:
        return _upright(opened, role)
    except UNREADABLE as error:
        raise ValueError(f"{role} {name} cannot be read as a picture") from error


def _check_size(picture: Image.Image, role: str, name: str, max_pixels: int) -> None:
    size = f"{picture.width}x{picture.height}"
    if picture.width * picture.height > max_pixels:
        raise ValueError(f"{role} {name} has {size} pixels, {max_pixels} are allowed")
    if min(picture.size) < MIN_SIDE:
        raise ValueError(f"{role} {name} has {size} pixels; both sides need {MIN_SIDE}")


def _upright(picture: Image.Image, role: str) -> Image.Image:
    """In RGB, turned as its EXIF says: 16 bits are rounded to 8, and a plain colour is behind what is transparent."""
    turned = ImageOps.exif_transpose(picture)
    assert turned is not None
    if turned.mode.startswith("I"):
        values = np.asarray(turned).astype(np.int64)
        turned = Image.fromarray(((values + 128) // 257).clip(0, 255).astype(np.uint8))
    if "A" in turned.getbands() or "transparency" in turned.info:
        turned = turned.convert("RGBA")
        turned = Image.alpha_composite(Image.new("RGBA", turned.size, BEHIND[role]), turned)
    return turned.convert("RGB")


def _hash_of_pixels(picture: Image.Image) -> str:
    content = f"{picture.width}x{picture.height}".encode() + picture.tobytes()
    return f"{OF_PIXELS}{hashlib.sha256(content).hexdigest()}"
