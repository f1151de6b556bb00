"""The table of all models: every folder here is a family, with its presets in `presets.py`."""

import importlib
import pkgutil
from collections.abc import Iterator, Mapping

from hi_diffusers import families
from hi_diffusers.families.family import Family
from hi_diffusers.preset import ModelPreset

DEFAULT_MODEL = "nano"


class Presets(Mapping[str, ModelPreset]):
    """All presets by name; a family folder that is added here is included."""

    def __getitem__(self, name: str) -> ModelPreset:
        return {preset.name: preset for preset in self._all()}[name]

    def __iter__(self) -> Iterator[str]:
        return (preset.name for preset in self._all())

    def __len__(self) -> int:
        return sum(1 for _ in self._all())

    def _all(self) -> Iterator[ModelPreset]:
        for wing in pkgutil.iter_modules(families.__path__):
            if wing.ispkg:
                yield from importlib.import_module(f"{families.__name__}.{wing.name}.presets").PRESETS


PRESETS = Presets()


def find_preset(name: str) -> ModelPreset:
    """The preset of that name.

    Raises:
        ValueError: if there is no such preset.
    """
    if name not in PRESETS:
        raise ValueError(f"model_type must be one of {', '.join(PRESETS)}, got {name!r}")
    return PRESETS[name]


def find_family(preset: ModelPreset) -> Family:
    """The family module that loads a preset's model."""
    family: Family = importlib.import_module(f"{families.__name__}.{preset.family}.family")
    return family
