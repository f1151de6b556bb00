"""Which model it is, told from its files, and what was calibrated for it. Nothing here loads weights."""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

from cache_functions import CalibrationShelf
from hi_diffusers.preset import ModelPreset
from hi_diffusers.weights.source import ModelFiles, ModelSource, find_folder, read_json

FINGERPRINT_SAMPLE = 2**20


@dataclass(frozen=True)
class ModelIdentity:
    """Which model drew, without saying where its files lay.

    Attributes:
        model_type: the preset's name.
        fingerprint: sha256 over the transformer's configuration and weight files (of each file its size and its
            first and last MiB), so that other weights under the same name are told apart.
        quantization: "none", or "nf4" where it was asked for on loading.
        loras: of each "fingerprint:scale".
    """

    model_type: str
    fingerprint: str
    quantization: str = "none"
    loras: tuple[str, ...] = ()

    @classmethod
    def of(cls, preset: ModelPreset, files: ModelFiles, quantization: str, known: str | None = None) -> "ModelIdentity":
        """Of files that were found.

        Args:
            known: the fingerprint, where it was taken before.
        """
        loras = tuple(f"{_of_file(path)}:{scale:g}" for path, scale in files.loras)
        own = known or fingerprint(files.folder / "transformer", files.transformer)
        return cls(preset.name, own, quantization, loras)


def fingerprint(folder: Path, file: Path | None = None) -> str:
    """See `ModelIdentity.fingerprint`; 16 hexadecimal digits.

    Args:
        folder: of the transformer.
        file: that holds its weights, in the place of the folder's.
    """
    if file is not None:
        return _of_file(file)
    digest = hashlib.sha256()
    add_folder(digest, folder)
    return digest.hexdigest()[:16]


def _of_file(path: Path) -> str:
    digest = hashlib.sha256()
    _add_file(digest, path)
    return digest.hexdigest()[:16]


def add_folder(digest: "hashlib._Hash", folder: Path) -> None:
    """Add a component's configuration and weight files to a digest."""
    config = read_json(folder / "config.json")
    described = {name: value for name, value in config.items() if not name.startswith("_")}  # not where it came from
    digest.update(json.dumps(described, sort_keys=True).encode())
    for path in sorted(folder.glob("*.safetensors")):
        digest.update(path.name.encode())
        _add_file(digest, path)


def _add_file(digest: "hashlib._Hash", path: Path) -> None:
    """Its size, and its first and last MiB."""
    size = path.stat().st_size
    with path.open("rb") as stream:
        digest.update(size.to_bytes(8, "little") + stream.read(FINGERPRINT_SAMPLE))
        stream.seek(max(0, size - FINGERPRINT_SAMPLE))
        digest.update(stream.read())


def find_calibrations(
    preset: ModelPreset, source: ModelSource, calibration_dir: str | Path | None = None
) -> CalibrationShelf | None:
    """Where the calibrations of a model lie, before it is loaded; None if its files are not on this disk.

    Args:
        preset, source: the model, and where its files are.
        calibration_dir: where calibrations are looked up before the model's own; None is the user's cache folder.
    """
    folder = find_folder(preset, source)
    if folder is None or not (folder / "transformer" / "config.json").is_file():
        return None
    own = default_calibration_dir() if calibration_dir is None else Path(calibration_dir)
    file = None if source.transformer is None else Path(source.transformer)
    if file is not None and not file.is_file():
        return None
    altered = [*(["nf4"] if source.quantization != "none" else []), *(["LoRA"] if source.loras else [])]
    folders = (own, folder / "calibration")
    return CalibrationShelf(fingerprint(folder / "transformer", file), folders, " and ".join(altered))


def default_calibration_dir() -> Path:
    """Where calibrate.py writes, and calibrations are looked up before the model's own: the user's cache folder."""
    return cache_folder() / "calibration"


def cache_folder() -> Path:
    """The user's cache folder, of this software."""
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "hi_diffusers"
