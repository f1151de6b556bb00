"""The images API of OpenAI before a `BatchQueue`: routes and answers."""

import asyncio
import base64
import io
import json
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi import Request as HttpRequest
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse
from PIL import Image
from starlette.exceptions import HTTPException

from cache_functions import count_steps
from hi_diffusers.pictures.inputs import InputPicture
from hi_diffusers.pictures.metadata import encode_picture
from hi_diffusers.request.options import parse_resolution
from hi_diffusers.service.fields import (
    DESCRIBED,
    ApiError,
    Asked,
    AskedEdit,
    edit_schema,
    read_form,
    refusal,
    wrong_field,
)
from hi_diffusers.service.files import Files
from hi_diffusers.service.keys import Key, Keys, RateLimited
from hi_diffusers.service.measures import Measures
from hi_diffusers.service.offered import OfferedModel
from hi_diffusers.service.queueing import BatchQueue, Draining, Drawn, Event, Failed, Full, Preview, Ticket
from hi_diffusers.service.records import Records
from hi_diffusers.service.requests import Limits, Request, check

QUALITIES = {"high": "high", "hd": "high", "medium": "medium", "low": "draft", "auto": None, "standard": None}
FORMATS = {"png": "PNG", "jpeg": "JPEG", "webp": "WEBP"}
POLL_SECONDS, ALIVE_SECONDS = 0.25, 10.0


@dataclass(frozen=True)
class ServiceSettings:
    """What the API allows.

    Attributes:
        limits: of one request.
        deadline: seconds from a request to its answer.
        aliases: further names of the model.
        public_url: address under which clients reach the server; "" is that of the request.
    """

    limits: Limits
    deadline: float = 600.0
    aliases: tuple[str, ...] = ()
    public_url: str = ""


