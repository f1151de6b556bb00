"""The models that a page offers, told from the files on this disk alone."""

import threading
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cache_functions.calibration import CalibrationShelf
from hi_diffusers.identity import find_calibrations
from hi_diffusers.model_files import ModelSource, locate
from hi_diffusers.options import ResolvedOptions
from hi_diffusers.pipelines.prompts import TokenCount, count_tokens
from hi_diffusers.presets import PRESETS, ModelPreset


@dataclass(frozen=True)
class OfferedModel:
    """One model of the page.

    Attributes:
        preset, source: the model, and where its files are.
        calibrations: where its calibrations lie; None: nowhere.
        missing: why it cannot be drawn with; empty if it can.
    """

    preset: ModelPreset
    source: ModelSource
    calibrations: CalibrationShelf | None = None
    missing: str = ""


def offer_models(chosen: str, source: ModelSource, calibration_dir: Path | None) -> Mapping[str, OfferedModel]:
    """Every preset, by name. No network is touched.

    Args:
        chosen: the model that `source` names the files of; the others come with their own, packed alike.
        calibration_dir: where calibrations are looked up before the models' own.
    """
    shared = ModelSource(llama=source.llama, quantization=source.quantization)
    offered = {}
    for name, preset in PRESETS.items():
        own = source if name == chosen else ModelSource() if preset.is_bundled else shared
        model = OfferedModel(preset, own)
        try:
            locate(preset, own, offline=True)
            model = replace(model, calibrations=find_calibrations(preset, own, calibration_dir))
        except (ValueError, OSError) as error:
            model = replace(model, missing=str(error))
        offered[name] = model
    return offered


class TokenCounter:
    """The tokenizers of the model that was asked for last, apart from those that draw: they are not thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._name = ""
        self._tokenizers: tuple[Any, ...] = ()

    def count(self, model: OfferedModel, options: ResolvedOptions) -> TokenCount:
        """Count a prompt's tokens."""
        from hi_diffusers.loading import load_tokenizers

        preset = model.preset
        with self._lock:
            if self._name != preset.name:
                self._tokenizers, self._name = load_tokenizers(preset, model.source), preset.name
            return count_tokens(self._tokenizers, options.prompt, options.max_sequence_length, preset.is_bundled)
