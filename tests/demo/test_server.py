"""The page under friendly, careless and hostile clients, in a real process."""

import http.server
import inspect
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from hashlib import sha256
from pathlib import Path
from typing import Any

import httpx
import pytest
from gradio_client import Client, handle_file
from PIL import Image

from hi_diffusers.demo.drawings import Drawings
from hi_diffusers.pictures.metadata import read_metadata
from tests.demo.server import ROOT, Server, running

pytestmark = pytest.mark.slow
NUM_CLIENTS, NUM_REQUESTS = 8, 5
BAD = (
    {"prompt": "a", "num_steps": -5},
    {"prompt": "a", "width": 10**9, "height": 10**9},
    {"prompt": ["not", {"a": "text"}]},
    {"prompt": "x" * 100_000},
    {"prompt": "a", "model": "/etc/passwd"},
    {"prompt": "a", "cache": {"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}},
)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with running(tmp_path_factory.mktemp("server") / "tmp", "--max_steps", 1000, "--max_queue", 64) as served:
        yield served


def connect(server: Server, folder: Path, **settings: Any) -> Client:
    return Client(server.url, verbose=False, download_files=str(folder), **settings)


def draw(client: Client, **values: Any) -> tuple[str, dict[str, Any]]:
    path, settings = client.predict(**values, api_name="/generate")
    return path, settings


def test_generate_takes_a_prompt_and_gives_the_picture_and_its_settings(server, tmp_path):
    path, settings = draw(connect(server, tmp_path), prompt="a red circle on a white background", seed=7)
    assert read_metadata(path) == settings
    assert settings["options"]["seed"] == 7
    assert Image.open(path).size == (64, 64)


def test_generate_starts_from_a_picture_and_a_mask(server, tmp_path):
    Image.new("RGB", (64, 64), "blue").save(tmp_path / "in.png")
    mask = Image.new("L", (64, 64))
    mask.paste(255, (32, 0, 64, 64))
    mask.save(tmp_path / "mask.png")
    given = {"image": handle_file(tmp_path / "in.png"), "mask_image": handle_file(tmp_path / "mask.png")}
    path, settings = draw(connect(server, tmp_path), prompt="a red circle", seed=7, strength=0.8, **given)
    assert settings["options"]["image"] == sha256((tmp_path / "in.png").read_bytes()).hexdigest()
    assert set(Image.open(path).crop((0, 0, 31, 64)).getdata()) == {(0, 0, 255)}


@pytest.mark.parametrize("file", ["/etc/passwd", str(ROOT / "docs/demo_desktop.png")])
def test_no_other_file_is_started_from(server, file):
    """Gradio's own client would upload them first."""
    names = [name for name in inspect.signature(Drawings.generate).parameters if name != "self"]
    values = {"prompt": "a", "image": {"path": file, "meta": {"_type": "gradio.FileData"}}}
    asked = httpx.post(
        f"{server.url}/gradio_api/call/generate", json={"data": [values.get(name) for name in names]}
    ).json()
    answer = httpx.get(f"{server.url}/gradio_api/call/generate/{asked['event_id']}", timeout=60)
    assert "event: error" in answer.text and "event: complete" not in answer.text


def test_the_picture_is_the_one_that_inference_draws(server, tmp_path):
    path, _ = draw(connect(server, tmp_path), prompt="a green tree on a pink background", seed=11, cache="taylorseer")
    command = [sys.executable, "inference.py", "a green tree on a pink background", "--seed", "11"]
    flags = ["--cache", "taylorseer", "--device", "cpu", "-o", str(tmp_path / "own.png")]
    subprocess.run([*command, *flags], cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True)
    assert Path(path).read_bytes() == (tmp_path / "own.png").read_bytes()


def test_only_generate_is_public(server, tmp_path):
    described = connect(server, tmp_path).view_api(return_format="dict", print_info=False)
    assert list(described["named_endpoints"]) == ["/generate"]
    assert described["unnamed_endpoints"] == {}
    required = [
        one["parameter_name"]
        for one in described["named_endpoints"]["/generate"]["parameters"]
        if not one["parameter_has_default"]
    ]
    assert required == ["prompt"]


def test_many_clients_at_once_get_their_own_pictures_and_bad_input_a_sentence(server, tmp_path, record_property):
    draw(connect(server, tmp_path), prompt="a", seed=1)
    before = server.rss()
    wrong: list[str] = []

    def visit(number: int) -> None:
        client = connect(server, tmp_path / str(number))
        for turn in range(NUM_REQUESTS):
            seed = 1000 * number + turn
            try:
                if turn == 2:
                    bad = BAD[number % len(BAD)]
                    try:
                        draw(client, **bad)
                        wrong.append(f"{str(bad)[:80]} was drawn")
                    except Exception as error:
                        if "\n" in str(error) or len(str(error)) > 400 or "Traceback" in str(error):
                            wrong.append(f"no sentence: {str(error)[:500]}")
                    continue
                path, settings = draw(client, prompt=f"a red circle, {number}", seed=seed, num_steps=10)
                settings.pop("notices")  # ten steps are not cached
                if settings["options"]["seed"] != seed or read_metadata(path) != settings:
                    wrong.append(f"client {number} asked for seed {seed} and got {settings['options']}")
            except Exception as error:
                wrong.append(f"client {number}, turn {turn}: {error!r}")

    threads = [threading.Thread(target=visit, args=(number,)) for number in range(NUM_CLIENTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    after = server.rss()
    record_property("rss_mib_before_and_after", (before, after))
    print(f"RSS {before:.0f} MiB before, {after:.0f} MiB after {NUM_CLIENTS} x {NUM_REQUESTS} requests")
    assert not wrong
    assert after < before + 150
    assert server.process.poll() is None


def test_memory_is_flat_over_changes_of_the_model(server, tmp_path):
    client = connect(server, tmp_path)
    sizes = []
    for turn in range(6):
        draw(client, prompt="a red circle", model=("nano", "nano-dev")[turn % 2], num_steps=4)
        sizes.append(server.rss())
    print("RSS after each change:", [f"{size:.0f}" for size in sizes])
    assert sizes[-1] < sizes[1] + 20, "one copy of the bundled model is 25 MiB"


def test_a_full_queue_answers_politely(tmp_path):
    with running(tmp_path / "tmp", "--max_queue", 2, "--max_steps", 1000) as small:
        jobs = []
        refused = ""
        for _ in range(6):
            try:
                jobs.append(connect(small, tmp_path).submit("a", num_steps=400, cache="off", api_name="/generate"))
                time.sleep(0.3)
            except Exception as error:
                refused = str(error)
        deadline = time.monotonic() + 60
        while not refused and time.monotonic() < deadline:
            failed = [job.exception(timeout=0.1) for job in jobs if job.done()]
            refused = next((str(error) for error in failed if error), "")
            time.sleep(0.1)
        assert "queue is full" in refused.lower() or "busy" in refused.lower()
        for job in jobs:
            job.cancel()


KILLED = """
import sys
from gradio_client import Client, handle_file
client = Client(sys.argv[1], verbose=False)
job = client.submit("a", num_steps=1000, cache="off", api_name="/generate")
while not job.outputs():
    pass
print("drawing", flush=True)
job.result()
"""


def test_killing_the_client_frees_the_worker(server, tmp_path):
    """1000 uncached steps take some 25 s: the next picture must not wait for them."""
    draw(connect(server, tmp_path), prompt="a", num_steps=2)
    waited = []
    for _ in range(2):
        client = subprocess.Popen([sys.executable, "-c", KILLED, server.url], stdout=subprocess.PIPE, text=True)
        assert client.stdout is not None and client.stdout.readline() == "drawing\n"
        other = connect(server, tmp_path)
        client.send_signal(signal.SIGKILL)
        client.wait()
        began = time.monotonic()
        draw(other, prompt="a", num_steps=2)
        waited.append(time.monotonic() - began)
    print("seconds until the next picture:", waited)
    assert max(waited) < 5


@pytest.mark.parametrize(
    "path", ["/etc/passwd", str(ROOT / "README.md"), str(ROOT / "gradio_demo.py"), "/proc/self/environ"]
)
def test_no_other_file_can_be_read(server, path):
    for form in (f"/gradio_api/file={path}", f"/gradio_api/file={path}/../{Path(path).name}", f"/file={path}"):
        assert httpx.get(server.url + form).status_code in (403, 404)


def test_no_url_is_fetched(server, tmp_path):
    reached = []

    class Listener(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            reached.append(self.path)
            self.send_response(200)
            self.end_headers()

        do_HEAD = do_GET

    trap = http.server.HTTPServer(("127.0.0.1", 0), Listener)
    threading.Thread(target=trap.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{trap.server_port}/trap.png"
    file = {"path": url, "url": url, "meta": {"_type": "gradio.FileData"}}
    config = httpx.get(f"{server.url}/config").json()
    for dependency in config["dependencies"]:
        body = {
            "data": [file] * max(1, len(dependency["inputs"])),
            "fn_index": dependency["id"],
            "session_hash": "trap",
        }
        assert httpx.post(f"{server.url}/gradio_api/queue/join", json=body).status_code == 400
        assert httpx.post(f"{server.url}/gradio_api/run/predict", json=body).status_code == 400
    assert httpx.get(f"{server.url}/gradio_api/file={url}").status_code == 404
    trap.shutdown()
    assert reached == []


def polyglot(path: Path) -> Path:
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"%PDF-1.4 <script>alert(1)</script>" + b"PK\x03\x04" + os.urandom(2000))
    return path


def bomb(path: Path) -> Path:
    """A PNG of 30000 x 30000 pixels in 100 kB."""
    Image.new("1", (30000, 30000)).save(path)
    return path


@pytest.mark.parametrize("make", [polyglot, bomb], ids=["polyglot", "bomb"])
def test_a_hostile_picture_is_refused_with_a_sentence_and_not_kept(server, tmp_path, make):
    client = connect(server, tmp_path)
    config = httpx.get(f"{server.url}/config").json()
    upload = next(one["id"] for one in config["components"] if one["props"].get("elem_id") == "upload")
    index = next(one["id"] for one in config["dependencies"] if one["inputs"][:1] == [upload])
    (path,) = httpx.post(
        f"{server.url}/gradio_api/upload", files={"files": ("a.png", make(tmp_path / "a.png").read_bytes())}
    ).json()
    before = len(server.written())
    data = [{"path": path, "meta": {"_type": "gradio.FileData"}}, None]
    body = {"data": data, "fn_index": index, "session_hash": "hostile"}
    assert httpx.post(f"{server.url}/gradio_api/queue/join", json=body).status_code == 200
    with httpx.stream("GET", f"{server.url}/gradio_api/queue/data", params={"session_hash": "hostile"}) as answer:
        told = "".join(answer.iter_text())
    assert "No settings were loaded: the file is not a readable" in told
    assert path not in told
    assert len(server.written()) == before
    assert draw(client, prompt="a", num_steps=2)


def test_the_queue_cannot_be_passed_by(server):
    """`run/predict` once drew for any number of clients at once."""
    for dependency in httpx.get(f"{server.url}/config").json()["dependencies"]:
        body = {"data": [], "fn_index": dependency["id"], "session_hash": "direct"}
        answer = httpx.post(f"{server.url}/gradio_api/run/predict", json=body)
        if dependency["queue"] is not False:
            assert answer.status_code == 404, dependency


def test_an_upload_whose_length_is_a_lie_leaves_nothing(server):
    before = len(server.written())
    host, _, port = server.url.removeprefix("http://").partition(":")
    lie = b"POST /gradio_api/upload HTTP/1.1\r\nHost: localhost\r\n"
    lie += b"Content-Length: 10\r\nTransfer-Encoding: chunked\r\n\r\n"
    with socket.create_connection((host, int(port)), timeout=10) as line:
        line.sendall(lie + b"100000\r\n" + b"x" * 2**20)
        assert b" 411 " in line.recv(100) or b" 400 " in line.recv(100)
    assert len(server.written()) == before


def test_another_site_reads_nothing_and_a_named_one_does(tmp_path):
    friend = "https://friend.example"
    with running(tmp_path / "tmp", "--allow_origin", friend) as server:
        url = f"{server.url}/config"
        stranger = httpx.get(url, headers={"Origin": "https://evil.example"})
        preflight = {"Origin": friend, "Access-Control-Request-Method": "POST"}
        allowed = [httpx.get(url, headers={"Origin": friend}), httpx.options(url, headers=preflight)]
        own = httpx.get(url, headers={"Origin": server.url})
        preflight["Origin"] = "https://evil.example"
        refused = [stranger, httpx.options(url, headers=preflight), httpx.get(url, headers={"Host": "evil.example"})]
    assert [answer.status_code for answer in refused] == [403, 403, 403]
    assert not any("access-control-allow-origin" in answer.headers for answer in (*refused, own))
    assert [answer.status_code for answer in (*allowed, own)] == [200, 200, 200]
    assert [answer.headers["access-control-allow-origin"] for answer in allowed] == [friend, friend]


def test_an_upload_that_is_too_large_is_refused(server):
    big = httpx.post(f"{server.url}/gradio_api/upload", files={"files": ("a.png", b"x" * (21 * 2**20))})
    assert big.status_code == 413


def test_without_the_password_nothing_draws_uploads_or_is_read(tmp_path):
    with running(tmp_path / "tmp", "--auth", "environment", environment={"HIDREAM_DEMO_AUTH": "ann:secret"}) as closed:
        api = f"{closed.url}/gradio_api"
        body = {"data": [], "fn_index": 0, "session_hash": "x"}
        answers = {
            "config": httpx.get(f"{closed.url}/config"),
            "info": httpx.get(f"{api}/info"),
            "openapi": httpx.get(f"{api}/openapi.json"),
            "join": httpx.post(f"{api}/queue/join", json=body),
            "data": httpx.get(f"{api}/queue/data", params={"session_hash": "x"}),
            "predict": httpx.post(f"{api}/run/predict", json=body),
            "call": httpx.post(f"{api}/call/generate", json={"data": ["a"]}),
            "upload": httpx.post(f"{api}/upload", files={"files": ("a.png", b"x")}),
            "file": httpx.get(f"{api}/file={closed.folder}/a.png"),
        }
        assert {name: answer.status_code for name, answer in answers.items()} == dict.fromkeys(answers, 401)
        page = httpx.get(closed.url).text
        assert '"auth_required":true' in page and "Negative prompt" not in page
        assert httpx.post(f"{closed.url}/login", data={"username": "ann", "password": "guess"}).status_code == 400
        _, settings = draw(connect(closed, tmp_path, auth=("ann", "secret")), prompt="a", seed=3, num_steps=2)
        assert settings["options"]["seed"] == 3
        assert not any("secret" in line for line in closed.log)


def test_a_taken_port_is_one_line(server):
    port = server.url.rpartition(":")[2]
    command = [sys.executable, str(ROOT / "gradio_demo.py"), "--port", port, "--device", "cpu"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 2
    assert f"port {port} of 127.0.0.1 cannot be used" in ended.stderr.splitlines()[-1]


def test_https_under_a_proxys_path(tmp_path):
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    made = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=localhost"]
    subprocess.run([*made, "-keyout", str(key), "-out", str(certificate)], check=True, capture_output=True)
    files = ("--ssl_certfile", certificate, "--ssl_keyfile", key)
    with running(tmp_path / "tmp", *files, "--root_path", "/hidream") as secure:
        url = secure.url.replace("http://", "https://")
        config = httpx.get(f"{url}/config", verify=False)
        assert config.status_code == 200
        assert config.json()["root"].endswith("/hidream")
        assert any("https://" in line for line in secure.log)
        with pytest.raises(httpx.HTTPError):
            httpx.get(f"{secure.url}/config")


def test_the_settings_are_plain_json(server, tmp_path):
    _, settings = draw(connect(server, tmp_path), prompt='<img src=x onerror="alert(1)">', num_steps=2)
    assert json.loads(json.dumps(settings)) == settings
