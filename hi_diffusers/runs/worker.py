"""Draws units of a run with one pipeline, in this process or as an actor of a cluster."""

import abc
import functools
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch

from cache_functions import StepRecord, count_steps
from hi_diffusers.console import quiet_libraries, say
from hi_diffusers.engine.generation import Generation, draw_batch
from hi_diffusers.engine.session import Session
from hi_diffusers.families.table import find_family
from hi_diffusers.pictures.metadata import FORMATS, encode_picture
from hi_diffusers.pictures.safety import SafetyChecker
from hi_diffusers.request.drawing import Drawing
from hi_diffusers.runs.decisions import Decisions
from hi_diffusers.runs.encoder import Encoder
from hi_diffusers.runs.job import Job
from hi_diffusers.runs.manifest import sha256_of
from hi_diffusers.runs.units import Task

Decided = TypeVar("Decided")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Drawn:
    """A picture that was drawn.

    Attributes:
        line: its manifest line.
        data: content of the file that the line names; empty if the picture is withheld.
        beside: name -> content of the files that lie beside it: a video's settings and sound.
    """

    line: dict[str, Any]
    data: bytes
    beside: Mapping[str, bytes] = field(default_factory=dict)


class UnitWorker(Generic[Decided, Result], abc.ABC):
    """Draws units. A subclass decides a picture's drawing, draws a batch, and makes the file and its line.

    Attributes:
        largest_batch: the batch size that fits, after the memory ran out; None before.
        notices: sentences about how the model was loaded.
    """

    largest_batch: int | None = None
    notices: tuple[str, ...] = ()

    @abc.abstractmethod
    def decide(self, task: Task) -> Decided:
        """The drawing of a picture."""

    @abc.abstractmethod
    def shared(self, drawing: Decided) -> Hashable:
        """Equal for drawings that may be drawn as one batch."""

    @abc.abstractmethod
    def draw_batch(self, drawings: Sequence[Decided]) -> Sequence[Result]:
        """Draw a batch."""

    @abc.abstractmethod
    def finish(self, task: Task, picture: Result, batch: int) -> Drawn:
        """The file of a picture, and its line in the manifest."""

    def prepare(self, units: Sequence[Sequence[Task]]) -> None:
        """Called before these units are drawn."""

    def line_of(
        self, task: Task, metadata: Mapping[str, Any], trace: Sequence[StepRecord], seconds: float, batch: int
    ) -> dict[str, Any]:
        """The beginning of a picture's line in the manifest.

        Args:
            metadata: all settings of the picture.
            seconds: time of the whole batch.
            batch: number of pictures in it.
        """
        return {
            "index": task.line.index,
            "image": task.image,
            "prompt": task.line.prompt,
            "seed": task.seed,
            "options": {key: value for key, value in metadata["options"].items() if key not in ("prompt", "seed")},
            "cache": {key: value for key, value in metadata["cache"].items() if value is not None},
            "versions": {"software": metadata["software"], **metadata["versions"]},
            "batch": batch,
            **({"halved": True} if self.largest_batch else {}),
            "time": round(time.time(), 3),
            "seconds": round(seconds / batch, 4),
            "full_steps": count_steps(trace, "full"),
            "forecast_steps": count_steps(trace, "forecast"),
        }

    def draw(self, unit: Sequence[Task]) -> list[Drawn]:
        """Draw a unit; returns its wanted pictures in order."""
        drawn: dict[int, Drawn] = {}
        for group in self._alike(unit):
            if not any(task.wanted for task, _ in group):
                continue
            for task, picture, batch in self._draw_batch(group):
                if task.wanted:
                    drawn[task.number] = self.finish(task, picture, batch)
        return [drawn[number] for number in sorted(drawn)]

    def _alike(self, unit: Sequence[Task]) -> list[list[tuple[Task, Decided]]]:
        """A unit's pictures, grouped so that options within a group differ only in prompt and seed."""
        groups: dict[Hashable, list[tuple[Task, Decided]]] = {}
        for task in unit:
            drawing = self.decide(task)
            groups.setdefault(self.shared(drawing), []).append((task, drawing))
        return list(groups.values())

    def _draw_batch(self, group: Sequence[tuple[Task, Decided]]) -> Iterator[tuple[Task, Result, int]]:
        """Draw a batch, in halves if memory runs out; yields (task, picture, batch size)."""
        size = min(len(group), self.largest_batch or len(group))
        for start in range(0, len(group), size):
            tasks, drawings = zip(*group[start : start + size], strict=True)
            try:
                pictures = self.draw_batch(drawings)
            except torch.OutOfMemoryError:
                if size == 1:
                    raise
                self.largest_batch = (size + 1) // 2
            else:
                yield from ((task, picture, len(tasks)) for task, picture in zip(tasks, pictures, strict=True))
                continue
            torch.cuda.empty_cache()  # outside the except block, whose traceback would keep the tensors alive
            say(f"out of memory with {size} pictures per batch: continuing with {self.largest_batch}")
            yield from self._draw_batch(group[start:])
            return


