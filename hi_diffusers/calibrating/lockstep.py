"""All runs of a calibration side by side: the network is evaluated for every run at one step before the next step.

Shapes: N runs, C latent channels.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from cache_functions import Current
from cache_functions.solver import Solver
from cache_functions.stages import Moments, fit_stage
from hi_diffusers.denoising.solved import evaluate
from hi_diffusers.engine.generation import encode_prompts
from hi_diffusers.engine.starting import begin
from hi_diffusers.families.family import Model
from hi_diffusers.request.drawing import Drawing


class Lockstep:
    """What the runs begin with, their embeddings, and the network.

    Args:
        model: the model that draws.
        drawings: one per run; all but prompt and seed equal.
        batch_size: runs that are evaluated at once.
        tell: called with the number of runs after every batch.
    """

    def __init__(
        self,
        model: Model,
        drawings: Sequence[Drawing],
        batch_size: int,
        tell: Callable[[int], object] = lambda count: None,
    ):
        self.model, self.tell = model, tell
        options = drawings[0].options
        self.guidance = options.guidance if options.guided else 0.0
        self.scheduler = options.timed_scheduler()
        self.sigmas: list[float] = self.scheduler.sigmas.tolist()
        self.batches: list[tuple[slice, Any]] = []
        noise = []
        for start in range(0, len(drawings), batch_size):
            batch = drawings[start : start + batch_size]
            generators = [torch.Generator().manual_seed(one.options.seed) for one in batch]
            noise.append(begin(model, [one.options for one in batch], generators, self.sigmas[0]).latents.cpu())
            embeds = encode_prompts(model, [one.options for one in batch]).to(torch.device("cpu"))
            self.batches.append((slice(start, start + len(batch)), embeds))
        self.noise = torch.cat(noise)

    @torch.no_grad()
    def evaluate(self, latents: Tensor, step: int) -> list[Tensor]:
        """The network's outputs of all runs at a step, each [N,C,H,W], in host memory."""
        device, current = self.model.drawing_device, Current(len(self.sigmas) - 1, step)
        parts = []
        for rows, embeds in self.batches:
            denoiser = self.model.denoiser(embeds.to(device), self.scheduler, self.guidance)
            here = latents[rows].to(device)
            denoiser.condition(here)
            parts.append([one.cpu() for one in evaluate(denoiser, here, step, self.sigmas[step], current)])
            self.tell(len(here))
        return [torch.cat(one) for one in zip(*parts, strict=True)]

    def run(self, solver: Solver) -> Tensor:
        """The latents at which a solver ends, [N,C,H,W]."""
        *_, (latents, _) = self.stages(solver)
        return latents

    def stages(self, solver: Solver) -> Iterator[tuple[Tensor, list[list[Tensor]]]]:
        """The way of a solver.

        Yields:
            (the latents at a full step [N,C,H,W], the outputs of all full steps so far), and last those at the end.
        """
        latents, kept = self.noise, list[list[Tensor]]()
        for stage, step in enumerate(solver.full_steps):
            kept.append(self.evaluate(latents, step))
            yield latents, kept
            latents = _combined(solver.rows[stage], latents, kept)
        yield latents, kept

    def fit(self, prior: Solver, uncached: Callable[[int], Tensor], ridge: float) -> tuple[Solver, Tensor]:
        """Fit a solver stage by stage, on the latents that it reaches.

        Args:
            prior: full steps, and the coefficients that the fit is pulled towards.
            uncached: step -> the uncached runs' latents before that step, [N,C,H,W].
            ridge: strength of the pull, see `fit_stage`.

        Returns:
            (the solver, the latents at which it ends).
        """
        latents, kept, rows = self.noise, list[list[Tensor]](), []
        ends = [*prior.full_steps[1:], len(self.sigmas) - 1]
        for stage, (step, end) in enumerate(zip(prior.full_steps, ends, strict=True)):
            kept.append(self.evaluate(latents, step))
            towards = torch.tensor(prior.rows[stage], dtype=torch.float64)
            target = uncached(end)
            moments = [
                Moments.of([one[run] for one in row_features(latents, kept)], target[run], towards)
                for run in range(len(latents))
            ]
            row, _ = fit_stage(moments, towards, ridge)
            rows.append(row.tolist())
            latents = _combined(rows[-1], latents, kept)
        return Solver.of(prior.full_steps, rows), latents


def row_features(latents: Tensor, kept: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """The latents and the outputs in the order of a solver's row."""
    return [latents, *(outputs[place] for place in range(len(kept[0])) for outputs in kept)]


def _combined(row: Sequence[float], latents: Tensor, kept: Sequence[Sequence[Tensor]]) -> Tensor:
    features = row_features(latents, kept)
    return torch.stack([one.double() * weight for one, weight in zip(features, row, strict=True)]).sum(0).float()
