"""Lets only some requests reach gradio: those to routes that the page needs, with bounded bodies that name no URL.

Gradio's own server hands out any public URL (`/gradio_api/file=http://...`) and fetches one that a client gives as a
file's path: neither is wanted here.
"""

import contextlib
import json
import re
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import parse_qs

from starlette.requests import ClientDisconnect

from hi_diffusers.demo.guesses import Guesses
from hi_diffusers.demo.turns import Turns, visitor_of
from hi_diffusers.service.origins import Origins, same_site

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

MAX_JSON_BYTES = 512 * 1024
UPLOAD_OVERHEAD = 64 * 1024  # bytes of a multipart body besides its file
API = "/gradio_api"
OPEN = re.compile(
    r"/|/(config|login_check|login|logout|theme\.css|favicon\.ico|robots\.txt|manifest\.json)/?|/(assets|static|svelte)/.+"
    rf"|{API}/(info|openapi\.json|app_id|user|token|login_check|startup-events|theme\.css|upload)/?"
    rf"|{API}/(queue/(join|data|status)|cancel|reset|run/predict)/?"
    rf"|{API}/(heartbeat|call)/.+|{API}/file=/.+"
)
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline';"
    " img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self' data: blob:; worker-src 'self' blob:;"
    " object-src 'none'; base-uri 'self'"
)
HEADERS = [(b"content-security-policy", POLICY.encode()), (b"x-content-type-options", b"nosniff")]


class Refused(Exception):
    """A request that is refused.

    Args:
        status: HTTP status code.
        sentence: the reason.
    """

    def __init__(self, status: int, sentence: str):
        super().__init__(sentence)
        self.status = status


class Gate:
    """ASGI middleware before gradio's routes.

    Args:
        app: the application behind it.
        root_path: prefix that a proxy puts before all paths.
        upload_bytes: maximum size of an uploaded file.
        origins: the sites that are served.
        turns: is told which event streams are open.
    """

    def __init__(
        self,
        app: Any,
        root_path: str = "",
        upload_bytes: int = 0,
        origins: Origins | None = None,
        turns: Turns | None = None,
    ):
        self._app, self._root_path, self._upload_bytes = app, root_path, upload_bytes
        self._origins, self._turns, self._guesses = origins or Origins(), turns, Guesses()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        path, visitor = self._path(scope), visitor_of(scope.get("client"), None)
        logs_in = path == "/login" and scope["method"] == "POST"

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                if logs_in and message["status"] in (200, 400):
                    self._guesses.note(visitor, succeeded=message["status"] == 200)
                message["headers"] = [*same_site(message.get("headers", ())), *HEADERS]
            await send(message)

        try:
            wait = self._guesses.seconds_to_wait(visitor) if logs_in else 0
            if wait:
                raise Refused(429, f"too many failed logins: wait {wait:.0f} s")
            receive = await self._checked(scope, path, receive)
        except Refused as refused:
            await _answer(send_with_headers, refused)
            return
        stream = None if self._turns is None else _stream(scope, path)
        with contextlib.ExitStack() as stack:
            stack.enter_context(contextlib.suppress(ClientDisconnect))  # leaving during an upload is no error
            if self._turns is not None and stream is not None:
                stack.enter_context(self._turns.listening(stream))
            await self._app(scope, receive, send_with_headers)

    def _path(self, scope: Scope) -> str:
        """The path without a proxy's prefix and a slash at the end."""
        path: str = scope["path"]
        if self._root_path and path.startswith(self._root_path):
            path = path[len(self._root_path) :]
        return path.rstrip("/") or "/"

    async def _checked(self, scope: Scope, path: str, receive: Receive) -> Receive:
        fault = self._origins.fault(scope["headers"])
        if fault is not None:
            raise Refused(403, fault)
        if not OPEN.fullmatch(path):
            raise Refused(404, "there is no such page")
        if scope["method"] not in ("POST", "PUT", "PATCH"):
            return receive
        if path == f"{API}/upload":
            self._check_length(dict(scope["headers"]))
            scope["query_string"] = b""  # gradio keeps every upload_id, by which a page follows its upload, for ever
            return receive
        body = await _read(receive)
        if path != "/login":
            _check_json(body)
        return _replay(body, receive)

    def _check_length(self, headers: dict[bytes, bytes]) -> None:
        length = headers.get(b"content-length", b"")
        if not length.isdigit() or b"transfer-encoding" in headers:  # with both, the length is not binding
            raise Refused(411, "an upload must have a Content-Length header")
        if int(length) > self._upload_bytes + UPLOAD_OVERHEAD:
            raise Refused(413, f"an uploaded picture may have at most {self._upload_bytes} bytes")


def _stream(scope: Scope, path: str) -> str | None:
    """The session or event whose events a request listens to; None if it does not."""
    if scope["method"] != "GET":
        return None
    if path == f"{API}/queue/data":
        return parse_qs(scope.get("query_string", b"").decode("latin-1")).get("session_hash", [None])[0]
    return path.rpartition("/")[2] if path.startswith(f"{API}/call/") else None


async def _read(receive: Receive) -> bytes:
    """The whole body of a request."""
    chunks, size, more = [], 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise Refused(400, "the request's body is incomplete")
        chunks.append(message.get("body", b""))
        size += len(chunks[-1])
        more = message.get("more_body", False)
        if size > MAX_JSON_BYTES:
            raise Refused(413, f"a request may have at most {MAX_JSON_BYTES} bytes")
    return b"".join(chunks)


def _check_json(body: bytes) -> None:
    """Raise Refused if the body is not JSON, or names a URL as a file."""
    if not body:
        return
    try:
        content = json.loads(body)
        is_url = _names_url(content)
    except (ValueError, RecursionError):
        raise Refused(400, "the request must be JSON") from None
    if is_url:
        raise Refused(400, "a request must not name a URL as a file: upload the picture")


def _names_url(content: Any) -> bool:
    if isinstance(content, dict):
        path = content.get("path")
        return (isinstance(path, str) and "://" in path) or any(map(_names_url, content.values()))
    return isinstance(content, list) and any(map(_names_url, content))


def _replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that first returns the body that was already read, then whatever follows."""
    is_read = False

    async def replayed() -> Message:
        nonlocal is_read
        if is_read:
            return await receive()
        is_read = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replayed


async def _answer(send: Send, refused: Refused) -> None:
    body = json.dumps({"detail": str(refused)}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": refused.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
