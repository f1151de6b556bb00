"""Encodes the prompts of a run, through a cache on the disk."""

from collections.abc import Sequence
from typing import Any

import torch

from hi_diffusers.engine.session import Session
from hi_diffusers.families.family import Model
from hi_diffusers.request.drawing import Drawing
from hi_diffusers.runs.decisions import Decisions
from hi_diffusers.runs.job import Job
from hi_diffusers.runs.units import Task


class Encoder:
    """The text encoders, loaded when a prompt's embeddings are not on the disk yet.

    Args:
        job: says where embeddings are kept.
        session: the model whose text encoders are used.
        decisions: the run's drawings.
    """

    def __init__(self, job: Job, session: Session, decisions: Decisions):
        torch.set_num_threads(job.threads)
        self.job, self.session, self.decisions = job, session, decisions
        self.cache = job.embeds_cache()
        self.model: Model | None = None

    def fill(self, units: Sequence[Sequence[Task]]) -> None:
        """Make sure that the embeddings of these units are on the disk."""
        options = [self.decisions.drawing(task.line, task.seed).options for unit in units for task in unit]
        negative = {one.negative_prompt: None for one in options}
        self.cache.fill(negative | {one.prompt: None for one in options}, self._encode)

    def embeds(self, drawings: Sequence[Drawing], device: torch.device) -> Any:
        """[negative, positive] of a batch with guidance, positive without."""
        options = [one.options for one in drawings]
        positive = self.cache.get([one.prompt for one in options], self._encode, device)
        if not options[0].guided:
            return positive
        negative = self.cache.get([one.negative_prompt for one in options], self._encode, device)
        return self.cache.kind.join([negative, positive])

    def _encode(self, prompt: str) -> Any:
        if not self.job.encodes:
            raise ValueError(f"embeds {self.job.embeds} holds no readable embeddings of the prompt {prompt[:60]!r}")
        self.model = self.model or self.session.load("encoders")
        embeds = self.model.encode([prompt], self.cache.max_sequence_length)
        self.model.release()  # else the last encoder stays on the GPU beside the transformer
        return embeds