class Worker(UnitWorker[Drawing, Generation]):
    """Draws units with our own pipeline.

    Args:
        job: the run's settings.
        session: the model; None opens it here and makes the decisions again.
        decisions: the run's drawings.

    Raises:
        ValueError: if the model or the safety checker cannot be loaded.
    """

    def __init__(self, job: Job, session: Session | None = None, decisions: Decisions | None = None):
        quiet_libraries()
        if session is None or decisions is None:
            session, decisions = job.open()
        self.job, self.decisions = job, decisions
        self.safety = SafetyChecker(job.safety, job.placement.device) if job.safety else None
        self.encoder = Encoder(job, session, decisions)
        self.model = session.load("drawing")
        self.notices = self.model.notices
        self.lost = functools.lru_cache(maxsize=4096)(_reader(session))

    def decide(self, task: Task) -> Drawing:
        """See `UnitWorker`."""
        return self.decisions.drawing(task.line, task.seed)

    def shared(self, drawing: Drawing) -> Hashable:
        """See `UnitWorker`."""
        return drawing.options.shared()

    def prepare(self, units: Sequence[Sequence[Task]]) -> None:
        """Encode the units' prompts."""
        self.encoder.fill(units)

    def draw_batch(self, drawings: Sequence[Drawing]) -> Sequence[Generation]:
        """See `UnitWorker`."""
        embeds = self.encoder.embeds(drawings, self.model.drawing_device)
        return draw_batch(self.model, drawings, embeds=embeds)

    def _cut(self, options: dict[str, Any]) -> dict[str, str]:
        """The ends of the prompts that are cut off because they exceed the token limit."""
        names = ("prompt", "negative_prompt") if options["guidance"] > 1 else ("prompt",)
        ends = {name: self.lost(options[name], options["max_sequence_length"]) for name in names}
        return {name: end for name, end in ends.items() if end}

    def finish(self, task: Task, picture: Generation, batch: int) -> Drawn:
        """See `UnitWorker`."""
        line = self.line_of(task, picture.metadata, picture.trace, picture.seconds.whole, batch)
        line |= {"cut": cut} if (cut := self._cut(picture.metadata["options"])) else {}
        if self.safety is not None:
            score = self.safety.score(picture.image)
            line["nsfw_score"] = round(score, 4)
            if self.safety.withholds(score):
                return Drawn(line | {"file": "", "withheld": "nsfw", "bytes": 0, "sha256": ""}, b"")
        format = FORMATS[self.job.suffix]
        data = encode_picture(picture.image, picture.metadata, format, embed=self.job.add_metadata)
        return Drawn(line | {"file": task.file, "bytes": len(data), "sha256": sha256_of(data)}, data)


def _reader(session: Session) -> Callable[[str, int], str]:
    """A function that gives the end of a prompt that is cut at a token limit; empty if there are no tokenizers."""
    if session.parts == "drawing":
        return lambda prompt, limit: ""
    count = find_family(session.preset).token_counter(session.preset, session.files)
    return lambda prompt, limit: count(prompt, limit).lost
