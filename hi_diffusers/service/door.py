"""What stands before the API: bounded bodies, other sites refused, request ids, the log and the count of requests."""

import asyncio
import secrets
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse

from hi_diffusers.service.fields import ApiError
from hi_diffusers.service.measures import Measures
from hi_diffusers.service.origins import Origins
from hi_diffusers.service.records import Records

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

MAX_JSON_BYTES = 256 * 1024
BODY_SECONDS = 60.0  # in which a request's body must arrive
ROUTES = (
    "/v1/images/generations",
    "/v1/images/edits",
    "/v1/models",
    "/files",
    "/health",
    "/ready",
    "/metrics",
    "/docs",
)


class Door:
    """ASGI middleware.

    Args:
        app: the application behind it.
        origins: the sites and host names that are served.
        measures, records: count and log every request.
        upload_bytes: maximum size of the body of a request with pictures.
    """

    def __init__(self, app: Any, origins: Origins, measures: Measures, records: Records, upload_bytes: int):
        self._app, self._origins, self._measures, self._records = app, origins, measures, records
        self._upload_bytes = upload_bytes

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status, faults = time.monotonic(), 500, list[ApiError]()
        scope.setdefault("state", {})["request_id"] = request_id = f"req_{secrets.token_hex(8)}"

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if faults:  # the application only knows that the body is incomplete
                return
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", request_id.encode())]
            await send(message)

        try:
            fault = self._origins.fault(scope["headers"])
            if fault is not None:
                raise ApiError(403, fault, "other_site")
            await self._app(scope, self._bounded(scope, receive, faults), send_with_id)
            if faults:
                raise faults.pop()
        except ApiError as error:
            faults.clear()
            self._measures.note_refusal(error.code)
            await JSONResponse(error.answer(), error.status, error.headers)(scope, receive, send_with_id)
        except ClientDisconnect:
            status = 499
        except Exception as error:
            self._records.note_failure(error)
            if status == 500:
                answer = ApiError(500, "the request failed; the server's log has the details", "failed").answer()
                await JSONResponse(answer, 500)(scope, receive, send_with_id)
        finally:
            path = next((one for one in ROUTES if scope["path"].startswith(one)), "other")
            self._measures.note_request(path, status)
            self._records.note_request(scope, status, time.monotonic() - began)

    def _bounded(self, scope: Message, receive: Receive, faults: list[ApiError]) -> Receive:
        """A `receive` that ends a body that is too large, or too slow, and adds the fault to a list."""
        most = self._upload_bytes if scope["path"] == "/v1/images/edits" else MAX_JSON_BYTES
        size, is_whole, deadline = 0, False, time.monotonic() + BODY_SECONDS

        async def bounded() -> Message:
            nonlocal size, is_whole
            if is_whole or faults:
                return {"type": "http.disconnect"} if faults else await receive()
            try:
                message = await asyncio.wait_for(receive(), max(0.0, deadline - time.monotonic()))
            except TimeoutError:
                faults.append(ApiError(408, f"the body did not arrive within {BODY_SECONDS:g} s", "too_slow"))
                return {"type": "http.disconnect"}
            size += len(message.get("body", b""))
            is_whole = not message.get("more_body", False)
            if size > most:
                faults.append(ApiError(413, f"the body may have at most {most} bytes", "too_large"))
                return {"type": "http.disconnect"}
            return message

        return bounded
