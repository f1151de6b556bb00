"""A visitor's pictures to start from: their files on the server, and the mask that is painted over them."""

import io
from collections import OrderedDict
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.components.base import server
from gradio.processing_utils import save_bytes_to_cache
from gradio.utils import get_upload_folder
from PIL import Image

from hi_diffusers.demo.gate import MAX_PAINT_BYTES
from hi_diffusers.pictures.inputs import UNREADABLE, InputPicture

PAINTED_SIDE = 1024  # pixels of the longer side at which a mask is painted
MAX_PAINTS = 64
MAX_ID = 64  # characters of the name that a page gives to its paint


def received(path: str, role: str, max_pixels: int) -> InputPicture:
    """A picture that was uploaded.

    Args:
        path: its file, by gradio's word.
        role: "image" or "mask_image".
        max_pixels: maximum number of its pixels.

    Raises:
        ValueError: if it is no picture, too large, or not one of the server's own files.
    """
    file = Path(path).resolve()
    if not file.is_relative_to(Path(get_upload_folder()).resolve()) or not file.is_file():
        raise ValueError(f"{role} must be uploaded first")
    try:
        return InputPicture.of(file, role, max_pixels)
    except ValueError as error:
        raise ValueError(str(error).replace(str(file), file.name)) from error  # visitors must not learn its paths


def refreshed(picture: InputPicture) -> InputPicture:
    """The picture, whose file is kept for another while.

    Raises:
        ValueError: if the file is no longer there.
    """
    assert picture.file is not None
    try:
        picture.file.touch(exist_ok=True)
        return picture
    except OSError as error:
        raise ValueError("the picture to start from is no longer on the server: upload it again") from error


def to_paint_on(picture: InputPicture, mask: InputPicture | None = None) -> dict[str, Any]:
    """The value of the painter that shows a picture, with a mask's white as paint."""
    shown = picture.pixels().copy()
    shown.thumbnail((PAINTED_SIDE, PAINTED_SIDE))
    layers = []
    if mask is not None:
        paint = Image.new("RGBA", shown.size, "white")
        paint.putalpha(mask.pixels().convert("L").resize(shown.size))
        layers.append(paint)
    return {"background": shown, "layers": layers, "composite": None}


def mask_of(paint: Image.Image | None, picture: InputPicture) -> InputPicture | None:
    """The mask that is painted over a picture, as a file of the picture's size; None without paint.

    Args:
        paint: the paint's opacity, from `painter`.
    """
    if paint is None or paint.getbbox() is None:
        return None
    encoded = io.BytesIO()
    paint.resize(picture.size).save(encoded, "PNG")
    return InputPicture.of(Path(saved(encoded.getvalue(), "mask.png")), "mask_image")


def fitted_file(picture: InputPicture, width: int, height: int, fit: str) -> str:
    """A new file with the picture as the drawing begins with it."""
    encoded = io.BytesIO()
    pixels = picture.fitted(width, height, fit)
    Image.fromarray((pixels * 255).round().astype("uint8")).save(encoded, "PNG")
    return saved(encoded.getvalue(), "before.png")


def saved(data: bytes, name: str) -> str:
    """Write a file that the server may serve; returns its path."""
    path: str = save_bytes_to_cache(data, name, get_upload_folder())
    return path


class Paints:
    """What browsers painted, from the time they send it until it is drawn: bounded, while gradio's own store is not.

    Only the paint is kept: the picture below is on the server already.
    """

    def __init__(self) -> None:
        self._paints: OrderedDict[str, bytes] = OrderedDict()

    @server
    def accept(self, data: Any) -> None:
        """Take one of the three pictures that gradio's editor sends: "background", "layer" and "composite".

        Raises:
            ValueError: if it is none of them, or too large.
        """
        fields, files = data.data, data.files
        kind, name, index = (fields.get(key) for key in ("type", "id", "index"))
        if kind not in ("background", "layer", "composite") or not isinstance(name, str) or len(name) > MAX_ID:
            raise ValueError("an editor sends its background, layer or composite")
        content = files[0][1]
        if len(files) != 1 or len(content) > MAX_PAINT_BYTES or (kind == "layer" and index not in ("0", 0)):
            raise ValueError(f"the paint must be one layer of at most {MAX_PAINT_BYTES} bytes")
        if kind == "layer":
            self._paints[name] = content
            while len(self._paints) > MAX_PAINTS:
                self._paints.popitem(last=False)

    def opacity(self, payload: Any) -> Image.Image | None:
        """The paint's opacity, in mode L; None if nothing can be painted on.

        Raises:
            gr.Error: if what was painted is not here, or not a picture.
        """
        if payload is None or (payload.id is None and payload.background is None):
            return None
        data = self._paints.pop(payload.id or "", None)
        if data is None:
            raise gr.Error("what was painted did not arrive: try again", print_exception=False)
        try:
            layer = Image.open(io.BytesIO(data), formats=("PNG", "WEBP", "JPEG"))
            if max(layer.size) > PAINTED_SIDE:
                raise ValueError("larger than the picture below")
            return layer.convert("RGBA").getchannel("A")
        except UNREADABLE as error:
            raise gr.Error("what was painted cannot be read", print_exception=False) from error


def painter(**settings: Any) -> gr.ImageEditor:
    """Gradio's editor as a painter of masks; its value, as an input, is `Paints.opacity`.

    It must be given values only: gradio makes another editor for `gr.update`, whose store is not bounded.

    Args:
        settings: more arguments of the editor.
    """
    brush = gr.Brush(colors=["#ffffff"], default_color="#ffffff", color_mode="fixed")
    editor = gr.ImageEditor(
        type="pil", sources=(), transforms=(), layers=False, brush=brush, format="png", buttons=[], **settings
    )
    paints = Paints()
    editor.accept_blobs = paints.accept
    editor.preprocess = paints.opacity
    return editor
