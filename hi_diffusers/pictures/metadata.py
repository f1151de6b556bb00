"""A picture's settings, stored inside its file: they are read back as the same dictionary.

    {"version": 1, "software": "hi-diffusers 0.1.0", "model": {"model_type": "nano", ...},
     "options": {"prompt": "...", "seed": 7, ...}, "cache": {"target": "module", ...}, "versions": {...}}

It is JSON in a PNG's iTXt chunk, a JPEG's comment and the EXIF MakerNote of a WebP. Beside it stands the plain text
that other image software shows: in a PNG's tEXt chunk, else in the EXIF UserComment. The same picture and metadata give
the same bytes.
"""

import io
import json
import os
import secrets
from pathlib import Path
from typing import Any, BinaryIO

from PIL import ExifTags, Image, PngImagePlugin

VERSION = 1
KEYWORD = "hi_diffusers"
FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
SECTIONS = ("model", "options", "cache", "versions")

MAX_TEXT_BYTES = 1_000_000
MAX_FILE_BYTES = 256 * 2**20
MAX_SEGMENT_BYTES = 65_533  # a JPEG segment's length is 16 bits wide and counts its own two bytes
OURS = KEYWORD.encode() + b"\0"  # begins our comments and maker notes

# EXIF 2.32, UserComment: eight bytes name the code. UTF-16 is big-endian, as other image software writes it.
UNICODE_PREFIX = b"UNICODE\0"
UNICODE_CODEC = "utf-16-be"
USER_COMMENT, MAKER_NOTE = int(ExifTags.Base.UserComment), int(ExifTags.Base.MakerNote)


def write_picture(
    image: Image.Image,
    path: str | Path,
    metadata: dict[str, Any],
    *,
    format: str | None = None,
    quality: int = 95,
    replace: bool = True,
) -> bool:
    """Write a picture with its metadata, whole or not at all.

    Args:
        image: an RGB picture.
        path: the file; its folder must exist.
        metadata: JSON values only, with `"version": 1`.
        format: "PNG", "JPEG" or "WEBP"; None takes it from the suffix of `path`.
        quality: 1 to 100, for JPEG and WebP; a PNG is lossless and ignores it.
        replace: whether an existing file is replaced; else it stays as it is.

    Returns:
        Whether the picture was written.

    Raises:
        ValueError: a bad mode, suffix, format or quality, or metadata that is not JSON or does not fit.
        OSError: the file cannot be written; nothing is left behind.
    """
    path = Path(path)
    data = encode_picture(image, metadata, _format_of(path, format), quality=quality)
    return write_atomically(path, data, replace=replace)


def encode_picture(
    image: Image.Image, metadata: dict[str, Any], format: str, *, quality: int = 95, embed: bool = True
) -> bytes:
    """The bytes of a picture's file. Arguments and errors as in `write_picture`.

    Args:
        embed: whether the whole metadata is written; else only the EXIF tags Make, Model and Software.
    """
    if format not in FORMATS.values():
        raise ValueError(f"format is {format!r}; PNG, JPEG or WEBP is allowed")
    if image.mode != "RGB":
        raise ValueError(f"image has mode {image.mode}; RGB is allowed")
    if not 1 <= quality <= 100:
        raise ValueError(f"quality is {quality}; 1 to 100 is allowed")
    text = _to_json(metadata) if embed else None
    encoded = io.BytesIO()
    if format == "PNG":
        more = {"pnginfo": _png_text(text, metadata)} if text is not None else {"exif": _exif(metadata, {})}
        image.save(encoded, format, **more)
        return encoded.getvalue()
    ours = None if text is None else OURS + text.encode()
    tags = {} if text is None else {USER_COMMENT: UNICODE_PREFIX + parameters_text(metadata).encode(UNICODE_CODEC)}
    if format == "JPEG":
        exif = _exif(metadata, tags)
        largest = max(len(exif), len(ours or b""))
        if largest > MAX_SEGMENT_BYTES:
            raise ValueError(
                f"metadata takes {largest} bytes; a JPEG can hold {MAX_SEGMENT_BYTES}, PNG and WebP can hold more"
            )
        # Full chroma resolution: the default halves it and smears coloured edges.
        image.save(encoded, format, quality=quality, subsampling=0, exif=exif)
        return encoded.getvalue() if ours is None else _with_comment(encoded.getvalue(), ours)
    image.save(encoded, format, quality=quality, exif=_exif(metadata, tags | ({MAKER_NOTE: ours} if ours else {})))
    return encoded.getvalue()


