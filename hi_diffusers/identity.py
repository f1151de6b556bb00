"""Which model it is, told from its files, and what was calibrated for it. Nothing here loads weights."""

import hashlib
import json
import os
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from cache_functions import CalibrationShelf
from hi_diffusers.model_files import ModelFiles, ModelSource, find_folder, read_json
from hi_diffusers.presets import ModelPreset

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
    def of(cls, preset: ModelPreset, files: ModelFiles, quantization: str) -> "ModelIdentity":
        """Of files that `locate` found."""
        loras = tuple(f"{_of_file(path)}:{scale:g}" for path, scale in files.loras)
        return cls(preset.name, fingerprint(files.folder / "transformer", files.transformer), quantization, loras)


def fingerprint(folder: Path, file: Path | None = None) -> str:
    """See `ModelIdentity.fingerprint`; 16 hexadecimal digits.

    Args:
        folder: of the transformer.
        file: that holds its weights, in the place of the folder's.
    """
    if file is not None:
        return _of_file(file)
    digest = hashlib.sha256()
    _add_folder(digest, folder)
    return digest.hexdigest()[:16]


def _of_file(path: Path) -> str:
    digest = hashlib.sha256()
    _add_file(digest, path)
    return digest.hexdigest()[:16]


def encoders_fingerprint(files: ModelFiles, quantization: str) -> str:
    """The same over a model's text encoders, its whole tokenizers, and the version that runs them."""
    digest = hashlib.sha256(f"1 {version('transformers')}{'' if quantization == 'none' else quantization}".encode())
    for part in sorted(files.folder.glob("text_encoder*")):
        _add_folder(digest, part)
    for path in sorted(path for path in files.folder.glob("tokenizer*/*") if path.is_file()):
        digest.update(f"{path.parent.name}/{path.name}".encode() + path.read_bytes())
    if files.llama is not None:
        _add_folder(digest, files.llama)
        for path in sorted(path for path in files.llama.glob("*token*") if path.is_file()):
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _add_folder(digest: "hashlib._Hash", folder: Path) -> None:
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
