"""What all but the first of several processes that draw together do: they carry out its orders."""

import contextlib
from dataclasses import replace
from functools import partial

import torch

from hi_diffusers.denoising.ranks import Ranks
from hi_diffusers.denoising.steps import Interrupted, StepEnd
from hi_diffusers.engine.loading import free_memory, load_files
from hi_diffusers.engine.orders import Draw, Load
from hi_diffusers.families.family import Model
from hi_diffusers.families.table import find_family


def follow(ranks: Ranks, device: str) -> None:
    """Carry out the first rank's orders until it dismisses the others.

    Args:
        device: this rank's device.

    Raises:
        RuntimeError: if the first rank is gone, or this one failed while they drew.
    """
    model: Model | None = None
    while (order := ranks.share(None)) is not None:
        if isinstance(order, Load):
            model = None
            free_memory()
            torch.set_num_threads(order.threads)
            with contextlib.suppress(Exception):  # the first rank is told, and says it
                model = ranks.together(partial(_load, order, ranks, device))
        else:
            assert model is not None, "the first rank draws with a model that it has not ordered"
            _denoise(order, ranks, model)


def _load(order: Load, ranks: Ranks, device: str) -> Model:
    files = find_family(order.preset).locate(order.preset, order.source, "drawing")
    placement = replace(order.placement, device=device)
    model = load_files(order.preset, order.source, files, placement, None, "drawing")
    model.draw_with(ranks)
    return model


def _denoise(order: Draw, ranks: Ranks, model: Model) -> None:
    """Denoise a batch, until the first rank stops."""
    from hi_diffusers.engine.generation import denoise_batch  # here: diffusers takes seconds to import

    def on_step_end(end: StepEnd) -> None:
        if ranks.stop():
            raise Interrupted(f"stopped after step {end.record.index + 1}")

    with contextlib.suppress(Interrupted), ranks.in_step():
        denoise_batch(model, order.drawings, order.embeds.to(model.drawing_device), on_step_end, order.inputs)
