"""serve.py in a real process: OpenAI's client, curl, hostile clients, batches, signals."""

import base64
import contextlib
import io
import json
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import openai
import pytest
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from hi_diffusers.pictures.metadata import read_metadata
from hi_diffusers.pictures.metrics import psnr
from tests.service.server import ROOT, Server, running, wait_until_ready

pytestmark = pytest.mark.slow
KEYS = """# name, key, limits
ann 0123456789abcdef-ann
bob 0123456789abcdef-bob per_minute=2 n=2 steps=20 pixels=4050
"""
PROMPT = "a red circle on a blue background"


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Server]:
    flags = ("--max_batch", 4, "--max_queue", 400, "--model_alias", "gpt-image-1")
    with running(tmp_path_factory.mktemp("serve") / "tmp", *flags) as served:
        yield served


@pytest.fixture
def client(server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def decoded(data: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(data)))


def measured(server: Server, headers: dict[str, str] | None = None) -> dict[str, float]:
    """Every sample of /metrics, by its name and labels, read by Prometheus' own parser."""
    text = httpx.get(f"{server.url}/metrics", headers=headers or {}).text
    found: Counter[str] = Counter()
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = "".join(f" {key}={value}" for key, value in sorted(sample.labels.items()))
            found[sample.name + labels] += sample.value
            found[sample.name] += sample.value if labels else 0
    return found


def test_openai_s_client_generates(client, tmp_path):
    answer = client.images.generate(prompt=PROMPT, n=2, size="80x48", quality="medium", extra_body={"seed": 7})
    assert len(answer.data) == 2 and answer.size == "80x48" and answer.output_format == "png"
    for number, one in enumerate(answer.data):
        assert one.seed == 7 + number and one.seconds > 0 and one.full_steps + one.forecast_steps == 50
        (tmp_path / "a.png").write_bytes(base64.b64decode(one.b64_json))
        options = read_metadata(tmp_path / "a.png")["options"]
        assert options["seed"] == 7 + number and options["prompt"] == PROMPT
    assert answer.data[0].expected_db >= 38


def test_the_picture_is_the_one_that_inference_draws(client, tmp_path):
    answer = client.images.generate(prompt=PROMPT, extra_body={"seed": 11, "full_steps": 8, "cache": "taylorseer"})
    command = [sys.executable, "inference.py", PROMPT, "--seed", "11", "--cache", "taylorseer"]
    out = tmp_path / "a.png"
    subprocess.run([*command, "--full_steps", "8", "--output", out], cwd=ROOT, check=True, capture_output=True)
    mine, theirs = (np.asarray(one.convert("RGB")) for one in (decoded(answer.data[0].b64_json), Image.open(out)))
    assert np.abs(mine.astype(int) - theirs.astype(int)).max() <= 1
    (tmp_path / "b.png").write_bytes(base64.b64decode(answer.data[0].b64_json))
    assert read_metadata(tmp_path / "b.png") == read_metadata(out)


def test_openai_s_client_lists_the_model_and_its_alias(client):
    assert [one.id for one in client.models.list()] == ["nano", "gpt-image-1"]
    assert client.models.retrieve("nano").id == "nano"
    assert client.images.generate(prompt=PROMPT, model="gpt-image-1", extra_body={"steps": 4}).data
    with pytest.raises(openai.NotFoundError, match="the model here is nano"):
        client.images.generate(prompt=PROMPT, model="dall-e-3")
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("none")


@pytest.mark.parametrize("form", ["png", "jpeg", "webp"])
def test_a_url_gives_the_picture_for_an_hour(client, form):
    answer = client.images.generate(
        prompt=PROMPT, response_format="url", output_format=form, extra_body={"steps": 4, "seed": 1}
    )
    got = httpx.get(answer.data[0].url)
    assert got.headers["content-type"] == f"image/{form}"
    assert Image.open(io.BytesIO(got.content)).format == form.upper()
    for path in ("/files/none.png", "/files/..%2F..%2Fetc%2Fpasswd", "/files/", f"/files/{'x' * 300}.png"):
        assert httpx.get(re.sub(r"/files/.*", path, answer.data[0].url)).status_code == 404


