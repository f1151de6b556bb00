"""What one visitor may take from the others: turns, guesses, the log, and what is computed on every change."""

import asyncio
import contextlib
import inspect
import itertools
import logging
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from gradio_client import Client

from hi_diffusers.demo import logs, turns
from hi_diffusers.demo.drawings import Drawings
from hi_diffusers.demo.guesses import FREE_GUESSES, LONGEST_SECONDS, NUM_VISITORS, Guesses
from hi_diffusers.demo.turns import SESSION_WAITS, VISITOR_WAITS, Turns, visitor_of
from tests.demo.server import Server, running

# Turns.


class Queue:
    """As much of gradio's queue as turns are taken from; nothing is ever drawn."""

    def __init__(self) -> None:
        self.waiting: list[Any] = []
        self.event_queue_per_concurrency_id = {"drawing": SimpleNamespace(queue=self.waiting)}
        self.blocks = SimpleNamespace(
            fns={0: SimpleNamespace(concurrency_id="drawing"), 1: SimpleNamespace(concurrency_id="x")}
        )
        self.active_jobs: list[Any] = [None]
        self.stopped = False
        self.dropped: list[str] = []

    async def push(self, body: Any, request: Any, username: str | None) -> tuple[bool, str, str]:
        event = SimpleNamespace(
            session_hash=body.session_hash,
            _id=f"id{len(self.waiting)}",
            request=request,
            username=username,
            enqueue_time=time.monotonic(),
        )
        self.waiting.append(event)
        return True, event._id, "success"

    async def clean_events(self, *, event_id: str) -> None:
        self.dropped.append(event_id)
        self.waiting[:] = [event for event in self.waiting if event._id != event_id]


def ask(queue: Any, session: str, host: str, fn_index: int = 0, user: str | None = None) -> bool:
    body = SimpleNamespace(fn_index=fn_index, session_hash=session)
    return bool(asyncio.run(queue.push(body=body, request=SimpleNamespace(client=(host, 1)), username=user))[0])


@pytest.mark.parametrize(
    ("visits", "taken"),
    [
        ([("a", "10.0.0.1")] * 5, SESSION_WAITS),
        ([(str(n), "10.0.0.1") for n in range(9)], VISITOR_WAITS),
        ([(str(n), f"2001:db8::{n}") for n in range(9)], VISITOR_WAITS),
        ([(str(n), f"10.0.0.{n}") for n in range(9)], 9),
        ([(str(n), "127.0.0.1") for n in range(9)], 9),
        ([("a", "127.0.0.1")] * 200, SESSION_WAITS),
    ],
)
def test_a_visitor_waits_with_few_drawings(visits: list[tuple[str, str]], taken: int) -> None:
    queue = Queue()
    Turns(queue, "drawing", 20)
    assert sum(ask(queue, *visit) for visit in visits) == taken


def test_drawings_fill_the_queue_and_other_events_do_not() -> None:
    queue = Queue()
    Turns(queue, "drawing", 5)
    assert sum(ask(queue, str(n), f"10.0.0.{n}") for n in range(9)) == 5
    assert ask(queue, "a", "10.0.0.1", fn_index=1)


def test_a_user_is_one_visitor_wherever_from() -> None:
    queue = Queue()
    Turns(queue, "drawing", 20)
    assert sum(ask(queue, str(n), f"10.0.0.{n}", user="ann") for n in range(9)) == VISITOR_WAITS


def test_what_is_no_drawing_needs_no_turn() -> None:
    queue = Queue()
    Turns(queue, "drawing", 20)
    assert all(ask(queue, "a", "10.0.0.1", fn_index=1) for _ in range(9))


def test_what_nobody_listens_to_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "PATIENCE", 0.05)
    monkeypatch.setattr(turns, "SWEEP_SECONDS", 0.02)
    queue = Queue()
    taking = Turns(queue, "drawing", 20)

    async def visit() -> list[str]:
        for session in ("heard", "unheard", "left"):
            body = SimpleNamespace(fn_index=0, session_hash=session)
            await queue.push(body=body, request=SimpleNamespace(client=("127.0.0.1", 1)), username=None)
        with taking.listening("heard"):
            with taking.listening("left"):
                await asyncio.sleep(0.1)
            await asyncio.sleep(0.1)
        return [event.session_hash for event in queue.waiting]

    assert asyncio.run(visit()) == ["heard"]


@pytest.mark.parametrize(
    ("client", "user", "visitor"),
    [
        (("10.1.2.3", 5), None, "10.1.2.3"),
        (("2001:db8::1", 5), None, "2001:db8::/64"),
        (("testclient", 5), None, "testclient"),
        (None, None, ""),
        (("10.1.2.3", 5), "ann", "ann"),
    ],
)
def test_whose_request_it_is(client: Any, user: str | None, visitor: str) -> None:
    assert visitor_of(client, user) == visitor


