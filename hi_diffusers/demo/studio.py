"""Draws one picture at a time with one loaded model, and reports every step."""

import queue
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from PIL import Image

from cache_functions import StepRecord
from hi_diffusers.console import say
from hi_diffusers.denoising.steps import Interrupted
from hi_diffusers.engine.generation import Generation, draw_batch
from hi_diffusers.engine.loading import free_memory
from hi_diffusers.engine.session import Session
from hi_diffusers.service.engine import opened
from hi_diffusers.service.loader import Loader
from hi_diffusers.service.offered import OfferedModel
from hi_diffusers.service.requests import Request

PREVIEW_SHARE = 20  # previews may take 1 / 20 of the time
FIRST_PREVIEW = 0.2  # seconds into a picture
MAX_TICKETS = 10_000  # beyond that the oldest are dropped: their visitors left
SHOWN_EVERY = 0.1  # seconds between two updates of a drawing
NUM_KEPT = 8  # pictures kept so that a comparison need not draw them again


@dataclass(frozen=True)
class Waiting:
    """No new step: the model is being loaded, the prompt encoded, or the picture decoded.

    Attributes:
        seconds: time since the drawing was asked for.
    """

    seconds: float


@dataclass(frozen=True)
class Progress:
    """A denoising step is done.

    Attributes:
        number: number of the picture, from 0.
        records: records of all its steps so far.
        preview: preview of the picture; None for most steps.
    """

    number: int
    records: tuple[StepRecord, ...]
    preview: Image.Image | None


@dataclass(frozen=True)
class Finished:
    """A picture is finished.

    Attributes:
        number: number of the picture, from 0.
        picture: the picture with its metadata, trace and seconds.
        withheld: whether it must not be shown.
    """

    number: int
    picture: Generation
    withheld: bool = False


@dataclass(frozen=True)
class Pace:
    """The seconds of a drawing.

    Attributes:
        evaluation: of one evaluation of the network.
        rest: of the decoding, the only other part that every picture has.
    """

    evaluation: float
    rest: float

    @classmethod
    def of(cls, picture: Generation) -> "Pace":
        """The pace of a drawing that is done."""
        evaluations = sum(record.evaluations for record in picture.trace)
        return cls(picture.seconds.denoise / evaluations, picture.seconds.decode)


Event = Waiting | Progress | Finished


