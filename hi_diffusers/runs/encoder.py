"""Prompts of a run to embeddings, by way of the disk."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from hi_diffusers.embeds import EmbedsCache
from hi_diffusers.options import ResolvedOptions
from hi_diffusers.pipelines.prompts import PromptEmbeds
from hi_diffusers.runs.job import Job
from hi_diffusers.runs.units import Task

if TYPE_CHECKING:
    from hi_diffusers import HiDreamImagePipeline


class Encoder:
    """The text encoders, which are loaded when a prompt is not on the disk yet.

    Args:
        job: where embeddings lie, and which model makes them.
    """

    def __init__(self, job: Job):
        torch.set_num_threads(job.threads)
        self.job = job
        self.cache = EmbedsCache(job.embeds, job.max_sequence_length, job.embeds_cache_gb)
        self.pipe: HiDreamImagePipeline | None = None

    def fill(self, units: Sequence[Sequence[Task]]) -> None:
        """Make sure that the embeddings of these units are on the disk."""
        options = [self.job.options(task) for unit in units for task in unit]
        negative = {one.negative_prompt: None for one in options}
        self.cache.fill(negative | {one.prompt: None for one in options}, self._encode)

    def embeds(self, options: Sequence[ResolvedOptions], device: torch.device) -> PromptEmbeds:
        """[negative, positive] of a batch with guidance, positive without."""
        positive = self.cache.get([one.prompt for one in options], self._encode, device)
        if not options[0].guided:
            return positive
        return positive.after(self.cache.get([one.negative_prompt for one in options], self._encode, device))

    def _encode(self, prompt: str) -> PromptEmbeds:
        if not self.job.encodes:
            raise ValueError(f"embeds {self.job.embeds} holds no embeddings of {prompt[:60]!r} that can be read")
        self.pipe = self.pipe or self.job.load("encoders")
        embeds = self.pipe.encode([prompt], self.cache.max_sequence_length)
        self.pipe.maybe_free_model_hooks()  # or the last encoder stays on the card beside what draws
        return embeds
