"""Draws for many clients with one model that is loaded in this process. There is no web in it."""

import contextlib
import time
from collections.abc import Callable, Sequence

from PIL import Image

from cache_functions import StepRecord
from hi_diffusers import console
from hi_diffusers.denoising.steps import Interrupted
from hi_diffusers.engine.generation import draw_batch
from hi_diffusers.engine.loading import free_memory
from hi_diffusers.engine.session import Session
from hi_diffusers.service.loader import Loader
from hi_diffusers.service.queueing import BatchQueue, Drawn, Place, Preview
from hi_diffusers.service.requests import Request

WARM_UP_STEPS = 2


class Engine(BatchQueue):
    """One loaded model that draws for many clients, in a thread of its own.

    Args:
        loader: opens the model.
        request: a request for the model, by which it is loaded and warmed up.
        max_batch, batch_wait, max_queue, is_withheld, on_batch, say: as in `BatchQueue`.
        idle_encoders: seconds without a request after which text encoders that are kept apart leave the memory.
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
        super().__init__(
            max_batch=max_batch,
            batch_wait=batch_wait,
            max_queue=max_queue,
            is_withheld=is_withheld,
            on_batch=on_batch,
            idle_seconds=idle_encoders,
            say=say,
        )
        self._loader, self._request = loader, request
        self._session: Session | None = None
        self._must_load = True
        self.start()

    @property
    def is_ready(self) -> bool:
        """Whether the model is loaded and warm, and requests are admitted."""
        return self._session is not None and not self._must_load and not self._is_draining

    def reload(self) -> None:
        """Load the model's files again before the next batch; what is admitted waits."""
        with self._changed:
            self._must_load = True
            self._changed.notify_all()

    def _has_other_work(self) -> bool:
        return self._must_load

    def _tend(self, is_idle: bool) -> None:
        if self._must_load:
            self._load_anew()
        if is_idle and self._session is not None:
            self._session.drop_encoders()

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
        return self._judged(batch, pictures, began)

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