def test_openai_s_client_edits(client, tmp_path):
    picture = Image.new("RGB", (64, 64), "blue")
    picture.save(tmp_path / "in.png")
    transparent = picture.convert("RGBA")
    transparent.paste((0, 0, 0, 0), (32, 0, 64, 64))  # OpenAI's masks: transparent is drawn anew
    transparent.save(tmp_path / "mask.png")
    white = Image.new("L", (64, 64))
    white.paste(255, (32, 0, 64, 64))
    white.save(tmp_path / "white.png")
    drawn = []
    for mask in ("mask.png", "white.png"):
        with open(tmp_path / "in.png", "rb") as image, open(tmp_path / mask, "rb") as given:
            answer = client.images.edit(
                image=image, mask=given, prompt="a green square", extra_body={"seed": 3, "strength": 0.9}
            )
        drawn.append(np.asarray(decoded(answer.data[0].b64_json).convert("RGB")))
        assert (drawn[-1][:, :31] == (0, 0, 255)).all() and (drawn[-1][:, 40:] != (0, 0, 255)).any()
    assert (drawn[0] == drawn[1]).all()
    with open(tmp_path / "in.png", "rb") as image:
        answer = client.images.edit(image=image, prompt="a green square", extra_body={"seed": 3, "strength": 0.4})
    assert answer.data[0].full_steps + answer.data[0].forecast_steps == 20


def test_edits_are_refused_with_a_sentence(server, client, tmp_path):
    Image.new("RGB", (64, 64)).save(tmp_path / "in.png")
    Image.new("RGB", (32, 64), "white").save(tmp_path / "small.png")
    content = (tmp_path / "in.png").read_bytes()
    url, prompt = f"{server.url}/v1/images/edits", {"prompt": "a"}
    for files, data, said in (
        ({"image": content, "mask": (tmp_path / "small.png").read_bytes()}, prompt, "64x64, got 32x64"),
        ({"image": b"no picture"}, prompt, "image must be a PNG, JPEG or WebP picture"),
        ({"image": content, "mask": b"no picture"}, prompt, "mask must be a PNG"),
        ({}, prompt, "image must be a file"),
        ({"image": content}, {}, "prompt"),
        ({"image": content, "other": content}, prompt, "'other' is not a field"),
        ({"image": content}, prompt | {"strength": "2"}, "strength must be"),
        ({"image": content}, prompt | {"strength": "much"}, "strength"),
        ({"image": content}, prompt | {"path": "/etc/passwd"}, "path is not a field"),
        ({"image": content}, prompt | {"stream": "true", "n": "2"}, "stream needs n = 1"),
    ):
        answer = httpx.post(url, files=files or {"x": ("", b"")}, data=data)
        assert answer.status_code == 400 and said in answer.json()["error"]["message"], answer.text
        assert str(server.folder) not in answer.text
    assert [one for one in server.written() if not one.suffix] == [], "an upload was left behind"


def test_openai_s_client_streams(client):
    stream = client.images.generate(prompt=PROMPT, stream=True, partial_images=2, extra_body={"seed": 7})
    events = list(stream)
    assert [one.type for one in events] == ["image_generation.partial_image"] * 2 + ["image_generation.completed"]
    assert [one.partial_image_index for one in events[:2]] == [0, 1]
    final = decoded(events[-1].b64_json).convert("RGB")
    seen = [psnr(decoded(one.b64_json).convert("RGB"), final) for one in events[:2]]
    assert events[-1].seed == 7 and seen[0] < seen[1]
    with pytest.raises(openai.BadRequestError, match="stream needs n = 1"):
        client.images.generate(prompt=PROMPT, stream=True, n=2)


@pytest.mark.parametrize(
    ("body", "param", "said"),
    [
        ({}, "prompt", "Field required"),
        ({"prompt": 5}, "prompt", "string"),
        ({"prompt": "x" * 3000}, "prompt", "at most 2000 characters"),
        ({"prompt": "a", "n": 0}, "n", "n must be a whole number from 1 to 4, got 0"),
        ({"prompt": "a", "n": 5}, "n", "from 1 to 4"),
        ({"prompt": "a", "size": "big"}, "size", "WIDTHxHEIGHT"),
        ({"prompt": "a", "size": "99999x1"}, "size", "size must be"),
        ({"prompt": "a", "quality": "best"}, "quality", "quality must be one of"),
        ({"prompt": "a", "quality": "high", "full_steps": 5}, "quality", "full_steps"),
        ({"prompt": "a", "steps": 1000}, "steps", "steps must be a whole number from 1 to 100"),
        ({"prompt": "a", "steps": "many"}, "steps", "integer"),
        ({"prompt": "a", "guidance": 1e9}, "guidance", "guidance must be"),
        ({"prompt": "a", "cache": "fast"}, "cache", "cache must be one of"),
        ({"prompt": "a", "full_steps": 60}, "full_steps", "full_steps"),
        ({"prompt": "a", "seed": -5}, "seed", "seed must be"),
        ({"prompt": "a", "output_format": "gif"}, "output_format", "png"),
        ({"prompt": "a", "background": "transparent"}, "background", "opaque"),
        ({"prompt": "a", "image": "/etc/passwd"}, "image", "not a field"),
        ({"prompt": "a", "strength": 0.5}, "strength", "not a field"),
        ({"prompt": "half \ud800"}, "prompt", ""),
    ],
)
def test_a_wrong_field_is_refused_in_openai_s_form(server, body, param, said):
    answer = httpx.post(f"{server.url}/v1/images/generations", content=json.dumps(body), headers=JSON)
    error = answer.json()["error"]
    assert answer.status_code == 400 and said in error["message"] and error["type"] == "invalid_request_error"
    assert error["param"] == param and error["code"] and len(error["message"]) < 400


