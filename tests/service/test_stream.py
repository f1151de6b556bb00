"""Server-sent events that nobody waits for."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import ExitStack, suppress
from typing import Any

import pytest
from starlette.requests import ClientDisconnect

from hi_diffusers.service.api import EventStream


@pytest.mark.parametrize("spec", ["2.0", "2.4"])
def test_a_stream_that_is_left_before_its_first_event_frees_its_place(spec):
    freed: list[bool] = []
    ending = ExitStack()
    ending.callback(freed.append, True)

    async def events() -> AsyncIterator[bytes]:
        await asyncio.sleep(60)
        yield b""

    async def receive() -> dict[str, Any]:
        return {"type": "http.disconnect"}

    async def send(_: Any) -> None:
        if spec == "2.4":
            raise OSError("the client is gone")

    async def answer() -> None:
        with suppress(ClientDisconnect):
            await EventStream(events(), ending)({"type": "http", "asgi": {"spec_version": spec}}, receive, send)

    asyncio.run(asyncio.wait_for(answer(), 10))
    assert freed == [True]
