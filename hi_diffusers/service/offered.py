"""The models that a server offers, found from the files on this disk alone."""

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from cache_functions.calibration import CalibrationShelf
from hi_diffusers.families.family import TokenCount
from hi_diffusers.families.table import PRESETS, find_family
from hi_diffusers.preset import ModelPreset
from hi_diffusers.request.options import ResolvedOptions
from hi_diffusers.weights.identity import find_calibrations
from hi_diffusers.weights.source import ModelFiles, ModelSource

MAX_COMPUTED_STEPS = 64  # a schedule takes a second at 50 steps and 16 times that at 100


@dataclass(frozen=True)
class OfferedModel:
    """One model of a server.

    Attributes:
        preset, source: the model, and where its files are.
        files: its files on this disk; None if they are missing.
        calibrations: where its calibrations are; None: nowhere.
        missing: why the model cannot be used; empty if it can.
    """

    preset: ModelPreset
    source: ModelSource
    files: ModelFiles | None = None
    calibrations: CalibrationShelf | None = None
    missing: str = ""


def offer_models(chosen: str, source: ModelSource, calibration_dir: Path | None) -> Mapping[str, OfferedModel]:
    """Every preset as an offered model, by name. The network is not used.

    Args:
        chosen: the model whose files `source` names; the others use their own files, in the same quantization.
        calibration_dir: searched for calibrations before the models' own folders.
    """
    shared = source.packed_alike()
    offered = {}
    for name, preset in PRESETS.items():
        own = source if name == chosen else ModelSource() if preset.folder is not None else shared
        model = OfferedModel(preset, own)
        try:
            files = find_family(preset).locate(preset, own, offline=True)
            shelf = find_calibrations(preset, own, calibration_dir)
            shelf = shelf and replace(shelf, computes_up_to=MAX_COMPUTED_STEPS)
            model = replace(model, files=files, calibrations=shelf)
        except (ValueError, OSError) as error:
            model = replace(model, missing=str(error))
        offered[name] = model
    return offered


class TokenCounter:
    """The tokenizers of the model that was last asked for; not the drawing model's, which are not thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._name = ""
        self._count: Callable[[str, int], TokenCount] | None = None

    def count(self, model: OfferedModel, options: ResolvedOptions) -> TokenCount:
        """Count a prompt's tokens; raises ValueError if the model's files are not on this disk."""
        preset = model.preset
        with self._lock:
            if self._count is None or self._name != preset.name:
                if model.files is None:
                    raise ValueError(model.missing)
                self._count, self._name = find_family(preset).token_counter(preset, model.files), preset.name
            return self._count(options.prompt, options.max_sequence_length)