JSON = {"content-type": "application/json"}


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"5", b"\xff", b"[" * 100_000, b'{"prompt":' * 10_000])
def test_what_is_no_json_object_is_refused(server, body):
    answer = httpx.post(f"{server.url}/v1/images/generations", content=body, headers=JSON)
    assert answer.status_code in (400, 413) and answer.json()["error"]["message"]


def test_other_routes_sizes_and_sites_are_refused(server):
    assert httpx.get(f"{server.url}/v1/none").json()["error"]["code"] == "not_found"
    large = httpx.post(f"{server.url}/v1/images/generations", content=b" " * 2**20, headers=JSON)
    assert large.status_code == 413 and "at most" in large.json()["error"]["message"]
    for headers in ({"origin": "https://evil.example"}, {"host": "evil.example"}):
        assert httpx.get(f"{server.url}/v1/models", headers=headers).status_code == 403


def test_health_is_open_and_says_only_that(server):
    assert httpx.get(f"{server.url}/health").json() == {"status": "alive"}
    assert httpx.get(f"{server.url}/ready").json() == {"status": "ready"}
    schema = httpx.get(f"{server.url}/openapi.json").json()
    assert {"/v1/images/generations", "/v1/images/edits", "/v1/models", "/metrics"} <= set(schema["paths"])