class Studio:
    """Draws for all visitors, one after another, in its own thread.

    Args:
        loader: opens a request's model.
        is_withheld: judges a finished picture; None shows all. With a judge there are no previews.
        silence: seconds without an event after which the drawing yields Waiting.
    """

    def __init__(
        self,
        loader: Loader,
        is_withheld: Callable[[Image.Image], bool] | None = None,
        silence: float = 0.5,
    ):
        self._loader = loader
        self._is_withheld, self._silence = is_withheld, silence
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="drawing")
        self._session: Session | None = None
        self._model: OfferedModel | None = None
        self._kept: OrderedDict[Any, Finished] = OrderedDict()
        self._pace: dict[Any, Pace] = {}  # model and size -> pace of its last drawing
        self._lock = threading.Lock()
        self._tickets: OrderedDict[str, threading.Event] = OrderedDict()
        self._drawings: set[threading.Event] = set()

    def warm_up(self, request: Request) -> None:
        """Load a request's model before anybody asks for a picture."""

        def load() -> None:
            try:
                self._use(request)
            except Exception as error:  # the next request meets the error again
                say(f"{request.model.preset.name} cannot be loaded: {error}")

        self._worker.submit(load)

    def draw(self, request: Request, ticket: str = "", *, reuse: bool = False) -> Generator[Event]:
        """Draw a request's pictures. Closing the iterator stops the drawing within a step.

        Args:
            ticket: ticket from `open_ticket`; "" is none.
            reuse: return a kept picture that was drawn with the same settings.

        Raises:
            Interrupted: if it was stopped.
            Exception: any error of the drawing.
        """
        events: queue.SimpleQueue[Event | BaseException | None] = queue.SimpleQueue()
        given_up = threading.Event()
        with self._lock:
            stopped = self._tickets.get(ticket, given_up)
            self._drawings.add(given_up)
        started = time.monotonic()
        self._worker.submit(self._work, request, reuse, events, lambda: stopped.is_set() or given_up.is_set())
        try:
            while True:
                try:
                    event = events.get(timeout=self._silence)
                except queue.Empty:
                    yield Waiting(time.monotonic() - started)
                    continue
                if isinstance(event, BaseException):
                    raise event
                if event is None:
                    return
                yield event
        finally:
            given_up.set()
            with self._lock:
                self._drawings.discard(given_up)

    def seconds(self, request: Request, num_full: int) -> float | None:
        """The seconds that a picture with that many full steps will take; None before one of its size was drawn."""
        pace = self._pace.get(_paced(request))
        branches = 2 if request.options.guided else 1
        return None if pace is None else pace.rest + pace.evaluation * num_full * branches

    def open_ticket(self) -> str:
        """Open a ticket, by which the drawings that follow can be stopped, even before they begin."""
        ticket = secrets.token_hex(8)
        with self._lock:
            self._tickets[ticket] = threading.Event()
            if len(self._tickets) > MAX_TICKETS:
                self._tickets.popitem(last=False)
        return ticket

    def holds(self, ticket: str) -> bool:
        """Whether a ticket is open."""
        return ticket in self._tickets

    def stop(self, ticket: str) -> None:
        """Stop a ticket's drawing within a step; it raises Interrupted."""
        with self._lock:
            if ticket in self._tickets:
                self._tickets[ticket].set()

    def close_ticket(self, ticket: str) -> None:
        """Close a ticket; no drawing with it may follow."""
        with self._lock:
            self._tickets.pop(ticket, None)

    def close(self) -> None:
        """Stop all drawings, and end the thread."""
        with self._lock:
            for given_up in self._drawings:
                given_up.set()
        self._worker.shutdown(cancel_futures=True)

    def _work(
        self,
        request: Request,
        reuse: bool,
        events: "queue.SimpleQueue[Event | BaseException | None]",
        is_stopped: Callable[[], bool],
    ) -> None:
        """Run in the drawing thread: put all events into `events`, and at the end None or the error."""
        try:
            for number in range(len(request.drawings)):
                if is_stopped():
                    raise Interrupted("stopped before it began")
                known = self._kept.get(request.key(number)) if reuse else None
                if known is None:
                    with self._loader.explained(request):
                        known = self._draw(request, number, events.put, is_stopped)
                    self._keep(request.key(number), known)
                events.put(Finished(number, known.picture, known.withheld))
            events.put(None)
        except BaseException as error:
            events.put(error)

    def _draw(
        self, request: Request, number: int, tell: Callable[[Event], None], is_stopped: Callable[[], bool]
    ) -> Finished:
        session = self._use(request)
        drawing = request.drawings[number]
        shows_previews = self._is_withheld is None and session.placement.offload != "model"
        records: list[StepRecord] = []
        began = time.monotonic()
        due = began + FIRST_PREVIEW

        def on_step(record: StepRecord, preview: Callable[[], Image.Image]) -> bool:
            nonlocal due
            records.append(record)
            image, now = None, time.monotonic()
            if shows_previews and now >= due and len(records) < drawing.options.drawn_steps:
                image = preview()
                took = time.monotonic() - now
                due = now + took + max(FIRST_PREVIEW, PREVIEW_SHARE * took)
            tell(Progress(number, tuple(records), image))
            return not is_stopped()

        _, embeds = session.encode([drawing])
        (picture,) = draw_batch(session.model, [drawing], embeds=embeds, on_step=on_step)
        self._pace[_paced(request)] = Pace.of(picture)
        return Finished(number, picture, self._is_withheld is not None and self._is_withheld(picture.image))

    def _use(self, request: Request) -> Session:
        """Load and warm up the request's model; a model that is loaded differently is freed first."""
        session, placement = self._session, self._loader.placement(request)
        if session is not None and self._model == request.model and session.placement == placement:
            return session
        session = self._session = self._model = None
        self._kept.clear()
        free_memory()
        self._session, self._model = opened(self._loader, request, say), request.model
        return self._session

    def _keep(self, key: Any, finished: Finished) -> None:
        self._kept[key] = finished
        self._kept.move_to_end(key)
        while len(self._kept) > NUM_KEPT:
            self._kept.popitem(last=False)


def thin_out(events: Generator[Event]) -> Generator[Event]:
    """Leave out steps that follow faster than the page is updated, but not their previews."""
    last = 0.0
    try:
        for event in events:
            now = time.monotonic()
            if not isinstance(event, Progress) or event.preview is not None or now >= last + SHOWN_EVERY:
                last = now
                yield event
    finally:
        events.close()


def _paced(request: Request) -> Any:
    return request.model.preset.name, request.options.width, request.options.height
