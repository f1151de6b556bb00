"""Draws for many clients with one loaded model: admits, batches, draws, cancels and drains. There is no web in it."""

import contextlib
import json
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import torch
from PIL import Image

from cache_functions import StepRecord
from hi_diffusers import console
from hi_diffusers.denoising.steps import Interrupted
from hi_diffusers.engine.generation import Generation, draw_batch
from hi_diffusers.engine.loading import free_memory
from hi_diffusers.engine.session import Session
from hi_diffusers.request.drawing import Drawing
from hi_diffusers.service.loader import Loader
from hi_diffusers.service.requests import Request

OUT_OF_MEMORY = (torch.OutOfMemoryError, MemoryError)
WARM_UP_STEPS = 2
STEP_SECONDS = 10.0  # that the end waits for a step that is being computed


class Full(Exception):
    """The queue is full.

    Args:
        seconds: after which a place may be free.
    """

    def __init__(self, seconds: float):
        super().__init__(f"the queue is full: try again in {seconds:.0f} s")
        self.seconds = seconds


class Draining(Exception):
    """No more requests are admitted."""


@dataclass(frozen=True)
class Preview:
    """A preview of a picture that is being drawn.

    Attributes:
        number: number of the picture in its request.
        index: number of the preview, from 0.
        image: the picture so far.
    """

    number: int
    index: int
    image: Image.Image


@dataclass(frozen=True)
class Drawn:
    """A finished picture.

    Attributes:
        number: number of the picture in its request.
        picture: the picture; its seconds are those of its batch.
        batch: number of pictures that were drawn together.
        waited: seconds that it waited.
        withheld: whether it must not be shown.
    """

    number: int
    picture: Generation
    batch: int
    waited: float
    withheld: bool = False


@dataclass(frozen=True)
class Failed:
    """A picture that could not be drawn.

    Attributes:
        number: number of the picture in its request.
        error: why.
    """

    number: int
    error: Exception


Event = Preview | Drawn | Failed


@dataclass(eq=False)
class Ticket:
    """An admitted request.

    Attributes:
        request: what to draw.
        key: whose request it is; keys take turns.
        tell: is called with every event, in the drawing thread.
        num_previews: previews of each picture, at full steps.
        is_cancelled: whether the client went away.
    """

    request: Request
    key: str
    tell: Callable[[Event], None]
    num_previews: int = 0
    is_cancelled: bool = False


@dataclass(eq=False)
class Place:
    """One picture of a request, waiting or being drawn.

    Attributes:
        ticket: the request that it belongs to.
        number: its number in the request.
        kind: equal for pictures that may share a batch.
        asked: when it was admitted, by the monotonic clock.
        shown: number of its previews so far.
    """

    ticket: Ticket
    number: int
    kind: Hashable
    asked: float
    shown: int = 0

    @property
    def drawing(self) -> Drawing:
        """What to draw."""
        return self.ticket.request.drawings[self.number]

    def tell(self, event: Event) -> None:
        """Tell the client, if there is still one."""
        if not self.ticket.is_cancelled:
            self.ticket.tell(event)

    def wants_preview(self, record: StepRecord) -> bool:
        """Whether a preview is due after a step: they are spread evenly, and only full steps have one."""
        wanted, num_steps = self.ticket.num_previews, self.drawing.options.drawn_steps
        if self.ticket.is_cancelled or self.shown == wanted or record.kind != "full":
            return False
        done = record.index + 1
        return done < num_steps and done * (wanted + 1) >= (self.shown + 1) * num_steps


