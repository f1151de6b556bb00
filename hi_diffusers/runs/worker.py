"""Draws units of a run with one pipeline, wherever it is told to: in this process, or as an actor of a cluster."""

import functools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from cache_functions import CacheConfig, Sampler, resolve
from hi_diffusers.console import quiet_libraries, say
from hi_diffusers.generation import Generation, draw_batch
from hi_diffusers.metadata import FORMATS, encode_picture
from hi_diffusers.options import ResolvedOptions
from hi_diffusers.runs.encoder import Encoder
from hi_diffusers.runs.job import Job
from hi_diffusers.runs.manifest import sha256_of
from hi_diffusers.runs.units import Task
from hi_diffusers.safety import SafetyChecker


@dataclass(frozen=True)
class Drawn:
    """A picture that was drawn.

    Attributes:
        line: of the manifest.
        data: of its file, named in the line; empty if it is withheld.
    """

    line: dict[str, Any]
    data: bytes


class Worker:
    """Draws units.

    Args:
        job: what and how.

    Raises:
        ValueError: if the model or the safety checker cannot be loaded.
    """

    def __init__(self, job: Job):
        quiet_libraries()
        self.job = job
        self.safety = SafetyChecker(job.safety, job.placement.device) if job.safety else None
        self.encoder = Encoder(job)
        self.pipe = job.load("drawing")
        self.largest_batch: int | None = None
        self._cache = functools.lru_cache(maxsize=1024)(self._resolve_cache)

    def draw(self, unit: Sequence[Task]) -> list[Drawn]:
        """Draw a unit; what is wanted of it comes back, in order."""
        drawn: dict[int, Drawn] = {}
        for tasks in _alike(self.job, unit):
            if not any(task.wanted for task in tasks):
                continue
            for task, picture, batch in self._draw_batch(tasks):
                if task.wanted:
                    drawn[task.number] = self._finish(task, picture, batch)
        return [drawn[number] for number in sorted(drawn)]

    def _draw_batch(self, tasks: list[Task]) -> Iterator[tuple[Task, Generation, int]]:
        """A batch, or its halves where memory runs out: (task, picture, pictures drawn at once)."""
        size = min(len(tasks), self.largest_batch or len(tasks))
        for start in range(0, len(tasks), size):
            part = tasks[start : start + size]
            options = [self.job.options(task) for task in part]
            try:
                drawn = draw_batch(
                    self.pipe,
                    options,
                    self._cache(options[0].sampler(self.pipe.preset)),
                    embeds=self.encoder.embeds(options, self.pipe._execution_device),
                )
            except torch.OutOfMemoryError:
                if size == 1:
                    raise
                self.largest_batch = (size + 1) // 2
            else:
                yield from ((task, picture, len(part)) for task, picture in zip(part, drawn, strict=True))
                continue
            torch.cuda.empty_cache()  # outside the except block, which holds the frames that hold the tensors
            say(f"out of memory with {size} pictures at once: going on with {self.largest_batch}")
            yield from self._draw_batch(tasks[start:])
            return

    def _resolve_cache(self, sampler: Sampler) -> CacheConfig:
        """The run's cache as one of its lines' samplers takes it."""
        return resolve(self.job.cache, sampler, self.pipe.calibrations).config

    def _finish(self, task: Task, picture: Generation, batch: int) -> Drawn:
        kinds = [record.kind for record in picture.trace]
        line = {
            "index": task.line.index,
            "image": task.image,
            "prompt": task.line.prompt,
            "seed": task.seed,
            "options": {
                key: value for key, value in picture.metadata["options"].items() if key not in ("prompt", "seed")
            },
            "cache": {key: value for key, value in picture.metadata["cache"].items() if value is not None},
            "versions": {"software": picture.metadata["software"], **picture.metadata["versions"]},
            "batch": batch,
            **({"halved": True} if self.largest_batch else {}),
            "time": round(time.time(), 3),
            "seconds": round(picture.seconds.whole / batch, 4),
            "full_steps": kinds.count("full"),
            "forecast_steps": kinds.count("forecast"),
        }
        if self.safety is not None:
            score = self.safety.score(picture.image)
            line["nsfw_score"] = round(score, 4)
            if self.safety.withholds(score):
                return Drawn(line | {"file": "", "withheld": "nsfw", "bytes": 0, "sha256": ""}, b"")
        format = FORMATS[self.job.suffix]
        data = encode_picture(picture.image, picture.metadata, format, embed=self.job.add_metadata)
        return Drawn(line | {"file": task.file, "bytes": len(data), "sha256": sha256_of(data)}, data)


def _alike(job: Job, unit: Sequence[Task]) -> list[list[Task]]:
    """A unit's pictures, those together whose options differ in prompt and seed alone."""
    groups: dict[ResolvedOptions, list[Task]] = {}
    for task in unit:
        options = replace(job.options(task), prompt="", seed=0, notices=())
        groups.setdefault(options, []).append(task)
    return list(groups.values())
