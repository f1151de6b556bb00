"""What of the network reaches gradio."""

import asyncio
import json
from typing import Any

import pytest

from hi_diffusers.demo.gate import MAX_JSON_BYTES, Gate
from hi_diffusers.service.origins import Origins, same_site


def send_through(method: str, path: str, body: bytes = b"", headers: dict[str, str] | None = None, **settings: Any):
    """(status, the body that came through or None)"""
    reached: list[bytes] = []
    sent: list[Any] = []

    async def behind(scope: Any, receive: Any, send: Any) -> None:
        message = await receive()
        reached.append(message["body"])
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    chunks = [body[at : at + 65536] for at in range(0, len(body), 65536)] or [b""]
    messages = [{"type": "http.request", "body": one, "more_body": one is not chunks[-1]} for one in chunks]

    async def receive() -> Any:
        return messages.pop(0)

    async def send(message: Any) -> None:
        sent.append(message)

    raw = [(name.encode(), value.encode()) for name, value in ({"host": "localhost:7860"} | (headers or {})).items()]
    scope = {"type": "http", "method": method, "path": path, "headers": raw}
    asyncio.run(Gate(behind, **settings)(scope, receive, send))
    assert any(name == b"content-security-policy" for name, _ in sent[0]["headers"])
    return sent[0]["status"], (reached[0] if reached else None)


@pytest.mark.parametrize(
    "path", ["/", "/config", "/theme.css", "/assets/index.js", "/gradio_api/info", "/gradio_api/file=/tmp/x/a.png"]
)
def test_what_the_page_needs_passes(path):
    assert send_through("GET", path)[0] == 200


@pytest.mark.parametrize(
    "path",
    [
        "/gradio_api/file=http://example.com/a",
        "/gradio_api/file=https:/example.com/a",
        "/gradio_api/proxy=http://example.com",
        "/gradio_api/file=relative.png",
        "/gradio_api/component_server",
        "/gradio_api/dev/reload",
        "/gradio_api/vibe-edit",
        "/gradio_api/process_recording",
        "/gradio_api/deep_link",
        "/monitoring/summary",
        "/docs",
    ],
)
def test_what_it_does_not_need_is_not_there(path):
    assert send_through("GET", path) == (404, None)
    assert send_through("POST", path, b"{}") == (404, None)


def test_a_body_comes_through_whole():
    body = json.dumps({"data": ["x" * 200_000]}).encode()
    assert send_through("POST", "/gradio_api/queue/join", body) == (200, body)


def test_a_body_that_is_too_large_is_refused():
    assert send_through("POST", "/gradio_api/queue/join", b" " * (MAX_JSON_BYTES + 1)) == (413, None)


@pytest.mark.parametrize("path", ["http://169.254.169.254/", "https://example.com/a.png", "ftp://x", "file:///etc"])
def test_a_url_in_the_place_of_a_file_is_refused(path):
    """Gradio fetches such a path for any component, be it a text field."""
    data = {"data": ["a", {"x": [{"path": path, "meta": {"_type": "gradio.FileData"}}]}]}
    assert send_through("POST", "/gradio_api/queue/join", json.dumps(data).encode()) == (400, None)


@pytest.mark.parametrize("body", [b"{", b"\xff", b"[" * 100_000])
def test_what_is_no_json_is_refused(body):
    assert send_through("POST", "/gradio_api/queue/join", body) == (400, None)


def test_an_upload_is_bounded_by_its_length():
    limit = {"upload_bytes": 1000}
    assert send_through("POST", "/gradio_api/upload", b"x", {"content-length": "900"}, **limit)[0] == 200
    assert send_through("POST", "/gradio_api/upload", b"x", {"content-length": "999999"}, **limit)[0] == 413
    assert send_through("POST", "/gradio_api/upload", b"x", {}, **limit)[0] == 411
    both = {"content-length": "900", "transfer-encoding": "chunked"}
    assert send_through("POST", "/gradio_api/upload", b"x", both, **limit)[0] == 411


def test_a_proxys_path_is_taken_off():
    assert send_through("GET", "/hidream/config", root_path="/hidream")[0] == 200
    assert send_through("GET", "/hidream", root_path="/hidream")[0] == 200
    assert send_through("GET", "/hidreamdocs", root_path="/hidream")[0] == 404


# Other sites.


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "https://evil.example"},
        {"origin": "null"},
        {"origin": "http://localhost:9999"},
        {"host": "draw.example.org", "origin": "https://evil.example"},
        {"host": "127.0.0.1:7860", "origin": "http://localhost:7860"},
        {"host": "rebound.example"},
        {"host": "localhost.evil.example"},
        {"host": ""},
        {"host": "x.gradio.live"},
        {"host": "[::1"},
    ],
)
@pytest.mark.parametrize(("method", "path"), [("GET", "/config"), ("POST", "/gradio_api/queue/join"), ("GET", "/")])
def test_another_site_s_requests_are_refused(method, path, headers):
    origins = Origins(("draw.example.org",))
    assert send_through(method, path, b"{}", headers, origins=origins) == (403, None)


@pytest.mark.parametrize(
    ("headers", "origins"),
    [
        ({}, Origins()),
        ({"origin": "http://localhost:7860"}, Origins()),
        ({"host": "192.168.1.7:7860", "origin": "http://192.168.1.7:7860"}, Origins()),
        ({"host": "[::1]:7860", "origin": "http://[::1]:7860"}, Origins()),
        ({"host": "Draw.example.org", "origin": "https://draw.example.org"}, Origins(("draw.example.org",))),
        ({"origin": "https://friend.example"}, Origins(origins=("https://friend.example",))),
        ({"host": "x.gradio.live", "origin": "https://x.gradio.live"}, Origins(share=True)),
    ],
)
def test_the_page_s_own_requests_pass(headers, origins):
    assert send_through("POST", "/gradio_api/queue/join", b"{}", headers, origins=origins) == (200, b"{}")


@pytest.mark.parametrize("site", ["example.org", "ftp://example.org", "https://", "https://example.org/"])
def test_an_origin_that_is_none_is_refused(site):
    with pytest.raises(ValueError, match="allow_origin must be a site"):
        Origins(origins=(site,))


@pytest.mark.parametrize("cookie", [b"a=1; SameSite=None; Secure", b"a=1", b"a=1; samesite=none; HttpOnly"])
def test_a_cookie_is_not_sent_along_from_other_sites(cookie):
    ((_, value),) = same_site([(b"set-cookie", cookie)])
    assert value.count(b"SameSite=Lax") == 1 and b"none" not in value.lower()