def read_metadata(path: str | Path) -> dict[str, Any]:
    """Read back what `write_picture` wrote; the file is not trusted, and its pixels are not decoded.

    Raises:
        ValueError: in one sentence, if it is no picture, or its metadata is missing, malformed, too large or not ours.
        OSError: the file is missing or cannot be opened.
    """
    with open(path, "rb") as file:
        if os.fstat(file.fileno()).st_size > MAX_FILE_BYTES:
            raise ValueError(f"{path} is larger than {MAX_FILE_BYTES // 2**20} MiB, the limit for a picture")
        return parse_metadata(file, str(path))


def parse_metadata(file: BinaryIO, name: str, *, max_pixels: int | None = None) -> dict[str, Any]:
    """`read_metadata` of an open file.

    Args:
        name: name of the file in error messages.
        max_pixels: maximum number of pixels of the picture; None is Pillow's own limit.
    """
    try:
        with Image.open(file, formats=("PNG", "JPEG", "WEBP")) as image:
            width, height = image.size
            text = _embedded_text(image)
    except Exception as error:  # a hostile file can raise any exception in a decoder
        raise ValueError(f"{name} is not a readable PNG, JPEG or WebP picture") from error
    if max_pixels is not None and width * height > max_pixels:
        raise ValueError(f"{name} has {width}x{height} pixels; {max_pixels} are allowed")
    if text is None:
        raise ValueError(f"{name} carries no hi-diffusers metadata")
    return _from_json(text, name)


def parameters_text(metadata: dict[str, Any]) -> str:
    """The settings as plain text, in the form of AUTOMATIC1111's web UI.

    The prompt, a line "Negative prompt: ..." if there is one, and one line of comma-separated settings.
    """
    model, options = metadata.get("model", {}), metadata.get("options", {})
    width, height = options.get("width"), options.get("height")
    cache = {name: value for name, value in metadata.get("cache", {}).items() if value is not None}
    fields = {
        "Steps": options.get("num_steps"),
        "Sampler": options.get("scheduler"),
        "CFG scale": options.get("guidance"),
        "Seed": options.get("seed"),
        "Size": f"{width}x{height}" if width and height else None,
        "Shift": options.get("shift"),
        "Model": model.get("model_type"),
        "Cache": ", ".join(f"{name}: {value}" for name, value in cache.items()) or None,
        "Version": metadata.get("software"),
    }
    lines = [str(options.get("prompt", metadata.get("prompt", "")))]
    if options.get("negative_prompt"):
        lines.append(f"Negative prompt: {options['negative_prompt']}")
    lines.append(", ".join(f"{name}: {_quoted(str(v))}" for name, v in fields.items() if v is not None))
    return "\n".join(lines)


def _quoted(value: str) -> str:
    """The value, as a JSON string if it holds a separator; readers of this text decode it."""
    return json.dumps(value, ensure_ascii=False) if set(value) & set(',:\n"') else value


def _format_of(path: Path, format: str | None) -> str:
    if format is None and path.suffix.lower() not in FORMATS:
        raise ValueError(f"{path} has the suffix {path.suffix!r}; allowed are {', '.join(FORMATS)}")
    return format or FORMATS[path.suffix.lower()]


def _to_json(metadata: dict[str, Any]) -> str:
    if metadata.get("version") != VERSION:
        raise ValueError(f"metadata has version {metadata.get('version')!r}; this software writes version {VERSION}")
    try:
        text = json.dumps(metadata, ensure_ascii=False, allow_nan=False)
        size = len(text.encode())
    except (TypeError, ValueError) as error:  # an object, NaN or infinity, half a surrogate pair
        raise ValueError(f"metadata cannot be written as JSON: {error}") from error
    if size > MAX_TEXT_BYTES:
        raise ValueError(f"metadata has {size} bytes; {MAX_TEXT_BYTES} are allowed")
    return text


