"""The queue before what draws: admits, forms batches, cancels and drains. There is neither a web nor a model in it."""

import abc
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
from hi_diffusers.engine.generation import Generation
from hi_diffusers.engine.loading import free_memory
from hi_diffusers.request.drawing import Drawing
from hi_diffusers.service.requests import Request

OUT_OF_MEMORY = (torch.OutOfMemoryError, MemoryError)
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
        """Whether a preview is due after a step."""
        return not self.ticket.is_cancelled and is_due(
            record, self.drawing.options.drawn_steps, self.ticket.num_previews, self.shown
        )


class BatchQueue(abc.ABC):
    """Requests that wait for what draws them; a subclass draws batches.

    Args:
        max_batch: pictures of equal settings that are drawn together, at most.
        batch_wait: seconds that a picture waits for others to join its batch.
        max_queue: pictures that may wait.
        num_drawers: batches that are drawn at once.
        is_withheld: judges a finished picture; None shows all. With a judge there are no previews.
        on_batch: called with the pictures of every finished batch, in a drawing thread.
        idle_seconds: seconds without a request after which `_tend` is called.
        say: is told what happens to the model.
    """

    def __init__(
        self,
        *,
        max_batch: int = 1,
        batch_wait: float = 0.02,
        max_queue: int = 64,
        num_drawers: int = 1,
        is_withheld: Callable[[Image.Image], bool] | None = None,
        on_batch: Callable[[Sequence[Drawn]], None] | None = None,
        idle_seconds: float | None = None,
        say: Callable[[str], None] = console.say,
    ):
        self.max_batch, self.max_queue = max_batch, max_queue
        self._batch_wait, self._idle_seconds = batch_wait, idle_seconds
        self._is_withheld, self._on_batch, self._say = is_withheld, on_batch, say
        self._changed = threading.Condition()
        self._waiting: OrderedDict[Hashable, list[Place]] = OrderedDict()  # by key; the first one's turn is next
        self._drawing: dict[int, list[Place]] = {number: [] for number in range(num_drawers)}
        self._is_draining = self._is_closed = False
        self._pace: float | None = None  # seconds of a picture, smoothed
        self._threads = [
            threading.Thread(target=self._work, args=(number,), name=f"drawing {number}", daemon=True)
            for number in range(num_drawers)
        ]

    def start(self) -> None:
        """Start the drawing threads; to be called once the subclass is complete."""
        for thread in self._threads:
            thread.start()

    @property
    @abc.abstractmethod
    def is_ready(self) -> bool:
        """Whether the model is loaded and warm, and requests are admitted."""

    @abc.abstractmethod
    def reload(self) -> None:
        """Load the model's files again; what is admitted waits, or is drawn by what is loaded still."""

    @abc.abstractmethod
    def _draw_together(self, batch: Sequence[Place]) -> list[Drawn]:
        """Draw a batch; raises Interrupted if nobody waits for it any more."""

    def _tend(self, is_idle: bool) -> None:  # noqa: B027
        """Called in every drawing thread between two batches."""

    def _has_other_work(self) -> bool:
        """Whether `_tend` has something to do."""
        return False

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
                raise Full(max(1.0, (self._pace or 1.0) * waiting / len(self._threads)))
            self._waiting.setdefault(ticket.key, []).extend(places)
            self._changed.notify_all()

    def cancel(self, ticket: Ticket) -> None:
        """Forget a request: what waits is dropped; what is drawn ends within a step, unless others share its batch."""
        with self._changed:
            ticket.is_cancelled = True
            for places in self._waiting.values():
                places[:] = [one for one in places if one.ticket is not ticket]

    def drain(self, seconds: float) -> bool:
        """Admit nothing more, finish what was admitted, and end the drawing threads.

        Args:
            seconds: after which the rest fails with Draining.

        Returns:
            Whether all of it was finished.
        """
        with self._changed:
            self._is_draining = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: not (self.num_waiting or any(self._drawing.values())), seconds)
            rest = [one for places in (*self._waiting.values(), *self._drawing.values()) for one in places]
            self._waiting.clear()
            self._is_closed = True
            self._changed.notify_all()
        for place in rest:
            place.tell(Failed(place.number, Draining("the server ended before the picture was finished")))
            place.ticket.is_cancelled = True
        until = time.monotonic() + STEP_SECONDS
        for thread in self._threads:
            thread.join(max(0, until - time.monotonic()))
        return not rest

    def _work(self, number: int) -> None:
        """Run in a drawing thread."""
        while not self._is_closed:
            with self._changed:
                self._changed.wait_for(self._has_work, self._idle_seconds)
                is_idle = not self._has_work()
            self._tend(is_idle)
            batch = self._next_batch(number)
            if batch:
                self._draw(batch)
            with self._changed:
                self._drawing[number] = []
                self._changed.notify_all()

    def _has_work(self) -> bool:
        return self._is_closed or self.num_waiting > 0 or self._has_other_work()

    def _next_batch(self, number: int) -> list[Place]:
        """Take the next picture, and those that may share its batch, waiting a moment for more."""
        with self._changed:
            first = self._take()
            if first is None:
                return []
            self._drawing[number] = batch = [first]
            most, until = self.max_batch if _is_batchable(first.drawing) else 1, first.asked + self._batch_wait
            while len(batch) < most and not self._is_draining:
                place = self._take(first.kind)
                if place is not None:
                    batch.append(place)
                elif not self._changed.wait(until - time.monotonic()):
                    break
            return list(batch)

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
                size = self.max_batch = min(self.max_batch, len(batch) // 2)
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

    def _judged(self, batch: Sequence[Place], pictures: Sequence[Generation], began: float) -> list[Drawn]:
        """What the clients of a drawn batch are told; `began` is when it left the queue, by the monotonic clock."""
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


def is_due(record: StepRecord, num_steps: int, wanted: int, shown: int) -> bool:
    """Whether a preview is due after a step: they are spread evenly, and only full steps have one.

    Args:
        num_steps: steps that are drawn.
        wanted, shown: previews of the picture in all, and so far.
    """
    if shown == wanted or record.kind != "full":
        return False
    done = record.index + 1
    return done < num_steps and done * (wanted + 1) >= (shown + 1) * num_steps
