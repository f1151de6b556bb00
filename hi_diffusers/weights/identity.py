"""A model's identity, computed from its files, and its calibrations. Nothing here loads weights."""

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
    """The identity of a model, without the paths of its files.

    Attributes:
        model_type: the preset's name.
        fingerprint: sha256 over the transformer's configuration and weight files (of each file its size and its
            first and last MiB), so that other weights under the same name are told apart.
        quantization: "none", or "nf4" if it was asked for on loading.
        loras: "fingerprint:scale" of each LoRA.
    """

    model_type: str
    fingerprint: str
    quantization: str = "none"
    loras: tuple[str, ...] = ()

    @classmethod
    def of(cls, preset: ModelPreset, files: ModelFiles, quantization: str, known: str | None = None) -> "ModelIdentity":
        """The identity of a model whose files were found.

        Args:
            known: the fingerprint if it is known already.
        """
        loras = tuple(f"{file_fingerprint(path)}:{scale:g}" for path, scale in files.loras)
        own = known or fingerprint(files.folder / "transformer", files.transformer)
        return cls(preset.name, own, quantization, loras)


def fingerprint(folder: Path, file: Path | None = None) -> str:
    """See `ModelIdentity.fingerprint`; 16 hexadecimal digits.

    Args:
        folder: the transformer's folder.
        file: file that holds its weights instead of the folder.
    """
    if file is not None:
        return file_fingerprint(file)
    digest = hashlib.sha256()
    add_folder(digest, folder)
    return digest.hexdigest()[:16]


def file_fingerprint(path: Path) -> str:
    """A hash of a file's size and of its first and last MiB; 16 hexadecimal digits."""
    digest = hashlib.sha256()
    add_file(digest, path)
    return digest.hexdigest()[:16]


def add_folder(digest: "hashlib._Hash", folder: Path) -> None:
    """Add a component's configuration and weight files to a digest."""
    config = read_json(folder / "config.json")
    described = {
        name: value for name, value in config.items() if not name.startswith("_")
    }  # names with "_" say where it came from
    digest.update(json.dumps(described, sort_keys=True).encode())
    for path in sorted(folder.glob("*.safetensors")):
        digest.update(path.name.encode())
        add_file(digest, path)


def add_file(digest: "hashlib._Hash", path: Path) -> None:
    """Add a file's size, and its first and last MiB, to a digest."""
    size = path.stat().st_size
    with path.open("rb") as stream:
        digest.update(size.to_bytes(8, "little") + stream.read(FINGERPRINT_SAMPLE))
        stream.seek(max(0, size - FINGERPRINT_SAMPLE))
        digest.update(stream.read())


def find_calibrations(
    preset: ModelPreset, source: ModelSource, calibration_dir: str | Path | None = None
) -> CalibrationShelf | None:
    """The folders of a model's calibrations, before it is loaded; None if its files are not on this disk.

    Args:
        preset, source: the model, and where its files are.
        calibration_dir: folder that is searched before the model's own; None is the user's cache folder.
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
    """The folder that calibrate.py writes to and that is searched before the model's own, in the user's cache."""
    return cache_folder() / "calibration"


def cache_folder() -> Path:
    """This software's folder in the user's cache folder."""
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "hi_diffusers"
