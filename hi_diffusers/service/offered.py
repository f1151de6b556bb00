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
from hi_diffusers.weights.identity import file_fingerprint, find_calibrations
from hi_diffusers.weights.source import ModelFiles, ModelSource

LORA_SCALES = (-2, 2)
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


class LoraFolder:
    """The LoRAs that visitors may choose: the .safetensors files of a folder, by their names without the suffix.

    Args:
        folder: the folder; None holds none.

    Raises:
        ValueError: if it is no folder, or holds no such file.
    """

    def __init__(self, folder: Path | None = None):
        if folder is not None and not folder.is_dir():
            raise ValueError(f"lora_folder must be a folder, got {folder}")
        paths = [] if folder is None else sorted(folder.glob("*.safetensors"))
        if folder is not None and not paths:
            raise ValueError(f"lora_folder must hold .safetensors files, got {folder}: it holds none")
        self._paths = {path.stem: path for path in paths}
        self._known: dict[tuple[OfferedModel, str, float], OfferedModel] = {}

    def names(self) -> list[str]:
        """The LoRAs that can be chosen."""
        return list(self._paths)

    def added(self, model: OfferedModel, name: object, scale: object) -> OfferedModel:
        """The model with a LoRA.

        Args:
            name: one of `names`; "" and None are none.
            scale: a number in LORA_SCALES; None is 1.

        Raises:
            ValueError: if there is no such LoRA, or it does not fit the model. The server's paths are not named.
        """
        if name is None or name == "":
            return model
        if not isinstance(name, str) or name not in self._paths:
            raise ValueError(f"lora must be one of {', '.join(self._paths) or 'none'}, got {str(name)[:60]!r}")
        least, most = LORA_SCALES
        scale = 1.0 if scale is None else scale
        if isinstance(scale, bool) or not isinstance(scale, int | float) or not least <= scale <= most:
            raise ValueError(f"lora_scale must be a number from {least} to {most}, got {str(scale)[:60]}")
        key = (model, name, round(scale, 2))
        if key not in self._known:
            source = replace(model.source, loras=(*model.source.loras, f"{self._paths[name]}:{key[2]:g}"))
            try:
                files = find_family(model.preset).locate(model.preset, source, offline=True)
            except ValueError as error:
                raise ValueError(str(error).replace(str(self._paths[name]), name)) from error
            shelf = model.calibrations
            if shelf is not None and "LoRA" not in shelf.altered:
                shelf = replace(shelf, altered=" and ".join(filter(None, (shelf.altered, "LoRA"))))
            self._known[key] = replace(model, source=source, files=files, calibrations=shelf)
        return self._known[key]

    def told(self, lora: str) -> str | None:
        """What a visitor may be told of a LoRA of `ModelSource.loras`; None if it is not of this folder."""
        path, _, scale = lora.rpartition(":")
        return f"{Path(path).name}:{scale}" if Path(path) in self._paths.values() else None

    def named(self, fingerprint: str) -> str | None:
        """The name of the file with that fingerprint, see `weights.identity`; None if it is not here."""
        return next((name for name, path in self._paths.items() if file_fingerprint(path) == fingerprint), None)


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