class Service:
    """Answers requests.

    Args:
        engine: draws.
        model: the model that it draws with.
        settings: what is allowed.
        keys, files, measures, records: who may ask, where pictures lie, what is counted and what is logged.
    """

    def __init__(
        self,
        engine: BatchQueue,
        model: OfferedModel,
        settings: ServiceSettings,
        keys: Keys,
        files: Files,
        measures: Measures,
        records: Records,
    ):
        self.engine, self.model, self.settings, self.keys = engine, model, settings, keys
        self.files, self.measures, self.records = files, measures, records
        self._deciding = asyncio.Lock()  # a schedule that is not calibrated takes a second and 100 MB

    def client(self, http: HttpRequest) -> Key:
        """Whose request it is; raises ApiError for nobody's."""
        key = self.keys.find(http.headers.get("authorization"))
        if key is None:
            raise ApiError(401, "the Authorization header must be Bearer and a key of this server", "invalid_api_key")
        http.scope["state"]["client"] = key.name
        return key

    async def draw(self, http: HttpRequest, asked: Asked, pictures: Mapping[str, Path] | None = None) -> Response:
        """Draw what is asked for.

        Args:
            pictures: files of "image" and "mask_image"; they are read until the answer is complete.
        """
        with ExitStack() as uploads:
            for path in (pictures or {}).values():
                uploads.callback(path.unlink, missing_ok=True)
            key = self.client(http)
            if asked.model is not None and asked.model not in self.names:
                sentence = f"the model here is {self.names[0]}, not {asked.model[:60]!r}"
                raise ApiError(404, sentence, "model_not_found", "model")
            if asked.stream and asked.n not in (None, 1):
                raise ApiError(400, f"stream needs n = 1, got {asked.n}", "invalid_value", "stream")
            try:
                async with self._deciding:
                    request = await run_in_threadpool(self._check, asked, key, pictures or {})
            except ValueError as error:
                raise refusal(error) from error
            self.records.note_prompt(http, request.options.prompt)
            ticket, events = self._admit(key, request, asked)
            told = self._until_finished(http, ticket, events)
            if asked.stream:
                uploads.callback(self.engine.cancel, ticket)  # `told` does not, if the client leaves before it begins
                return EventStream(self._stream(http, asked, request, told), uploads.pop_all())
            drawn = [event async for event in told if isinstance(event, Drawn)]
            drawn.sort(key=lambda one: one.number)
            data = [await self._data(http, asked, request, one) for one in drawn]
            return JSONResponse({"created": int(time.time()), "data": data, **described(asked, request)})

    def _admit(self, key: Key, request: Request, asked: Asked) -> tuple[Ticket, "asyncio.Queue[Event]"]:
        """Put a request into the engine's queue; returns its ticket, and the queue of its events."""
        events: asyncio.Queue[Event] = asyncio.Queue()
        loop = asyncio.get_running_loop()
        previews = asked.partial_images or 0 if asked.stream else 0

        def tell(event: Event) -> None:
            loop.call_soon_threadsafe(events.put_nowait, event)

        ticket = Ticket(request, key.name, tell, previews)
        try:
            key.take_turn()
            self.engine.admit(ticket)
        except (Full, RateLimited) as error:
            code = "queue_full" if isinstance(error, Full) else "rate_limit_exceeded"
            raise ApiError(429, str(error), code, seconds=error.seconds) from error
        except Draining as error:
            raise ApiError(503, str(error), "draining", seconds=5) from error
        return ticket, events

    async def _until_finished(
        self, http: HttpRequest, ticket: Ticket, events: "asyncio.Queue[Event]"
    ) -> AsyncIterator[Event | None]:
        """A request's events until its last picture; None now and then. However it ends, the engine forgets it."""
        missing, deadline = len(ticket.request.drawings), time.monotonic() + self.settings.deadline
        try:
            while missing:
                try:
                    event = await asyncio.wait_for(events.get(), POLL_SECONDS)
                except TimeoutError:
                    if await http.is_disconnected():
                        raise ApiError(499, "the client went away", "client_gone") from None
                    if time.monotonic() > deadline:
                        sentence = f"not finished within {self.settings.deadline:g} s"
                        raise ApiError(504, sentence, "deadline_exceeded") from None
                    yield None
                    continue
                if isinstance(event, Failed):
                    raise self._failure(event.error)
                if isinstance(event, Drawn):
                    missing -= 1
                    if event.withheld:
                        raise ApiError(
                            400, "the picture is withheld: the server's filter flagged it", "content_policy_violation"
                        )
                yield event
        finally:
            self.engine.cancel(ticket)

    def _failure(self, error: Exception) -> ApiError:
        if isinstance(error, Draining):
            return ApiError(503, str(error), "draining", seconds=5)
        if isinstance(error, ValueError):
            return refusal(error)
        self.records.note_failure(error)
        return ApiError(500, f"the drawing failed ({type(error).__name__}); the server's log has the details", "failed")

    async def _stream(
        self, http: HttpRequest, asked: Asked, request: Request, told: AsyncIterator[Event | None]
    ) -> AsyncIterator[bytes]:
        """Server-sent events; comments keep the connection alive."""
        kind = "image_edit" if isinstance(asked, AskedEdit) else "image_generation"
        common, said = described(asked, request) | {"background": "opaque"}, time.monotonic()
        try:
            async for event in told:
                common["created_at"] = int(time.time())
                if isinstance(event, Preview):
                    data = await run_in_threadpool(_encoded, event.image, asked)
                    more = {"partial_image_index": event.index, "b64_json": base64.b64encode(data).decode()}
                    yield sse(f"{kind}.partial_image", common | more)
                elif isinstance(event, Drawn):
                    yield sse(f"{kind}.completed", common | await self._data(http, asked, request, event))
                elif time.monotonic() > said + ALIVE_SECONDS:
                    said = time.monotonic()
                    yield b": waiting\n\n"
        except ApiError as error:
            self.measures.note_refusal(error.code)
            yield sse("error", error.answer())

    def _check(self, asked: Asked, key: Key, pictures: dict[str, Path]) -> Request:
        """The request that the fields describe; raises ValueError."""
        values: dict[str, Any] = {
            "prompt": asked.prompt,
            "negative_prompt": asked.negative_prompt,
            "seed": asked.seed,
            "num_steps": asked.steps,
            "guidance": asked.guidance,
            "num_images": 1 if asked.n is None else asked.n,
            "cache": asked.cache,
            "full_steps": asked.full_steps,
        }
        if asked.quality is not None:
            if asked.quality not in QUALITIES:
                raise ValueError(f"quality must be one of {', '.join(QUALITIES)}, got {asked.quality[:60]!r}")
            values["quality"] = QUALITIES[asked.quality]
        if asked.size not in (None, "auto"):
            try:
                values["width"], values["height"] = parse_resolution(asked.size)
            except ValueError as error:
                raise ValueError(
                    f"size must be auto or WIDTHxHEIGHT such as 1360x768, got {asked.size[:60]!r}"
                ) from error
        if isinstance(asked, AskedEdit):
            values |= {"strength": asked.strength, "fit": asked.fit}
            most = self.settings.limits.upload_pixels
            values |= {role: InputPicture.of(path, role, most, "another file") for role, path in pictures.items()}
        request = check(values, self.settings.limits, {self.names[0]: self.model})
        options = request.options
        key.limits.check(options.width, options.height, options.num_steps, len(request.drawings))
        return request

    async def _data(self, http: HttpRequest, asked: Asked, request: Request, drawn: Drawn) -> dict[str, Any]:
        """One picture of an answer."""
        picture = drawn.picture
        data = await run_in_threadpool(_encoded, picture.image, asked, picture.metadata)
        self.measures.note_picture(drawn)
        if asked.response_format == "url":
            base = self.settings.public_url or str(http.base_url).rstrip("/")
            where = {"url": f"{base}/files/{self.files.add(data, asked.output_format or 'png')}"}
        else:
            where = {"b64_json": base64.b64encode(data).decode()}
        full = count_steps(picture.trace, "full")
        expected = request.expected(full)
        return where | {
            "seed": picture.metadata["options"]["seed"],
            "seconds": round(picture.seconds.whole, 3),
            "waited_seconds": round(drawn.waited, 3),
            "full_steps": full,
            "forecast_steps": count_steps(picture.trace, "forecast"),
            "expected_db": None if expected is None else round(expected.median_db, 1),
            "notices": list(request.drawings[drawn.number].notices),
        }

    @property
    def names(self) -> tuple[str, ...]:
        """The model's name and its aliases."""
        return self.model.preset.name, *self.settings.aliases