def _from_json(text: str, path: str | Path) -> dict[str, Any]:
    if len(text) > MAX_TEXT_BYTES:
        raise ValueError(f"{path} carries metadata of {len(text)} characters; {MAX_TEXT_BYTES} are allowed")
    try:
        metadata = json.loads(text)
        json.dumps(metadata, ensure_ascii=False, allow_nan=False).encode()  # no NaN, no half surrogate pair
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} carries hi-diffusers metadata that is malformed") from error
    if not isinstance(metadata, dict) or any(not isinstance(metadata.get(name, {}), dict) for name in SECTIONS):
        raise ValueError(f"{path} carries hi-diffusers metadata that is malformed")
    if metadata.get("version") != VERSION:
        raise ValueError(f"{path} carries metadata of another version; this software reads version {VERSION}")
    return metadata


def _png_text(text: str, metadata: dict[str, Any]) -> PngImagePlugin.PngInfo:
    chunks = PngImagePlugin.PngInfo()
    chunks.add_itxt(KEYWORD, text)
    chunks.add_text("parameters", parameters_text(metadata))
    return chunks


def _exif(metadata: dict[str, Any], tags: dict[int, bytes]) -> bytes:
    """EXIF with make, model, software, and these tags of its Exif directory."""
    exif = Image.Exif()
    exif[ExifTags.Base.Make] = "hi-diffusers"
    exif[ExifTags.Base.Model] = str(metadata.get("model", {}).get("model_type", ""))
    exif[ExifTags.Base.Software] = str(metadata.get("software", ""))
    if tags:
        exif.get_ifd(ExifTags.IFD.Exif).update(tags)
    encoded = exif.tobytes()
    for tag in tags:  # Pillow types bytes as BYTE (1); EXIF prescribes UNDEFINED (7), of the same size.
        encoded = encoded.replace(tag.to_bytes(2) + b"\0\1", tag.to_bytes(2) + b"\0\7", 1)
    return encoded


def _with_comment(jpeg: bytes, comment: bytes) -> bytes:
    """A JPEG with a comment behind its APP segments. (Pillow's encoder fails on one larger than its buffer.)"""
    end = 2
    while jpeg[end] == 0xFF and 0xE0 <= jpeg[end + 1] <= 0xEF:
        end += 2 + int.from_bytes(jpeg[end + 2 : end + 4])
    return jpeg[:end] + b"\xff\xfe" + (len(comment) + 2).to_bytes(2) + comment + jpeg[end:]


def _embedded_text(image: Image.Image) -> str | None:
    """The JSON text in an opened picture that is not decoded yet, or None."""
    if image.format == "PNG":
        return image.info.get(KEYWORD)
    if image.format == "JPEG":
        found = image.info.get("comment")
    else:
        found = image.getexif().get_ifd(ExifTags.IFD.Exif).get(MAKER_NOTE)
    if not isinstance(found, bytes) or not found.startswith(OURS):
        return None
    return found.removeprefix(OURS).decode(errors="replace")


def write_atomically(path: Path, data: bytes, *, replace: bool = True) -> bool:
    """Write a file, whole or not at all; raises OSError, and then leaves nothing behind.

    Args:
        replace: whether an existing file is replaced; else it stays as it is, even if it appeared only now.

    Returns:
        Whether this call wrote it.
    """
    written = True
    temporary = path.parent / f".{path.name[:40]}.{secrets.token_hex(8)}.tmp"
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if replace:
            os.replace(temporary, path)
            return True
        try:
            os.link(temporary, path)
        except FileExistsError:
            written = False
        except OSError:  # another process may have removed the file, or the file system may have no links
            written = not path.exists()
            if written:
                os.replace(temporary, path)
        temporary.unlink(missing_ok=True)
        return written
    except BaseException:  # also after an interrupt nothing is left behind
        temporary.unlink(missing_ok=True)
        raise
