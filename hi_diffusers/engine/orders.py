"""What the first of several processes that draw together orders from the others: `follow` carries it out."""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from hi_diffusers.denoising.ranks import Ranks
from hi_diffusers.denoising.steps import Interrupted, StepEnd
from hi_diffusers.engine.loading import free_memory, load_files
from hi_diffusers.families.family import Model
from hi_diffusers.families.table import find_family
from hi_diffusers.pictures.inputs import Fitted
from hi_diffusers.preset import ModelPreset
from hi_diffusers.request.drawing import Drawing
from hi_diffusers.request.placement import Placement
from hi_diffusers.weights.source import ModelSource


@dataclass(frozen=True)
class Load:
    """Load a model, in the place of the last one.

    Attributes:
        preset, source: the model, and where its files are.
        placement: how it is kept; each rank has its own device.
    """

    preset: ModelPreset
    source: ModelSource
    placement: Placement

    def obey(self, device: str, ranks: Ranks) -> Model:
        """Load it on this rank's device."""
        files = find_family(self.preset).locate(self.preset, self.source, "drawing")
        placement = replace(self.placement, device=device)
        model = load_files(self.preset, self.source, files, placement, None, "drawing")
        model.draw_with(ranks)
        return model


@dataclass(frozen=True)
class Draw:
    """Denoise a batch.

    Attributes:
        drawings: as in `draw_batch`.
        embeds: the encoded prompts, on the CPU.
        inputs: the pictures that it starts from.
    """

    drawings: tuple[Drawing, ...]
    embeds: Any
    inputs: Fitted | None

    @classmethod
    def of(cls, drawings: Sequence[Drawing], embeds: Any, inputs: Fitted | None) -> "Draw":
        """The order, from the batch of `draw_batch`; pictures are sent as they were read."""
        return cls(tuple(drawings), embeds.to(torch.device("cpu")), inputs)

    def obey(self, model: Model, ranks: Ranks) -> None:
        """Denoise it, until the first rank stops."""
        from hi_diffusers.engine.generation import denoise_batch  # here: diffusers takes seconds to import

        def on_step_end(end: StepEnd) -> None:
            if ranks.share(None):
                raise Interrupted(f"stopped after step {end.record.index + 1}")

        with contextlib.suppress(Interrupted):
            denoise_batch(model, self.drawings, self.embeds.to(model.drawing_device), on_step_end, self.inputs)


def follow(ranks: Ranks, device: str) -> None:
    """Carry out the first rank's orders until it dismisses the others.

    Args:
        device: this rank's device.
    """
    model: Model | None = None
    while (order := ranks.share(None)) is not None:
        if isinstance(order, Load):
            model = None
            free_memory()
            with contextlib.suppress(Exception):  # the first rank is told, and says it
                model = ranks.together(partial(order.obey, device, ranks))
        else:
            assert model is not None, "the first rank draws with a model that it has not ordered"
            order.obey(model, ranks)