# Guesses.


def test_failed_logins_wait_longer_and_longer(capsys: pytest.CaptureFixture[str]) -> None:
    now = 0.0
    guesses = Guesses(lambda: now)
    waits = []
    for _ in range(12):
        now += guesses.seconds_to_wait("eve")
        guesses.note("eve", succeeded=False)
        waits.append(guesses.seconds_to_wait("eve"))
    assert waits[: FREE_GUESSES - 1] == [0.0] * (FREE_GUESSES - 1)
    assert waits == sorted(waits) and waits[FREE_GUESSES - 1] > 0 and waits[-1] == LONGEST_SECONDS
    assert guesses.seconds_to_wait("ann") == 0
    assert capsys.readouterr().err.count("login failed: eve") == 12
    guesses.note("eve", succeeded=True)
    assert guesses.seconds_to_wait("eve") == 0


def test_guesses_are_remembered_for_a_bounded_number_of_visitors() -> None:
    guesses = Guesses(lambda: 0.0)
    for number in range(NUM_VISITORS + 50):
        guesses.note(str(number), succeeded=False)
    assert len(guesses._failed) == NUM_VISITORS


# The log.


@pytest.mark.parametrize("text", ["x" * 100_000, "a\nb\x1b[31m\r" * 50, "\u202e" * 999, "short"])
def test_a_line_of_the_log_is_short_and_one(text: str) -> None:
    line = logs.shortened(text)
    assert len(line) <= logs.MAX_CHARS and line.isprintable() and "\n" not in line


def test_a_record_loses_its_traceback() -> None:
    try:
        raise ValueError("x\ny" * 1000)
    except ValueError:
        record = logging.LogRecord("uvicorn.error", logging.ERROR, "", 1, "Exception %s\n", ("here",), sys.exc_info())
    assert logs.OneLine().filter(record)
    written = logging.Formatter().format(record)
    assert "\n" not in written and len(written) <= logs.MAX_CHARS and "ValueError" in written


def test_a_visitor_s_mistake_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    import traceback

    module = SimpleNamespace(traceback=traceback)
    logs.keep_short([module])
    try:
        raise KeyError("\x1b[2J" * 500)
    except KeyError:
        module.traceback.print_exc()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("refused: KeyError: ") and len(line) <= logs.MAX_CHARS
    assert module.traceback.format_exc() == traceback.format_exc(), "everything else is traceback's own"


# A real page.


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    flags = ("--max_steps", 1000, "--max_queue", 300, "--auth", "environment")
    with running(
        tmp_path_factory.mktemp("fair") / "tmp", *flags, environment={"HIDREAM_DEMO_AUTH": "ann:secret"}
    ) as served:
        yield served


@pytest.fixture
def client(server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60) as visitor:
        assert visitor.post("/login", data={"username": "ann", "password": "secret"}).status_code == 200
        yield visitor


def number_of(client: httpx.Client, name: str) -> int:
    """The event handler of that API name, or the one that follows every change."""
    dependencies = client.get("/config").json()["dependencies"]
    if name != "on_change":
        return next(one["id"] for one in dependencies if one["api_name"] == name)
    return max((one for one in dependencies if not one["queue"]), key=lambda one: len(one["inputs"]))["id"]


def asked_for(num_steps: int) -> list[Any]:
    """The inputs of the page's `generate` for a long drawing."""
    names = [name for name in inspect.signature(Drawings.generate).parameters if name != "self"]
    return [{"prompt": "a", "num_steps": num_steps}.get(name) for name in names]


@pytest.mark.slow
def test_two_hundred_drawings_of_one_session_do_not_keep_others_waiting(
    server: Server, client: httpx.Client, tmp_path: Path
) -> None:
    body = {"data": asked_for(400), "fn_index": number_of(client, "generate"), "session_hash": "greedy"}
    answers = [client.post("/gradio_api/queue/join", json=body) for _ in range(200)]
    assert [answer.status_code for answer in answers].count(200) <= 2
    assert "waiting already" in answers[-1].json()["detail"]
    began = time.monotonic()
    other = Client(server.url, verbose=False, download_files=str(tmp_path), auth=("ann", "secret"))
    other.predict("a", num_steps=2, api_name="/generate")
    assert time.monotonic() - began < 30, "nobody listened to the others"


