"""The uncached pictures of a calibration, and the Gram matrix of their steps."""

import abc
import pickle
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from cache_functions import CacheConfig, settle
from hi_diffusers.calibrating.plan import Plan, sampler_sigmas
from hi_diffusers.denoising.steps import StepEnd
from hi_diffusers.engine.generation import denoise_batch, draw_batch, encode_prompts
from hi_diffusers.engine.starting import begin
from hi_diffusers.families.family import Model


class Request(Protocol):
    """What the search needs of a plan; `Plan` and `StockPlan` have more.

    Attributes:
        num_fitted: number of pictures that fit the matrix; the others choose.
        batch_size: pictures per batch.
    """

    @property
    def num_fitted(self) -> int:
        """See above."""

    @property
    def batch_size(self) -> int:
        """See above."""

    @property
    def num_pictures(self) -> int:
        """Number of all pictures."""

    @property
    def budgets(self) -> Sequence[int]:
        """Numbers of full steps that are calibrated for."""


class Uncached(abc.ABC):
    """Uncached pictures: drawn once, kept in a folder. A subclass draws them.

    Args:
        plan: the request.
        folder: keeps one file per picture until the calibration is done.
    """

    def __init__(self, plan: Request, folder: Path):
        self.plan, self.folder = plan, folder

    @property
    @abc.abstractmethod
    def sigmas(self) -> tuple[float, ...]:
        """Noise level at every step and after the last one; known once a picture was drawn."""

    @property
    @abc.abstractmethod
    def corrects(self) -> bool:
        """Whether the corrector can be used."""

    @abc.abstractmethod
    def draw(self, indices: list[int]) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        """Draw pictures; yields of each its features by target, [num_steps, ...], and its pixels."""

    @abc.abstractmethod
    def draw_cached(self, indices: Sequence[int], cache: CacheConfig) -> Iterator[Any]:
        """Draw pictures with a cache; yields the pixels of each."""

    def complete(self) -> None:
        """Draw what is missing."""
        count, size = self.plan.num_pictures, self.plan.batch_size
        missing = [i for i in range(count) if not self._is_whole(i)]
        with tqdm(total=count, initial=count - len(missing), unit="picture") as bar:
            for start in range(0, len(missing), size):
                batch = missing[start : start + size]
                for index, (features, pixels) in zip(batch, self.draw(batch), strict=True):
                    self._keep(index, features, pixels)
                bar.update(len(batch))

    def gram(self, target: str) -> Tensor:
        """The Gram matrix, averaged over the fitting pictures: [num_steps, num_steps], float64, per latent element."""
        return torch.stack([self._load(i)[target] for i in range(self.plan.num_fitted)]).mean(0)

    def pixels(self, index: int) -> Any:
        """The uncached picture of a prompt whose picture is kept, float [H,W,3]."""
        return self._load(index)["pixels"].numpy()

    def _keep(self, index: int, features: dict[str, Tensor], pixels: Tensor) -> None:
        content = {name: _inner_products(values) for name, values in features.items()}
        if index >= self.plan.num_fitted:
            content["pixels"] = pixels.clone()
        self._write(index, content)

    def _write(self, index: int, content: dict[str, Tensor]) -> None:
        partial = self._path(index).with_suffix(".partial")
        torch.save(content, partial)
        partial.replace(self._path(index))

    def _path(self, index: int) -> Path:
        return self.folder / f"picture-{index:04d}.pt"

    def _is_whole(self, index: int) -> bool:
        """Whether a picture's file exists and can be read."""
        try:
            self._load(index)
        except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError):  # incomplete, or never written
            return False
        return True

    def _load(self, index: int) -> dict[str, Tensor]:
        content: dict[str, Tensor] = torch.load(self._path(index), weights_only=True)
        return content


class UncachedPictures(Uncached):
    """The uncached pictures of our own pipeline.

    Args:
        model: the model that draws.
    """

    plan: Plan

    def __init__(self, model: Model, plan: Plan, folder: Path):
        super().__init__(plan, folder)
        self.model = model

    @property
    def sigmas(self) -> tuple[float, ...]:
        """See `Uncached`."""
        return tuple(sampler_sigmas(self.plan.sampler))

    @property
    def corrects(self) -> bool:
        """See `Uncached`."""
        return not self.plan.sampler.renoises

    def draw(self, indices: list[int]) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        """See `Uncached`."""
        x0, latents, pixels = self._observe(indices)
        features = {"x0": x0}
        if "velocity" in self.plan.targets:
            sigmas = torch.tensor(sampler_sigmas(self.plan.sampler)[:-1])
            features["velocity"] = (latents[:, :-1] - x0) / sigmas[None, :, None, None, None]
        for row in range(len(indices)):
            yield {name: values[row] for name, values in features.items()}, pixels[row]

    def _observe(self, indices: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Draw: x0 at every step [B,S,C,H,W], latents before every step and at the end [B,S+1,C,H,W], pixels."""
        drawings = [self.plan.drawings[i] for i in indices]
        embeds = encode_prompts(self.model, [one.options for one in drawings])
        options = [one.options for one in drawings]
        generators = [torch.Generator().manual_seed(one.seed) for one in options]
        x0: list[Tensor] = []
        latents = [begin(self.model, options, generators, self.sigmas[0]).latents.cpu()]

        def observe(end: StepEnd) -> None:
            x0.append(end.x0.cpu())
            latents.append(end.latents.cpu())

        pixels = self.model.decode(denoise_batch(self.model, drawings, embeds, observe))
        return torch.stack(x0, dim=1), torch.stack(latents, dim=1), torch.from_numpy(pixels)

    def draw_cached(self, indices: Sequence[int], cache: CacheConfig) -> Iterator[Any]:
        """See `Uncached`."""
        settled = settle(cache, self.plan.sampler.drawn_steps)
        drawings = [replace(self.plan.drawings[i], cache=settled) for i in indices]
        for picture in draw_batch(self.model, drawings):
            yield picture.pixels


class UncachedRuns(UncachedPictures):
    """Uncached pictures with all latents of each run, which a solver is fitted to."""

    def draw(self, indices: list[int]) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        """See `Uncached`; the features are the latents before every step and at the end."""
        _, latents, pixels = self._observe(indices)
        for row in range(len(indices)):
            yield {"latents": latents[row]}, pixels[row]

    def latents(self, indices: Sequence[int], step: int) -> Tensor:
        """The latents of some runs before a step, or at the end, [N,C,H,W]."""
        files = (torch.load(self._path(index), weights_only=True, mmap=True) for index in indices)
        return torch.stack([file["latents"][step] for file in files])

    def _keep(self, index: int, features: dict[str, Tensor], pixels: Tensor) -> None:
        self._write(index, {"latents": features["latents"].clone(), "pixels": pixels.clone()})


def _inner_products(values: Tensor) -> Tensor:
    """Mean products [S,S] of the features [S,C,H,W] of one picture."""
    flat = values.flatten(1).double()
    products = flat @ flat.T / flat.shape[1]
    return (products + products.T) / 2  # on some processors the product is not symmetric to the bit
