"""A hub on this machine: the few addresses that a download asks for, over folders."""

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import constants

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """Repositories by name, and what was asked for.

    Attributes:
        repos: owner/name -> folder.
        gated: names of repositories whose files are refused.
        breaks_after: bytes after which a file's transfer breaks off; None is never.
        asked: "METHOD path" of every request.
    """

    def __init__(self) -> None:
        self.repos: dict[str, Path] = {}
        self.gated: set[str] = set()
        self.breaks_after: int | None = None
        self.asked: list[str] = []
        self.address = ""


@contextlib.contextmanager
def serve() -> Iterator[Hub]:
    """A hub that answers at `address` until the block ends."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._answer(with_body=True)

        def do_HEAD(self) -> None:
            self._answer(with_body=False)

        def log_message(self, *_: object) -> None:
            pass

        def _answer(self, with_body: bool) -> None:
            path = unquote(urlsplit(self.path).path)
            hub.asked.append(f"{self.command} {path}")
            api = path.startswith("/api/models/")
            owner, name, kind, revision, *rest = [
                *path.removeprefix("/api/models" if api else "").split("/")[1:],
                "",
                "",
            ]
            repo = f"{owner}/{name}"
            folder = hub.repos.get(repo)
            if folder is None:
                self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"}, with_body)
            elif revision not in ("main", COMMIT):
                self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"}, with_body)
            elif api and kind == "revision":
                self._send(200, json.dumps({"id": repo, "sha": COMMIT, "siblings": []}).encode(), {}, with_body)
            elif api:
                files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
                tree = [
                    {
                        "type": "file",
                        "path": str(path.relative_to(folder)),
                        "size": path.stat().st_size,
                        "oid": etag(path),
                    }
                    for path in files
                ]
                self._send(200, json.dumps(tree).encode(), {}, with_body)
            elif repo in hub.gated:
                self._send(403, b"{}", {"X-Error-Code": "GatedRepo"}, with_body)
            else:
                self._file(folder.joinpath(*[part for part in rest if part]), with_body)

        def _file(self, path: Path, with_body: bool) -> None:
            data, start = path.read_bytes(), 0
            headers = {"ETag": f'"{etag(path)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
            if asked := self.headers.get("Range"):
                start = int(asked.removeprefix("bytes=").partition("-")[0])
                headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            self._send(206 if asked else 200, data[start:], headers, with_body)

        def _send(self, status: int, body: bytes, headers: dict[str, str], with_body: bool) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if with_body:
                breaks = hub.breaks_after
                self.wfile.write(body[:breaks])
                if breaks is not None and len(body) > breaks:
                    self.close_connection = True

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


@contextlib.contextmanager
def served_here(monkeypatch: pytest.MonkeyPatch, cache: Path) -> Iterator[Hub]:
    """A hub that huggingface_hub asks instead of the real one, and an empty cache."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with serve() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.address)
        template = server.address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield server


def etag(path: Path) -> str:
    """Of a file's content."""
    return hashlib.sha1(path.read_bytes()).hexdigest()