@pytest.mark.slow
def test_many_sessions_that_nobody_listens_to_are_dropped(server: Server, client: httpx.Client, tmp_path: Path) -> None:
    index = number_of(client, "generate")
    data = asked_for(1000)
    taken = [
        client.post(
            "/gradio_api/queue/join", json={"data": data, "fn_index": index, "session_hash": f"s{n}"}
        ).status_code
        for n in range(50)
    ]
    assert taken.count(200) <= VISITOR_WAITS + 1
    began = time.monotonic()
    while client.get("/gradio_api/queue/status").json()["queue_size"] and time.monotonic() < began + 30:
        time.sleep(0.5)
    assert time.monotonic() - began < 20


@pytest.mark.slow
def test_sixty_changes_at_once_stay_small_and_the_server_ends_at_once(tmp_path: Path) -> None:
    with running(tmp_path / "tmp") as busy, httpx.Client(base_url=busy.url, timeout=120) as visitor:
        index = number_of(visitor, "on_change")
        inputs = next(one for one in visitor.get("/config").json()["dependencies"] if one["id"] == index)["inputs"]
        components = {one["id"]: one["props"] for one in visitor.get("/config").json()["components"]}
        names = [components[one].get("elem_id") for one in inputs]
        data = [components[one].get("value") for one in inputs]
        before, seconds, told = busy.rss(), [], []

        def change(full_steps: int, max_order: int, guidance: float) -> None:
            mine = list(data)
            numbers = {"full_steps": str(full_steps), "max_order": str(max_order), "guidance": guidance}
            words = {"cache": "taylorseer", "target": "x0", "basis": "learned", "schedule": "mask"}
            for name, value in (numbers | words).items():
                mine[names.index(name)] = value
            began = time.monotonic()
            body = {"data": mine, "fn_index": index, "session_hash": "hostile"}
            answer = visitor.post("/gradio_api/run/predict", json=body)
            assert answer.status_code == 200, answer.text[:300]
            told.append(answer.json()["data"][0])
            seconds.append(time.monotonic() - began)

        asked = itertools.product((9, 11, 14, 15, 16, 18, 20, 22, 24, 26), (1, 2, 0), (2.0, 4.0))
        threads = [threading.Thread(target=change, args=one) for one in asked]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        print(f"{len(threads)} changes: longest {max(seconds):.1f} s, RSS {before:.0f} to {busy.rss():.0f} MiB")
        assert sum("by learned" in one for one in told) > 1, told
        assert len(seconds) == 60 and busy.rss() < before + 1024

        def change_while_it_ends(one: tuple[int, int, float]) -> None:
            with contextlib.suppress(httpx.HTTPError, AssertionError):
                change(*one)

        for one in itertools.product((27, 29, 31, 33, 35), (1, 2), (2.0, 4.0)):
            threading.Thread(target=change_while_it_ends, args=(one,), daemon=True).start()
        time.sleep(0.2)


@pytest.mark.slow
def test_guessing_is_slowed_down_and_logged(tmp_path: Path) -> None:
    with running(tmp_path / "tmp", "--auth", "environment", environment={"HIDREAM_DEMO_AUTH": "ann:secret"}) as closed:
        guess = {"username": "ann\n\x1b[31m", "password": "guess"}
        codes = [httpx.post(f"{closed.url}/login", data=guess).status_code for _ in range(20)]
        assert codes[:FREE_GUESSES] == [400] * FREE_GUESSES and set(codes[FREE_GUESSES:]) == {429}
        time.sleep(1.2)
        assert httpx.post(f"{closed.url}/login", data={"username": "ann", "password": "secret"}).status_code == 200
        assert sum("login failed: 127.0.0.1" in line for line in closed.log) == FREE_GUESSES


@pytest.mark.slow
def test_a_visitor_s_mistakes_leave_short_lines_and_repeat_nothing(server: Server, client: httpx.Client) -> None:
    long, before = "x" * 200_000, len(server.log)
    index = number_of(client, "on_change")
    for data in ([long], [long] * 20, [[[]]], "no list", [{"a": 1}] * 19, ["\x1b[31m\n" * 99] * 19):
        for path in ("run/predict", "queue/join", "call/generate", "run/generate"):
            body = {"data": data, "fn_index": index, "session_hash": "careless"}
            answer = client.post(f"/gradio_api/{path}", json=body)
            assert len(answer.text) < 2000, f"{path}: {answer.text[:200]}"
    time.sleep(2)
    assert not any("Traceback" in line or len(line) > 300 or "\x1b" in line for line in server.log[before:])


@pytest.mark.slow
def test_an_upload_s_name_is_not_kept(server: Server, client: httpx.Client) -> None:
    for number in range(3):
        sent = client.post(f"/gradio_api/upload?upload_id={number}", files={"files": ("a.png", b"x")})
        assert sent.status_code == 200
        assert client.get("/gradio_api/upload_progress", params={"upload_id": number}).status_code == 404
