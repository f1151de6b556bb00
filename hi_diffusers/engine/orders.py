"""What the first of several processes that draw together orders from the others, see `following`."""

from dataclasses import dataclass
from typing import Any

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
        threads: CPU threads, which the bits of a picture depend on.
    """

    preset: ModelPreset
    source: ModelSource
    placement: Placement
    threads: int


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