def test_every_command_of_the_docs_works(server, tmp_path):
    """The curl lines of docs/serving.md."""
    Image.new("RGB", (64, 64), "blue").save(tmp_path / "in.png")
    Image.new("RGB", (64, 64), "white").save(tmp_path / "mask.png")
    text = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    commands = [block for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL) if block.startswith("curl")]
    assert len(commands) >= 4
    for command in commands:
        words = shlex.split(command.replace("\\\n", " ").replace("http://127.0.0.1:8000", server.url))
        got = subprocess.run([*words, "--fail-with-body"], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert got.returncode == 0, f"{command}: {got.stdout} {got.stderr}"


def test_keys_and_their_limits(tmp_path):
    (tmp_path / "keys").write_text(KEYS)
    with running(tmp_path / "tmp", "--api_key", tmp_path / "keys") as closed:
        anybody = openai.OpenAI(base_url=f"{closed.url}/v1", api_key="0123456789abcdef-eve", max_retries=0)
        ann = openai.OpenAI(base_url=f"{closed.url}/v1", api_key="0123456789abcdef-ann", max_retries=0)
        bob = openai.OpenAI(base_url=f"{closed.url}/v1", api_key="0123456789abcdef-bob", max_retries=0)
        for ask in (lambda: anybody.images.generate(prompt="a"), lambda: list(anybody.models.list())):
            with pytest.raises(openai.AuthenticationError, match="key of this server"):
                ask()
        for path in ("/metrics", "/v1/models", "/v1/models/nano"):
            assert httpx.get(closed.url + path).status_code == 401
        assert httpx.get(f"{closed.url}/health").status_code == 200
        small = {"steps": 4}
        for more, said in (({"n": 3, "size": "80x64"}, "n may be at most 2"), ({}, "size may be at most 4050 pixels")):
            with pytest.raises(openai.BadRequestError, match=said):
                bob.images.generate(prompt="a", **more, extra_body=small)
        with pytest.raises(openai.BadRequestError, match="steps may be at most 20"):
            bob.images.generate(prompt="a", size="80x64", extra_body={"steps": 21})
        for _ in range(2):
            assert bob.images.generate(prompt="a", size="80x64", extra_body=small).data
        with pytest.raises(openai.RateLimitError) as refused:
            bob.images.generate(prompt="a", size="80x64", extra_body=small)
        assert 1 <= int(refused.value.response.headers["retry-after"]) <= 60
        assert ann.images.generate(prompt="the secret prompt", extra_body=small).data
        counted = measured(closed, {"authorization": "Bearer 0123456789abcdef-ann"})
        assert counted["hidream_refusals_total kind=rate_limit_exceeded"] == 1
        assert counted["hidream_refusals_total kind=invalid_api_key"] >= 5
        log = "\n".join(closed.log)
        assert '"client": "bob"' in log and "0123456789abcdef" not in log and "secret prompt" not in log


def test_a_full_queue_is_429_and_a_slow_drawing_504(tmp_path):
    flags = ("--max_queue", 1, "--max_batch", 1, "--max_steps", 1000, "--deadline", 2)
    with running(tmp_path / "tmp", *flags) as small, ThreadPoolExecutor(3) as pool:
        ask = openai.OpenAI(base_url=f"{small.url}/v1", api_key="none", max_retries=0).images.generate
        slow = {"steps": 1000, "cache": "off"}
        first = pool.submit(ask, prompt="a", extra_body=slow)
        time.sleep(0.5)
        second = pool.submit(ask, prompt="b", extra_body=slow)
        time.sleep(0.3)
        with pytest.raises(openai.RateLimitError, match="the queue is full") as refused:
            ask(prompt="c", extra_body=slow)
        assert int(refused.value.response.headers["retry-after"]) >= 1
        for one in (first, second):
            with pytest.raises(openai.InternalServerError, match="not finished within 2 s"):
                one.result()
        assert ask(prompt="d", extra_body={"steps": 4}).data, "the late drawings still hold the card"


def test_a_client_that_goes_away_frees_the_card(server, client):
    before = measured(server)["hidream_refusals_total kind=client_gone"]
    for stream in (False, True):
        with contextlib.suppress(httpx.ReadTimeout), httpx.Client(timeout=0.7) as impatient:
            body = {"prompt": "a", "steps": 100, "cache": "off", "stream": stream}
            for _ in range(3):
                with contextlib.suppress(httpx.ReadTimeout):
                    impatient.post(f"{server.url}/v1/images/generations", json=body)
        began = time.monotonic()
        assert client.images.generate(prompt="a", extra_body={"steps": 4}).data
        assert time.monotonic() - began < 5
    assert measured(server)["hidream_refusals_total kind=client_gone"] > before


def hostile(server: Server, number: int) -> None:
    """A client that does what none should."""
    url = server.url + "/v1/images/generations"
    host, _, port = server.url.removeprefix("http://").partition(":")
    with contextlib.suppress(httpx.HTTPError, OSError):
        match number % 5:
            case 0:
                httpx.post(url, content=b"{" * 1000, headers=JSON)
            case 1:
                with httpx.Client(timeout=0.1) as gone:
                    gone.post(url, json={"prompt": "leaves", "steps": 100, "cache": "off"})
            case 2:
                with socket.create_connection((host, int(port)), timeout=5) as line:
                    line.sendall(
                        b"POST /v1/images/generations HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99\r\n\r\n{"
                    )
            case 3:
                httpx.post(url, json={"prompt": "a", "size": "16384x16384", "steps": 10**9, "n": 10**6})
            case 4:
                httpx.post(server.url + "/v1/images/edits", files={"image": b"\x89PNG\r\n\x1a\n" + b"x" * 10_000})


def test_64_clients_a_fifth_hostile_lose_nothing_and_memory_stays_flat(server, client, record_property):
    """No loss, no cross-talk: every answer has the seed, the prompt and the settings that were asked for."""
    client.images.generate(prompt="warm", extra_body={"steps": 4})
    before, count = server.rss(), measured(server)
    wrong: list[str] = []
    good = [number for number in range(64) if number % 5]

    def visit(number: int) -> None:
        for turn in range(5):
            if number % 5 == 0:
                hostile(server, number // 5 + turn)
                continue
            seed, guidance = 1000 * number + turn, (2.0, 4.0)[number % 2]
            asked = {"seed": seed, "guidance": guidance, "steps": 12}
            try:
                one = client.images.generate(prompt=f"client {number}", extra_body=asked).data[0]
                picture = io.BytesIO(base64.b64decode(one.b64_json))
                options = json.loads(Image.open(picture).text["hi_diffusers"])["options"]
                got = (options["prompt"], options["seed"], options["guidance"], options["num_steps"])
                if got != (f"client {number}", seed, guidance, 12) or one.seed != seed:
                    wrong.append(f"client {number} asked for {asked} and got {got}")
            except Exception as error:
                wrong.append(f"client {number}, turn {turn}: {error!r}")

    threads = [threading.Thread(target=visit, args=(number,)) for number in range(64)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong, wrong[:5]
    time.sleep(1)
    after, counted = server.rss(), measured(server)
    batches = counted["hidream_batch_pictures_count"] - count["hidream_batch_pictures_count"]
    sent = counted["hidream_pictures_total"] - count["hidream_pictures_total"]
    print(f"{sent:.0f} pictures in {batches:.0f} batches, RSS {before:.0f} to {after:.0f} MiB")
    assert sent == 5 * len(good)
    answered = "hidream_requests_total path=/v1/images/generations status=200"
    assert counted[answered] - count[answered] == 5 * len(good), "the counters do not add up"
    assert batches < 0.8 * sent, "hardly anything was batched"
    assert after < before + 150 and server.process.poll() is None
    assert [line for line in server.log if "Traceback" in line] == []


def test_sigterm_in_the_middle_loses_nothing_that_was_admitted(tmp_path):
    with running(tmp_path / "tmp", "--max_batch", 2, ends=False) as served, ThreadPoolExecutor(12) as pool:
        client = openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)
        asked = [pool.submit(client.images.generate, prompt=PROMPT, extra_body={"seed": n}) for n in range(12)]
        time.sleep(0.8)
        assert not all(one.done() for one in asked)
        served.process.send_signal(signal.SIGTERM)
        time.sleep(0.2)
        assert httpx.get(f"{served.url}/ready").status_code == 503
        late = httpx.post(f"{served.url}/v1/images/generations", json={"prompt": "late"})
        assert late.status_code == 503 and late.headers["retry-after"] and late.json()["error"]["code"] == "draining"
        assert [one.result().data[0].seed for one in asked] == list(range(12))


def test_sigterm_ends_within_the_stated_time_and_returns_what_waits(tmp_path):
    flags = ("--max_batch", 1, "--max_steps", 1000, "--drain_seconds", 1)
    with running(tmp_path / "tmp", *flags, ends=False) as served, ThreadPoolExecutor(3) as pool:
        client = openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)
        slow = {"steps": 1000, "cache": "off"}
        asked = [pool.submit(client.images.generate, prompt=PROMPT, extra_body=slow) for _ in range(3)]
        time.sleep(1)
        began = time.monotonic()
        served.process.send_signal(signal.SIGTERM)
        for one in asked:
            with pytest.raises(openai.InternalServerError, match="the server ended before"):
                one.result()
        assert served.process.wait(30) == 0 and time.monotonic() - began < 1 + 5 + 5


def test_sighup_loads_the_model_again_and_loses_nothing(server, client):
    loaded = sum("nano is loaded" in line for line in server.log)
    with ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(client.images.generate, prompt=PROMPT, extra_body={"seed": n}) for n in range(4)]
        server.process.send_signal(signal.SIGHUP)
        assert [one.result().data[0].seed for one in asked] == list(range(4))
    wait_until_ready(server)
    assert sum("nano is loaded" in line for line in server.log) == loaded + 1


def test_encoders_leave_when_idle_and_come_back(tmp_path):
    with running(tmp_path / "tmp", "--unload_encoders_after", 1) as served:
        client = openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)
        ask = {"prompt": PROMPT, "extra_body": {"seed": 5}}
        first = client.images.generate(**ask).data[0].b64_json
        time.sleep(2)
        assert client.images.generate(**ask).data[0].b64_json == first


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--host", "0.0.0.0"], "lets others draw: give --api_key, or --no_auth"),
        (["--api_key", "none"], "--api_key must be a text file"),
        (["--max_batch", "0"], "--max_batch must be from 1 to 256"),
        (["--ssl_certfile", "a"], "must be given together"),
        (["--ssl_certfile", "none", "--ssl_keyfile", "none"], "--ssl_certfile must be a file, got none"),
        (["--allow_origin", "x"], "--allow_origin must be a site"),
    ],
)
def test_wrong_flags_are_refused_before_weights_are_read(flags, said, capsys, tmp_path, monkeypatch):
    from hi_diffusers.commands import serve

    monkeypatch.chdir(tmp_path)
    assert serve.main(flags) == 2
    assert said in capsys.readouterr().err
