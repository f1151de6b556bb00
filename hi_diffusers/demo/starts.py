"""A visitor's pictures to start from: their files on the server, and the mask that is painted over them."""

import io
import os
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.processing_utils import save_bytes_to_cache
from gradio.utils import get_upload_folder
from PIL import Image

from hi_diffusers.pictures.inputs import UNREADABLE, InputPicture

PAINT = "#ff2e93"  # a colour that few pictures have; only its opacity counts
SAME_SHAPE = 0.02  # by which the shape of paint may differ from its picture's
LOST = "lost"
"""In place of a picture that the page shows and the server does not have, or not yet."""
PAINTED_SIDE = 1024  # pixels of the longer side at which a mask is painted


def received(path: str, role: str, max_pixels: int) -> InputPicture:
    """A picture that was uploaded.

    Args:
        path: its file, by gradio's word.
        role: "image" or "mask_image".
        max_pixels: maximum number of its pixels.

    Raises:
        ValueError: if it is no picture, too large, or not one of the server's own files.
    """
    file = own_file(path)
    if file is None:
        raise ValueError(f"{role} must be uploaded first")
    return InputPicture.of(file, role, max_pixels, file.name)  # visitors must not learn the server's paths


def own_file(path: str) -> Path | None:
    """The file of that path, if the server keeps it for its visitors; else None."""
    try:
        file = Path(path).resolve()
        return file if file.is_relative_to(Path(get_upload_folder()).resolve()) and file.is_file() else None
    except (OSError, ValueError):  # no name of a file
        return None


def begun_with(file: str | None, picture: InputPicture | None) -> InputPicture | str | None:
    """The picture to start from when a drawing is asked for.

    Args:
        file: what the page shows.
        picture: what was made of it; it may be of an earlier file, or be lost with the session.

    Returns:
        The picture, None if the page shows none, or LOST.
    """
    if file is None:
        return None
    return picture if picture is not None and picture.file == Path(file).resolve() else LOST


def refreshed(picture: InputPicture) -> InputPicture:
    """The picture, whose file is kept for another while.

    Raises:
        ValueError: if the file is no longer there.
    """
    assert picture.file is not None
    try:
        os.utime(picture.file)
        return picture
    except OSError as error:
        raise ValueError("the picture to start from is no longer on the server: upload it again") from error


def to_paint_on(picture: InputPicture, mask: InputPicture | None = None) -> dict[str, Any]:
    """The value of the painter that shows a picture, with a mask's white as paint."""
    shown = picture.pixels().copy()
    shown.thumbnail((PAINTED_SIDE, PAINTED_SIDE))
    layers = []
    if mask is not None:
        paint = Image.new("RGBA", shown.size, PAINT)
        paint.putalpha(mask.pixels().convert("L").resize(shown.size))
        layers.append(paint)
    return {"background": shown, "layers": layers, "composite": None}


def mask_of(paint: Image.Image | None, picture: InputPicture) -> InputPicture | None:
    """The mask that is painted over a picture, as a file of the picture's size; None without paint.

    Args:
        paint: the paint's opacity, from `opacity_of`.

    Raises:
        ValueError: if it was painted over something of another shape.
    """
    if paint is None or paint.getbbox() is None:
        return None
    if abs(paint.width * picture.height / (paint.height * picture.width) - 1) > SAME_SHAPE + 1 / min(paint.size):
        raise ValueError("what was painted is not over the picture: choose the picture again, and paint on it")
    encoded = io.BytesIO()
    paint.resize(picture.size).save(encoded, "PNG")
    name = f"{picture.file.stem if picture.file else 'picture'}-mask.png"
    return InputPicture.of(Path(saved(encoded.getvalue(), name)), "mask_image")


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


def opacity_of(payload: Any) -> Image.Image | None:
    """The paint's opacity in what gradio's editor sends, in mode L; None if nothing can be painted on.

    The picture below is on the server already, so only the layer of paint is decoded.

    Raises:
        gr.Error: if it is not a picture that the editor could have made.
    """
    if payload is None or not payload.layers:
        return None
    try:
        layer = Image.open(payload.layers[0].path, formats=("PNG", "WEBP"))
        if max(layer.size) > 2 * PAINTED_SIDE:  # twice, where a screen has two pixels for one
            raise ValueError("larger than the picture below")
        return layer.convert("RGBA").getchannel("A")
    except UNREADABLE as error:
        raise gr.Error("what was painted cannot be read", print_exception=False) from error


def painter(**settings: Any) -> gr.ImageEditor:
    """Gradio's editor as a painter of masks; its value, as an input, is `opacity_of`.

    It must be given values only: for `gr.update` gradio makes another editor, which decodes whatever it is sent.

    Args:
        settings: more arguments of the editor.
    """
    brush = gr.Brush(colors=[PAINT], default_color=PAINT, color_mode="fixed")
    editor = gr.ImageEditor(
        type="pil", sources=(), transforms=(), layers=False, brush=brush, format="png", buttons=[], **settings
    )
    editor.preprocess = opacity_of
    return editor
