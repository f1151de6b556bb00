"""The uncached pictures of a calibration, and the Gram matrix of their steps."""

import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from hi_diffusers.calibrating.plan import Plan, sampler_sigmas
from hi_diffusers.denoising.steps import StepEnd
from hi_diffusers.engine.generation import denoise_batch, encode_prompts
from hi_diffusers.families.family import Model
from hi_diffusers.request.drawing import Drawing


class UncachedPictures:
    """The uncached pictures: drawn once, kept in a folder.

    Args:
        model: the model that draws.
        plan: the request.
        folder: keeps one file per picture until the calibration is done.
    """

    def __init__(self, model: Model, plan: Plan, folder: Path):
        self.model, self.plan, self.folder = model, plan, folder

    def complete(self) -> None:
        """Draw what is missing."""
        missing = [i for i in range(len(self.plan.drawings)) if not self._is_whole(i)]
        size = self.plan.batch_size
        with tqdm(total=len(self.plan.drawings), initial=len(self.plan.drawings) - len(missing), unit="picture") as bar:
            for start in range(0, len(missing), size):
                batch = missing[start : start + size]
                self._draw(batch)
                bar.update(len(batch))

    def gram(self, target: str) -> Tensor:
        """The Gram matrix, averaged over the fitting pictures: [num_steps, num_steps], float64, per latent element."""
        return torch.stack([self._load(i)[target] for i in range(self.plan.num_fitted)]).mean(0)

    def pixels(self, index: int) -> Any:
        """A choosing prompt's uncached picture, float [H,W,3]."""
        return self._load(index)["pixels"].numpy()

    def _draw(self, indices: list[int]) -> None:
        drawings = [self.plan.drawings[i] for i in indices]
        embeds = encode_prompts(self.model, [one.options for one in drawings])
        x0: list[Tensor] = []
        after: list[Tensor] = []

        def observe(end: StepEnd) -> None:
            x0.append(end.x0.cpu())
            after.append(end.latents.cpu())

        latents = denoise_batch(self.model, drawings, embeds, observe)
        pixels = torch.from_numpy(self.model.decode(latents))
        features = {"x0": torch.stack(x0, dim=1)}
        if "velocity" in self.plan.targets:
            features["velocity"] = self._velocities(features["x0"], torch.stack(after, dim=1), drawings)
        for row, index in enumerate(indices):
            content = {name: _inner_products(values[row]) for name, values in features.items()}
            if index >= self.plan.num_fitted:
                content["pixels"] = pixels[row].clone()
            partial = self._path(index).with_suffix(".partial")
            torch.save(content, partial)
            partial.replace(self._path(index))

    def _velocities(self, x0: Tensor, after: Tensor, drawings: list[Drawing]) -> Tensor:
        """(x - x0) / sigma of every step [B,S,C,H,W]; x is the latent before the step."""
        options = drawings[0].options
        generators = [torch.Generator().manual_seed(one.options.seed) for one in drawings]
        noise = self.model.draw_noise(len(drawings), options.width, options.height, generators).cpu()
        before = torch.cat((noise[:, None], after[:, :-1]), dim=1)
        sigmas = torch.tensor(sampler_sigmas(options)[:-1])
        return (before - x0) / sigmas[None, :, None, None, None]

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


def _inner_products(values: Tensor) -> Tensor:
    """Mean products [S,S] of the features [S,C,H,W] of one picture."""
    flat = values.flatten(1).double()
    products = flat @ flat.T / flat.shape[1]
    return (products + products.T) / 2  # on some processors the product is not symmetric to the bit
