"""Draws for many clients with replicas of one model on a Ray cluster, by Ray Serve. There is no web in it."""

import asyncio
import contextlib
import logging
import os
import threading
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image

from cache_functions import StepRecord
from hi_diffusers import console
from hi_diffusers.denoising.steps import Interrupted
from hi_diffusers.engine.cluster import connect
from hi_diffusers.engine.generation import Generation, draw_batch
from hi_diffusers.engine.loading import free_memory
from hi_diffusers.engine.session import Session
from hi_diffusers.request.drawing import Drawing
from hi_diffusers.request.placement import Placement, resolve_device
from hi_diffusers.service.engine import opened
from hi_diffusers.service.loader import Loader
from hi_diffusers.service.queueing import BatchQueue, Drawn, Place, Preview, is_due
from hi_diffusers.service.requests import Request

ATTEMPTS = 3  # a batch that takes replicas down with it is given up
LEAVE_SECONDS = 600.0  # that a replica whose model changes may take for what it draws


@dataclass(frozen=True)
class Recipe:
    """What a replica needs to load its model; can be pickled.

    Attributes:
        placement, vram, batch_size: as in `Loader`.
        request: a request for the model, by which it is loaded and warmed up.
        threads: CPU threads, which the bits of a picture depend on; None: torch's choice.
    """

    placement: Placement
    vram: float | None
    batch_size: int
    request: Request
    threads: int | None = None


@dataclass(frozen=True)
class Replicas:
    """How many replicas there are, and what each takes of the cluster.

    Attributes:
        least, most: the number of replicas follows the queue between these.
        num_gpus, num_cpus: of the cluster, for each.
    """

    least: int = 1
    most: int = 1
    num_gpus: float = 0
    num_cpus: float = 1


def replicas_of(recipe: Recipe, numbers: tuple[int, int]) -> tuple[Recipe, Replicas]:
    """What each replica takes: a GPU, or without one its share of as many CPUs as this machine has.

    Args:
        numbers: the least and the largest number of replicas.
    """
    name = recipe.placement.device  # a named one is the replicas', whatever this machine has
    if (resolve_device(name) if name == "auto" else torch.device(name)).type == "cuda":
        return recipe, Replicas(*numbers, num_gpus=1)
    threads = recipe.threads or max(1, (os.cpu_count() or 1) // numbers[1])
    return replace(recipe, threads=threads), Replicas(*numbers, num_cpus=threads)


class Artist:
    """A replica: one loaded model that draws one batch at a time."""

    def __init__(self, recipe: Recipe):
        console.quiet_libraries()
        if recipe.threads is not None:
            torch.set_num_threads(recipe.threads)
        self._recipe = recipe
        self._loader = Loader(recipe.placement, recipe.vram, batch_size=recipe.batch_size)
        self._session: Session | None = None
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="drawing")

    async def reconfigure(self, config: Any) -> None:
        """Load the model's files; Ray Serve calls it at the start, and in one replica after another on a change."""
        await asyncio.get_running_loop().run_in_executor(self._worker, self._load, self._recipe.request)

    async def draw(self, batch: Request, previews: tuple[int, ...]) -> AsyncIterator[Any]:
        """Draw a batch.

        Args:
            batch: its drawings.
            previews: number of previews of each picture.

        Yields:
            A list of (number in the batch, preview) after every step; then the pictures.
        """
        loop, told, stopped = asyncio.get_running_loop(), asyncio.Queue[Any](), threading.Event()

        def tell(what: Any) -> None:
            loop.call_soon_threadsafe(told.put_nowait, what)

        drawn = loop.run_in_executor(self._worker, self._draw, batch, previews, tell, stopped)
        drawn.add_done_callback(lambda _: told.put_nowait(None))
        try:
            while (step := await told.get()) is not None:
                yield step
            yield await drawn
        finally:
            stopped.set()  # also when the client is gone

    def _load(self, request: Request) -> Session:
        self._session = None
        free_memory()
        self._session = opened(self._loader, request, lambda _: None)
        return self._session

    def _draw(
        self, batch: Request, previews: tuple[int, ...], tell: Callable[[Any], None], stopped: threading.Event
    ) -> list[Generation]:
        shown = [0] * len(previews)

        def on_step(record: StepRecord, preview: Callable[[int], Image.Image]) -> bool:
            due = []
            for number, wanted in enumerate(previews):
                if is_due(record, batch.options.drawn_steps, wanted, shown[number]):
                    shown[number] += 1
                    due.append((number, preview(number)))
            tell(due)
            return not stopped.is_set()

        session = self._session
        if session is None or session.placement != self._loader.placement(batch):
            session = self._load(batch)
        explained = self._loader.explained(batch) if len(batch.drawings) == 1 else contextlib.nullcontext()
        with explained:
            _, embeds = session.encode(batch.drawings)
            return draw_batch(session.model, batch.drawings, embeds=embeds, on_step=on_step)