class Engine:
    """One loaded model that draws for many clients.

    Args:
        loader: opens the model.
        request: a request for the model, by which it is loaded and warmed up.
        max_batch: pictures of equal settings that are drawn together, at most.
        batch_wait: seconds that a picture waits for others to join its batch.
        max_queue: pictures that may wait.
        is_withheld: judges a finished picture; None shows all. With a judge there are no previews.
        on_batch: called with the pictures of every finished batch, in the drawing thread.
        idle_encoders: seconds without a request after which text encoders that are kept apart leave the memory.
        say: is told what happens to the model.
    """

    def __init__(
        self,
        loader: Loader,
        request: Request,
        *,
        max_batch: int = 1,
        batch_wait: float = 0.02,
        max_queue: int = 64,
        is_withheld: Callable[[Image.Image], bool] | None = None,
        on_batch: Callable[[Sequence[Drawn]], None] | None = None,
        idle_encoders: float | None = None,
        say: Callable[[str], None] = console.say,
    ):
        self.max_batch, self.max_queue = max_batch, max_queue
        self._loader, self._request, self._batch_wait = loader, request, batch_wait
        self._is_withheld, self._on_batch, self._idle_encoders = is_withheld, on_batch, idle_encoders
        self._say = say
        self._changed = threading.Condition()
        self._waiting: OrderedDict[Hashable, list[Place]] = OrderedDict()  # by key; the first one's turn is next
        self._drawing: list[Place] = []
        self._session: Session | None = None
        self._must_load, self._is_draining, self._is_closed = True, False, False
        self._pace: float | None = None  # seconds of a picture, smoothed
        self._thread = threading.Thread(target=self._work, name="drawing", daemon=True)
        self._thread.start()

    @property
    def is_ready(self) -> bool:
        """Whether the model is loaded and warm, and requests are admitted."""
        return self._session is not None and not self._must_load and not self._is_draining

    @property
    def num_waiting(self) -> int:
        """Number of pictures that wait."""
        with self._changed:
            return sum(map(len, self._waiting.values()))

    def admit(self, ticket: Ticket) -> None:
        """Put a request into the queue.

        Raises:
            Full: if too many pictures wait.
            Draining: if no more are admitted.
        """
        now = time.monotonic()
        places = [Place(ticket, number, kind_of(one), now) for number, one in enumerate(ticket.request.drawings)]
        with self._changed:
            if self._is_draining:
                raise Draining("the server is about to end")
            waiting = self.num_waiting
            if waiting + len(places) > self.max_queue:
                raise Full(max(1.0, (self._pace or 1.0) * waiting))
            self._waiting.setdefault(ticket.key, []).extend(places)
            self._changed.notify_all()

    def cancel(self, ticket: Ticket) -> None:
        """Forget a request: what waits is dropped; what is drawn ends within a step, unless others share its batch."""
        with self._changed:
            ticket.is_cancelled = True
            for places in self._waiting.values():
                places[:] = [one for one in places if one.ticket is not ticket]

    def reload(self) -> None:
        """Load the model's files again before the next batch; what is admitted waits."""
        with self._changed:
            self._must_load = True
            self._changed.notify_all()

    def drain(self, seconds: float) -> bool:
        """Admit nothing more, finish what was admitted, and end the drawing thread.

        Args:
            seconds: after which the rest fails with Draining.

        Returns:
            Whether all of it was finished.
        """
        with self._changed:
            self._is_draining = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: not (self.num_waiting or self._drawing), seconds)
            rest = [*(one for places in self._waiting.values() for one in places), *self._drawing]
            self._waiting.clear()
            self._is_closed = True
            self._changed.notify_all()
        for place in rest:
            place.tell(Failed(place.number, Draining("the server ended before the picture was finished")))
            place.ticket.is_cancelled = True
        self._thread.join(STEP_SECONDS)
        return not rest

    def _work(self) -> None:
        """Run in the drawing thread."""
        while not self._is_closed:
            with self._changed:
                self._changed.wait_for(self._has_work, self._idle_encoders)
                is_idle = not self._has_work()
            if self._must_load:
                self._load_anew()
            if is_idle and self._session is not None:
                self._session.drop_encoders()
            batch = self._next_batch()
            if batch:
                self._draw(batch)
            with self._changed:
                self._drawing = []
                self._changed.notify_all()

    def _has_work(self) -> bool:
        return self._must_load or self._is_closed or self.num_waiting > 0

    def _next_batch(self) -> list[Place]:
        """Take the next picture, and those that may share its batch, waiting a moment for more."""
        with self._changed:
            first = self._take()
            if first is None:
                return []
            self._drawing = [first]
            most, until = self.max_batch if _is_batchable(first.drawing) else 1, first.asked + self._batch_wait
            while len(self._drawing) < most and not self._is_draining:
                place = self._take(first.kind)
                if place is not None:
                    self._drawing.append(place)
                elif not self._changed.wait(until - time.monotonic()):
                    break
            return list(self._drawing)

    def _take(self, kind: Hashable = None) -> Place | None:
        """Take the next waiting picture, of a kind if one is given; then it is the next key's turn."""
        for key, places in list(self._waiting.items()):
            if not places:
                del self._waiting[key]
            for place in places:
                if kind is None or place.kind == kind:
                    places.remove(place)
                    self._waiting.move_to_end(key)
                    return place
        return None

    def _draw(self, batch: Sequence[Place]) -> None:
        """Draw a batch, and tell its clients. One picture's failure is not the others'."""
        try:
            drawn = self._draw_together(batch)
        except Interrupted:
            return  # nobody waits for any of them
        except Exception as error:
            if len(batch) == 1:
                batch[0].tell(Failed(batch[0].number, error))
                return
            size = 1
            if isinstance(error, OUT_OF_MEMORY):
                size = self.max_batch = len(batch) // 2
                self._say(f"out of memory with {len(batch)} pictures: at most {size} are drawn together from now on")
            free_memory()
            for start in range(0, len(batch), size):
                self._draw(batch[start : start + size])
            return
        if self._on_batch is not None:
            self._on_batch(drawn)
        seconds = drawn[0].picture.seconds.whole / len(drawn)
        self._pace = seconds if self._pace is None else 0.8 * self._pace + 0.2 * seconds
        for place, one in zip(batch, drawn, strict=True):
            place.tell(one)

    def _draw_together(self, batch: Sequence[Place]) -> list[Drawn]:
        began = time.monotonic()
        request = batch[0].ticket.request

        def on_step(record: StepRecord, preview: Callable[[int], Image.Image]) -> bool:
            for number, place in enumerate(batch):
                if self._is_withheld is None and place.wants_preview(record):
                    place.tell(Preview(place.number, place.shown, preview(number)))
                    place.shown += 1
            return not self._is_closed and not all(place.ticket.is_cancelled for place in batch)

        # with several pictures, running out of memory makes the batches smaller
        explained = self._loader.explained(request) if len(batch) == 1 else contextlib.nullcontext()
        with explained:
            session = self._use(request)
            drawings = [place.drawing for place in batch]
            _, embeds = session.encode(drawings)
            pictures = draw_batch(session.model, drawings, embeds=embeds, on_step=on_step)
        return [
            Drawn(
                place.number,
                picture,
                len(batch),
                began - place.asked,
                self._is_withheld is not None and self._is_withheld(picture.image),
            )
            for place, picture in zip(batch, pictures, strict=True)
        ]

    def _load_anew(self) -> None:
        """Load the model's files; a failure is said, and met again by the next request."""
        self._session, self._must_load = None, False
        free_memory()
        try:
            self._use(self._request)
        except Exception as error:
            self._say(f"{self._request.model.preset.name} cannot be loaded: {error}")

    def _use(self, request: Request) -> Session:
        """The session that draws a request; a model that is kept in memory differently is loaded anew."""
        if self._session is not None and self._session.placement == self._loader.placement(request):
            return self._session
        self._session = None
        free_memory()
        self._session = opened(self._loader, request, self._say)
        return self._session


def kind_of(drawing: Drawing) -> Hashable:
    """What is equal for pictures that may share a batch."""
    options = drawing.options
    return drawing.preset.name, options.shared(), options.mask_image is None, json.dumps(drawing.cache.settings())


def _is_batchable(drawing: Drawing) -> bool:
    try:
        drawing.cache.check_batch(2)
    except ValueError:
        return False
    return True


def opened(loader: Loader, request: Request, say: Callable[[str], None]) -> Session:
    """Load and warm up a request's model; `say` is told what happens."""
    session, notices = loader.open(request)
    for notice in notices:
        say(notice)
    say(f"loading {request.model.preset.name}")
    for notice in session.model.notices:
        say(notice)
    warm_up(session, request)
    say(f"{request.model.preset.name} is loaded")
    return session


def warm_up(session: Session, request: Request) -> None:
    """Take the first steps, which are slower than all others, before anything is timed."""
    drawing = request.drawings[0].uncached()
    _, embeds = session.encode([drawing])
    with contextlib.suppress(Interrupted):
        draw_batch(session.model, [drawing], embeds=embeds, on_step=lambda record, _: record.index + 1 < WARM_UP_STEPS)
