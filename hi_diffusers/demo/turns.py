"""Fair turns: the queue takes few drawings from one visitor, and drops those that nobody listens to."""

import asyncio
import contextlib
import ipaddress
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

SESSION_WAITS = 1  # drawings of one session that may wait, besides the one that is drawn
VISITOR_WAITS = 3  # the same of one user or address, but this machine's own, behind which a proxy may stand
PATIENCE = 10.0  # seconds until a drawing's event stream must be open
SWEEP_SECONDS = 1.0
FULL = "queue_full"  # gradio's word for what becomes status 503 with our sentence


class Turns:
    """Admits events to gradio's queue.

    Args:
        queue: gradio's queue; its `push` is replaced.
        concurrency_id: the events that are drawings.
        max_waiting: drawings that may wait, of all visitors.
    """

    def __init__(self, queue: Any, concurrency_id: str, max_waiting: int):
        self._queue, self._drawings, self._max_waiting = queue, concurrency_id, max_waiting
        self._push, queue.push = queue.push, self.push
        self._listening: Counter[str] = Counter()
        self._sweeper: asyncio.Task[None] | None = None

    async def push(self, body: Any, request: Any, username: str | None) -> tuple[bool, Any, str]:
        """Queue an event as gradio does, unless the visitor's drawings wait already."""
        function = self._queue.blocks.fns.get(body.fn_index)
        if function is not None and function.concurrency_id == self._drawings:
            fault = self._fault(body.session_hash, visitor_of(request.client, username))
            if fault is not None:
                return False, fault, FULL
            if self._sweeper is None:
                self._sweeper = asyncio.create_task(self._sweep())
        result: tuple[bool, Any, str] = await self._push(body=body, request=request, username=username)
        return result

    @contextlib.contextmanager
    def listening(self, name: str) -> Iterator[None]:
        """A context in which the events of a session, or the event of that id, are listened to."""
        self._listening[name] += 1
        try:
            yield
        finally:
            self._listening[name] -= 1
            if not self._listening[name]:
                del self._listening[name]

    def _waiting(self) -> list[Any]:
        queue = self._queue.event_queue_per_concurrency_id.get(self._drawings)
        return [] if queue is None else list(queue.queue)

    def _fault(self, session: str | None, visitor: str) -> str | None:
        waiting = self._waiting()
        if len(waiting) >= self._max_waiting:
            return f"the queue is full, {len(waiting)} drawings wait: try again in a moment"
        if session is not None and sum(event.session_hash == session for event in waiting) >= SESSION_WAITS:
            return "a drawing of yours is waiting already: one at a time"
        if _is_this_machine(visitor):
            return None
        if sum(visitor_of(event.request.client, event.username) == visitor for event in waiting) >= VISITOR_WAITS:
            return f"{VISITOR_WAITS} drawings of yours are waiting already: try again in a moment"
        return None

    async def _sweep(self) -> None:
        """Drop the drawings whose event stream is not open, whether they wait or are drawn."""
        while not self._queue.stopped:
            await asyncio.sleep(SWEEP_SECONDS)
            running = [event for job in self._queue.active_jobs if job for event in job]
            for event in [*self._waiting(), *running]:
                is_due = time.monotonic() > event.enqueue_time + PATIENCE
                if is_due and not {event.session_hash, event._id} & set(self._listening):
                    await self._queue.clean_events(event_id=event._id)


def _is_this_machine(visitor: str) -> bool:
    return visitor.startswith("127.") or visitor == visitor_of(("::1", 0), None)


def visitor_of(client: Any, username: str | None) -> str:
    """Whose request it is: the user, else the address; of IPv6 the network, which one visitor has whole."""
    if username:
        return username
    host = "" if client is None else client[0]
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return str(host)
    return str(ipaddress.ip_network((address, 64), strict=False)) if address.version == 6 else host
