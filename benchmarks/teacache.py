"""TeaCache's rule (arXiv 2411.19108) as a schedule: which steps it would compute, its polynomial refitted here.

TeaCache watches the relative change of the first block's modulated input from step to step, rescales it by a polynomial
fitted to the change of the block stack's residual, and computes a step when the sum since the last computed one
reaches a threshold; between them it reuses the residual. The first and the last step are always computed. Here the
changes are averaged over the calibration's prompts, so that a batch has one schedule, and the threshold is the one
that makes the budget.
"""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn

from cache_functions import CacheConfig
from hi_diffusers.engine.generation import denoise_batch, encode_prompts
from hi_diffusers.families.hidream.pipeline import HiDreamImagePipeline
from hi_diffusers.request.drawing import Drawing
from hi_diffusers.request.options import ResolvedOptions

DEGREE = 4
BISECTIONS = 60


def observed_changes(pipe: HiDreamImagePipeline, options: Sequence[ResolvedOptions]) -> tuple[np.ndarray, np.ndarray]:
    """Relative L1 change of (modulated input, residual) since the step before, [num_steps]; 0 at step 0."""
    inputs: list[Tensor] = []
    residuals: list[Tensor] = []
    embedded: list[Tensor] = []
    transformer = pipe.transformer

    def keep_input(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        inputs.append(args[0].clone())

    def keep_embedded(module: nn.Module, args: object, output: Tensor) -> None:
        embedded.append(output.clone())

    def keep_residual(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        residuals.append(args[0] - embedded.pop())

    hooks = [
        transformer.double_stream_blocks[0].block.attn1.register_forward_pre_hook(keep_input),
        transformer.x_embedder.register_forward_hook(keep_embedded),
        transformer.final_layer.register_forward_pre_hook(keep_residual),
    ]
    try:
        drawings = [Drawing(pipe.preset, one, CacheConfig.off()) for one in options]
        denoise_batch(pipe, drawings, encode_prompts(pipe, options))
    finally:
        for hook in hooks:
            hook.remove()
    return _relative_changes(inputs), _relative_changes(residuals)


def teacache_mask(changes: tuple[np.ndarray, np.ndarray], full_steps: int) -> tuple[int, ...] | None:
    """The steps that TeaCache computes with the threshold that makes `full_steps` of them; None if none makes it."""
    of_input, of_residual = changes
    polynomial = np.polyfit(of_input[1:], of_residual[1:], DEGREE)
    rescaled = np.polyval(polynomial, of_input).clip(min=0)
    low, high = 0.0, float(rescaled.sum()) + 1
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        steps = _computed_steps(rescaled, middle)
        if len(steps) == full_steps:
            return steps
        low, high = (middle, high) if len(steps) > full_steps else (low, middle)
    return None


def _computed_steps(rescaled: np.ndarray, threshold: float) -> tuple[int, ...]:
    steps, accumulated = [0], 0.0
    for step in range(1, len(rescaled)):
        accumulated += rescaled[step]
        if accumulated >= threshold or step == len(rescaled) - 1:
            steps.append(step)
            accumulated = 0.0
    return tuple(steps)


def _relative_changes(values: list[Tensor]) -> np.ndarray:
    changes = [(later - earlier).abs().mean() / earlier.abs().mean() for earlier, later in pairwise(values)]
    return torch.stack([torch.zeros(()), *changes]).numpy()