class EventStream(StreamingResponse):
    """Server-sent events.

    Args:
        events: the stream.
        ending: closed when the answer ends, also before the first event.
    """

    def __init__(self, events: AsyncIterator[bytes], ending: ExitStack):
        super().__init__(events, media_type="text/event-stream")
        self._ending = ending

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        with self._ending:
            await super().__call__(scope, receive, send)


def make_app(service: Service) -> FastAPI:
    """The routes of a service."""
    app = FastAPI(title="HiDream-I1 with forecast steps", description="OpenAI's images API, and a few fields more.")
    responses: dict[int | str, Any] = {code: {"description": text} for code, text in DESCRIBED.items()}

    @app.post("/v1/images/generations", responses=responses)
    async def generations(http: HttpRequest, asked: Asked) -> Response:
        """Draw pictures of a prompt."""
        return await service.draw(http, asked)

    form = {"multipart/form-data": {"schema": edit_schema()}}

    @app.post("/v1/images/edits", responses=responses, openapi_extra={"requestBody": {"content": form}})
    async def edits(http: HttpRequest) -> Response:
        """Draw a picture anew, in whole, or where a mask is transparent (one without transparency: white)."""
        service.client(http)
        asked, pictures = await read_form(http, service.files, service.settings.limits.upload_pixels)
        return await service.draw(http, asked, pictures)

    @app.get("/v1/models")
    async def models(http: HttpRequest) -> dict[str, Any]:
        """The served model."""
        service.client(http)
        return {"object": "list", "data": [described_model(name) for name in service.names]}

    @app.get("/v1/models/{name}")
    async def model(http: HttpRequest, name: str) -> dict[str, Any]:
        """One model."""
        service.client(http)
        if name not in service.names:
            raise ApiError(404, f"there is no model {name[:60]!r} here", "model_not_found", "model")
        return described_model(name)

    @app.get("/files/{name}")
    async def file(name: str) -> Response:
        """A picture of an answer with response_format url."""
        path = service.files.find(name)
        if path is None:
            raise ApiError(404, "there is no such picture, or it was removed after an hour", "not_found")
        return FileResponse(path)

    @app.get("/health")
    async def health() -> dict[str, str]:
        """Whether the process answers."""
        return {"status": "alive"}

    @app.get("/ready")
    async def ready() -> JSONResponse:
        """Whether the model is loaded and warm, and requests are admitted."""
        is_ready = service.engine.is_ready
        return JSONResponse({"status": "ready" if is_ready else "not ready"}, 200 if is_ready else 503)

    @app.get("/metrics")
    async def metrics(http: HttpRequest) -> Response:
        """Prometheus metrics."""
        service.client(http)
        return Response(service.measures.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.exception_handler(ApiError)
    async def refuse(http: HttpRequest, error: ApiError) -> JSONResponse:
        service.measures.note_refusal(error.code)
        return JSONResponse(error.answer(), error.status, error.headers)

    @app.exception_handler(RequestValidationError)
    async def refuse_fields(http: HttpRequest, error: RequestValidationError) -> JSONResponse:
        return await refuse(http, wrong_field(error.errors()))

    @app.exception_handler(HTTPException)
    async def refuse_route(http: HttpRequest, error: HTTPException) -> JSONResponse:
        return await refuse(http, ApiError(error.status_code, str(error.detail), "not_found"))

    return app


def described(asked: Asked, request: Request) -> dict[str, Any]:
    """What an answer says about all of its pictures."""
    options = request.options
    size, quality = f"{options.width}x{options.height}", asked.quality or "auto"
    return {"size": size, "quality": quality, "output_format": asked.output_format or "png"}


def described_model(name: str) -> dict[str, Any]:
    """A model, as OpenAI's API lists it."""
    return {"id": name, "object": "model", "created": 0, "owned_by": "hi-diffusers"}


def sse(kind: str, data: Mapping[str, Any]) -> bytes:
    """A server-sent event."""
    body = data if kind == "error" else {"type": kind, **data}
    return f"event: {kind}\ndata: {json.dumps(body, ensure_ascii=False)}\n\n".encode()


def _encoded(image: Image.Image, asked: Asked, metadata: dict[str, Any] | None = None) -> bytes:
    form = FORMATS[asked.output_format or "png"]
    if metadata is None:
        encoded = io.BytesIO()
        image.save(encoded, form, quality=asked.output_compression or 95)
        return encoded.getvalue()
    return encode_picture(image, metadata, form, quality=asked.output_compression or 95)