class RayEngine(BatchQueue):
    """Replicas of one model, each of which draws one batch at a time. If one dies, another draws its batch again.

    Args:
        recipe: what a replica loads.
        replicas: how many there are.
        address: address of a running cluster; None starts one on this machine.
        max_batch, batch_wait, max_queue, is_withheld, on_batch, say: as in `BatchQueue`.

    Raises:
        ValueError: if the cluster cannot be reached.
    """

    def __init__(
        self,
        recipe: Recipe,
        replicas: Replicas,
        address: str | None = None,
        *,
        is_withheld: Callable[[Image.Image], bool] | None = None,
        max_batch: int = 1,
        batch_wait: float = 0.02,
        max_queue: int = 64,
        on_batch: Callable[[Sequence[Drawn]], None] | None = None,
        say: Callable[[str], None] = console.say,
    ):
        super().__init__(
            max_batch=max_batch,
            batch_wait=batch_wait,
            max_queue=max_queue,
            num_drawers=replicas.most,
            is_withheld=is_withheld,
            on_batch=on_batch,
            say=say,
        )
        self._recipe, self._replicas = recipe, replicas
        self._handle: Any = None
        self._fault: Exception | None = None
        self._loads = 0
        self._app = f"hidream-{uuid.uuid4().hex[:8]}"  # of a cluster that may serve others, too
        self._deploying = threading.Lock()
        connect(address)
        _quiet()
        self.start()
        self.reload()

    @property
    def is_ready(self) -> bool:
        """Whether replicas are loaded and warm, and requests are admitted."""
        return self._handle is not None and self._fault is None and not self._is_draining

    def reload(self) -> None:
        """Load the model's files again in one replica after another; the others go on drawing."""
        threading.Thread(target=self._deploy, daemon=True).start()

    def drain(self, seconds: float) -> bool:
        """See `BatchQueue.drain`; the replicas are ended, and a cluster that was started here."""
        import ray
        from ray import serve

        try:
            return super().drain(seconds)
        finally:
            with contextlib.suppress(Exception):  # the cluster may be gone already
                serve.delete(self._app)
            ray.shutdown()

    def _has_work(self) -> bool:
        is_decided = self._handle is not None or self._fault is not None
        return self._is_closed or (is_decided and self.num_waiting > 0)

    def _deploy(self) -> None:
        """Start the replicas, or have those that run load their files again."""
        from ray import serve

        name, few = self._recipe.request.model.preset.name, self._replicas
        with self._deploying:
            if self._is_draining:
                return
            self._loads += 1
            self._say(f"loading {name} in {few.least} to {few.most} replicas")
            deployment = serve.deployment(
                Artist,
                name="artist",
                max_ongoing_requests=1,
                autoscaling_config={
                    "min_replicas": few.least,
                    "max_replicas": few.most,
                    "target_ongoing_requests": 1,
                },
                ray_actor_options={"num_gpus": few.num_gpus, "num_cpus": few.num_cpus},
                user_config={"loads": self._loads},  # another number has every replica load again
                graceful_shutdown_timeout_s=LEAVE_SECONDS,
            )
            try:
                serve.start(proxy_location="Disabled")  # the web is this process's
                handle = serve.run(deployment.bind(self._recipe), name=self._app, route_prefix=None)
            except Exception as error:  # the next request meets it
                self._say(f"{name} cannot be loaded: {error}")
                fault: Exception | None = RuntimeError(f"{name} cannot be loaded: {error}")
            else:
                self._say(f"{name} is loaded")
                self._handle, fault = handle.options(stream=True).draw, None
            with self._changed:
                self._fault = fault
                self._changed.notify_all()

    def _draw_together(self, batch: Sequence[Place]) -> list[Drawn]:
        from ray.exceptions import NodeDiedError, ObjectLostError, RayActorError

        if self._handle is None:
            assert self._fault is not None
            raise self._fault
        request = batch[0].ticket.request
        together = Request(request.model, tuple(_portable(place.drawing) for place in batch), request.asked)
        for attempt in range(ATTEMPTS):
            began = time.monotonic()
            try:
                pictures = self._ask(together, batch)
                break
            except (RayActorError, ObjectLostError, NodeDiedError):
                if attempt + 1 == ATTEMPTS:
                    raise
                self._say(f"a replica is gone: {len(batch)} pictures are drawn again")
        return self._judged(batch, pictures, began)

    def _ask(self, together: Request, batch: Sequence[Place]) -> list[Generation]:
        """Have a replica draw a batch; passes previews on, and stops it within a step where nobody waits any more."""
        from ray.exceptions import RayTaskError

        shows = self._is_withheld is None
        told = self._handle.remote(together, tuple(place.ticket.num_previews * shows for place in batch))
        try:
            for what in told:
                if isinstance(what, list) and what and isinstance(what[0], Generation):
                    return what
                for number, image in what:
                    place = batch[number]
                    if place.shown < place.ticket.num_previews:  # a batch that is drawn again shows no more of them
                        place.tell(Preview(place.number, place.shown, image))
                        place.shown += 1
                if self._is_closed or all(place.ticket.is_cancelled for place in batch):
                    told.cancel()
                    raise Interrupted("nobody waits for it")
        except RayTaskError as error:
            raise error.cause from error  # what the drawing raised
        raise RuntimeError("a replica ended a drawing without a picture")


def _portable(drawing: Drawing) -> Drawing:
    """The drawing with its pictures in memory: their files are this machine's."""
    options = drawing.options
    held = {
        name: replace(picture, file=None, held=picture.pixels())
        for name in ("image", "mask_image")
        if (picture := getattr(options, name)) is not None and picture.file is not None
    }
    return replace(drawing, options=replace(options, **held))


def _quiet() -> None:
    """Keep Ray's own notes from the log, whose lines are JSON."""
    from ray import serve  # noqa: F401 - it sets its own level

    for name in ("ray", "ray.serve"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
