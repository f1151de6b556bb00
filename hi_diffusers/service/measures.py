"""Prometheus metrics of a server."""

from collections.abc import Callable, Sequence

import psutil
import torch
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from cache_functions import count_steps
from hi_diffusers.service.queueing import BatchQueue, Drawn

SECONDS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320)


class Measures:
    """Counts what a server does."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        labels = ("model", "cache")
        self._waiting = self._seconds("hidream_waiting_seconds", "Seconds that a picture waited")
        self._drawing = self._seconds("hidream_drawing_seconds", "Seconds in which a picture's batch was drawn")
        sizes = (1, 2, 4, 8, 16, 32)
        self._batches = Histogram(
            "hidream_batch_pictures", "Pictures drawn together", labels, buckets=sizes, registry=self.registry
        )
        self._steps = self._counter("hidream_steps", "Denoising steps of pictures", *labels, "kind")
        self._evaluations = self._counter("hidream_evaluations", "Evaluations of the network, per picture", *labels)
        self._pictures = self._counter("hidream_pictures", "Pictures that were sent", *labels)
        self._requests = self._counter("hidream_requests", "Answered requests", "path", "status")
        self._refusals = self._counter("hidream_refusals", "Requests without a picture", "kind")
        self._gauge("hidream_resident_bytes", "Memory of the process", lambda: psutil.Process().memory_info().rss)
        self._gauge("hidream_gpu_bytes", "Memory that torch has taken on the GPU", _gpu_bytes)

    def watch(self, engine: BatchQueue) -> None:
        """Show an engine's queue."""
        self._gauge("hidream_queue_pictures", "Pictures that wait", lambda: engine.num_waiting)
        self._gauge("hidream_ready", "1 if the model is loaded and requests are admitted", lambda: engine.is_ready)

    def _seconds(self, name: str, text: str) -> Histogram:
        return Histogram(name, text, ("model", "cache"), buckets=SECONDS, registry=self.registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(name, text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str, read: Callable[[], float]) -> None:
        Gauge(name, text, registry=self.registry).set_function(read)

    def note_batch(self, drawn: Sequence[Drawn]) -> None:
        """Count the pictures of a finished batch."""
        self._batches.labels(*_labels(drawn[0])).observe(len(drawn))
        for one in drawn:
            labels, trace = _labels(one), one.picture.trace
            self._waiting.labels(*labels).observe(one.waited)
            self._drawing.labels(*labels).observe(one.picture.seconds.whole)
            self._evaluations.labels(*labels).inc(sum(record.evaluations for record in trace))
            for kind in ("full", "forecast"):
                self._steps.labels(*labels, kind).inc(count_steps(trace, kind))

    def note_picture(self, drawn: Drawn) -> None:
        """Count a picture that is sent."""
        self._pictures.labels(*_labels(drawn)).inc()

    def note_refusal(self, kind: str) -> None:
        """Count a request without a picture."""
        self._refusals.labels(kind).inc()

    def note_request(self, path: str, status: int) -> None:
        """Count an answered request; `path` is one of the server's own."""
        self._requests.labels(path, str(status)).inc()

    def text(self) -> bytes:
        """All of it, in Prometheus' text format."""
        return generate_latest(self.registry)


def _labels(drawn: Drawn) -> tuple[str, str]:
    metadata = drawn.picture.metadata
    return metadata["model"]["model_type"], metadata["cache"].get("target") or "off"


def _gpu_bytes() -> int:
    return torch.cuda.memory_reserved() if torch.cuda.is_available() else 0
