"""What a request to the API may say, and how it is refused: OpenAI's fields and ours, its form of an error."""

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from fastapi import Request as HttpRequest
from fastapi.concurrency import run_in_threadpool
from PIL import Image, ImageChops
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException

from hi_diffusers.pictures.inputs import FORMATS, UNREADABLE
from hi_diffusers.service.files import Files

NAMES = {"num_steps": "steps", "num_images": "n", "width": "size", "height": "size", "mask_image": "mask"}
"""Our settings' names -> the API's."""
DESCRIBED = {
    400: "a field is wrong, or the picture is withheld",
    401: "no key of this server",
    404: "another model",
    429: "the queue is full, or too many requests in a minute; Retry-After says when to try again",
    503: "the server is about to end",
    504: "not finished by the deadline",
}
MAX_PARTIAL = 3


class ApiError(Exception):
    """An answer without a picture.

    Args:
        status: HTTP status code.
        message: the sentence.
        code: OpenAI's word for it, which the metrics count.
        param: the field that is to blame.
        seconds: after which to try again.
    """

    def __init__(self, status: int, message: str, code: str, param: str | None = None, seconds: float | None = None):
        super().__init__(message)
        self.status, self.code, self.param, self.seconds = status, code, param, seconds

    def answer(self) -> dict[str, Any]:
        """OpenAI's form of an error."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(self.status, kind)
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        """The headers of the answer."""
        return {} if self.seconds is None else {"Retry-After": str(round(self.seconds))}


class Asked(BaseModel):
    """The fields of a request that both routes have. Those from `seed` on are not OpenAI's."""

    model_config = ConfigDict(extra="forbid")

    prompt: str
    model: str | None = Field(None, description="the served model, or an alias of it; by default the served one")
    n: int | None = Field(None, description="pictures; their seeds follow each other")
    size: str | None = Field(None, description="WIDTHxHEIGHT, or auto")
    quality: str | None = Field(None, description="high, medium or low: as few full steps as reach 45, 38 or 32 dB")
    response_format: Literal["url", "b64_json"] | None = Field(None, description="by default b64_json")
    output_format: Literal["png", "jpeg", "webp"] | None = Field(None, description="by default png")
    output_compression: int | None = Field(None, ge=1, le=100, description="quality of JPEG and WebP, by default 95")
    stream: bool | None = Field(None, description="send server-sent events, for n = 1")
    partial_images: int | None = Field(None, ge=0, le=MAX_PARTIAL, description="previews in the stream")
    user: str | None = Field(None, description="ignored")
    background: Literal["auto", "opaque"] | None = None
    moderation: Literal["auto", "low"] | None = Field(None, description="ignored: --use_nsfw_filter decides")
    style: str | None = Field(None, description="ignored")
    seed: int | None = Field(None, description="of the first picture; by default random")
    steps: int | None = Field(None, description="denoising steps")
    guidance: float | None = Field(None, description="guidance scale; 1 or less turns guidance off")
    negative_prompt: str | None = None
    cache: str | None = Field(None, description="best, taylorseer, hicache or off")
    full_steps: int | None = Field(None, description="steps that are computed; all others are forecast")


class AskedEdit(Asked):
    """The fields of an edit besides its files. Those from `strength` on are not OpenAI's."""

    input_fidelity: Literal["high", "low"] | None = Field(None, description="ignored: see strength")
    strength: float | None = Field(None, description="share of the steps that is drawn, above 0 to 1")
    fit: Literal["cover", "pad"] | None = Field(None, description="how a picture of another shape is fitted")


def refusal(error: ValueError) -> ApiError:
    """The answer to a request that cannot be drawn: its sentence, with the API's names of settings."""
    first, space, rest = str(error).partition(" ")
    name = NAMES.get(first, first)
    param = name if name in AskedEdit.model_fields or name in ("image", "mask") else None
    return ApiError(400, name + space + rest, "invalid_value", param)


def wrong_field(errors: Sequence[Any]) -> ApiError:
    """The answer to fields that are not the API's, or not of their types."""
    first = errors[0]
    name = ".".join(str(part) for part in first["loc"] if part != "body")[:60]
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"{name} is not a field of this request", "unknown_parameter", name)
    if not name or first["type"] == "json_invalid":
        return ApiError(400, "the request must be a JSON object", "invalid_json")
    return ApiError(400, f"{name}: {first['msg']}"[:200], "invalid_type", name)


async def read_form(http: HttpRequest, files: Files, max_pixels: int) -> tuple[AskedEdit, dict[str, Path]]:
    """The fields of an edit, and its pictures' files, written for this request.

    Args:
        max_pixels: maximum number of a mask's pixels; larger ones are refused where pictures are read.

    Raises:
        ApiError: if they are not those of the API.
    """
    values: dict[str, str] = {}
    pictures: dict[str, Path] = {}
    try:
        async with http.form(max_files=4, max_fields=40, max_part_size=64 * 1024) as form:
            for name, value in form.multi_items():
                if not isinstance(value, UploadFile):
                    values[name] = value
                    continue
                role = {"image": "image", "image[]": "image", "mask": "mask_image"}.get(name)
                if role is None or role in pictures:
                    sentence = "one image and one mask can be given" if role else f"{name[:60]!r} is not a field"
                    raise ApiError(400, sentence, "invalid_value", name[:60])
                pictures[role] = files.keep(await value.read())
        if "image" not in pictures:
            raise ApiError(400, "image must be a file", "missing_required_parameter", "image")
        if "mask_image" in pictures:
            await run_in_threadpool(turn_transparency_white, pictures["mask_image"], max_pixels)
        return AskedEdit.model_validate(values), pictures
    except HTTPException as error:
        fault: ApiError = ApiError(400, str(error.detail)[:200], "invalid_form")
    except ValidationError as error:
        fault = wrong_field(error.errors())
    except ApiError as error:
        fault = error
    for path in pictures.values():
        path.unlink(missing_ok=True)
    raise fault


def turn_transparency_white(path: Path, max_pixels: int) -> None:
    """Turn a mask in OpenAI's manner, transparent where it is drawn anew, into one that is white there."""
    with contextlib.suppress(*UNREADABLE), Image.open(path, formats=FORMATS) as mask:
        if mask.width * mask.height > max_pixels or "A" not in mask.getbands():
            return  # what is wrong with it is said where it is read
        alpha = mask.convert("RGBA").getchannel("A")
        if alpha.tobytes().strip(b"\xff"):
            ImageChops.invert(alpha).save(path, "PNG")


def edit_schema() -> dict[str, Any]:
    """The form of an edit, for the OpenAPI page."""
    schema = AskedEdit.model_json_schema()
    file = {"type": "string", "format": "binary"}
    schema["properties"] |= {"image": file, "mask": file}
    schema["required"] = [*schema["required"], "image"]
    return schema
