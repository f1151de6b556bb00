"""The files that a model is loaded from: the request, and the files found."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from hi_diffusers.preset import ModelPreset
from hi_diffusers.weights.hub import find

QUANTIZATIONS = ("none", "nf4")
Parts = Literal["all", "encoders", "drawing"]
"""The parts of a model that are loaded: all, the text encoders, or those that draw from embeddings."""
GIB = 2**30
LFS_POINTER = b"version https://git-lfs"
MAX_JSON_BYTES = 256 * 2**20  # a vocabulary of 128 000 words takes 9 MB


@dataclass(frozen=True)
class ModelSource:
    """The files that a model is loaded from. None is the preset's own.

    Attributes:
        model_path: folder of the pipeline in the diffusers layout, or a hub repository's owner/name.
        revision: branch, tag or commit of that repository.
        llama: folder or repository of Llama-3.1-8B-Instruct, in bf16, nf4 or GPTQ-INT4.
        quantization: "none", or "nf4": the transformer and T5 in 4 bits, quantized on loading if the files are not.
        transformer: a .safetensors or .gguf file that holds the transformer, instead of the pipeline's own.
        loras: LoRAs to add: "FILE", "FOLDER" or "owner/name", followed by ":SCALE" if that is not 1.
    """

    model_path: str | None = None
    revision: str | None = None
    llama: str | None = None
    quantization: str = "none"
    transformer: str | None = None
    loras: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "loras", tuple(self.loras))
        if self.transformer is not None and self.quantization != "none":
            raise ValueError(
                f"transformer {self.transformer} is loaded unchanged: drop quantization {self.quantization}"
            )
        if self.quantization not in QUANTIZATIONS:
            raise ValueError(f"quantization must be one of {', '.join(QUANTIZATIONS)}, got {self.quantization!r}")

    def packed_alike(self) -> "ModelSource":
        """Source of another model's own files, with the same quantization and the same Llama."""
        return ModelSource(llama=self.llama, quantization=self.quantization)

    def repacked(self, quantization: str) -> "ModelSource":
        """Source of the same model's own files, in another quantization."""
        return replace(self, transformer=None, llama=None, quantization=quantization)

    def packing(self) -> list[str]:
        """The settings that the bits of a picture depend on, besides the files themselves."""
        return [self.quantization, self.llama or ""]

    def repo(self, preset: ModelPreset) -> str | None:
        """The hub repository of the pipeline; None if the files come from a folder."""
        if self.model_path is None:
            return preset.nf4_repo if self.quantization == "nf4" else preset.repo
        return self.model_path if is_repo(self.model_path) else None


@dataclass(frozen=True)
class ModelFiles:
    """The folders and files that were found.

    Attributes:
        folder: folder of the pipeline.
        encoder: folder of a text encoder and its tokenizer outside of `folder`; None if all are in `folder`.
        transformer: file of the transformer; None if it is in `folder`.
        loras: file and scale of each LoRA.
    """

    folder: Path
    encoder: Path | None = None
    transformer: Path | None = None
    loras: tuple[tuple[Path, float], ...] = ()

    def paths(self) -> list[Path]:
        """All these folders and files."""
        given = (self.folder, self.encoder, self.transformer, *(path for path, _ in self.loras))
        return [path for path in given if path is not None]


def find_folder(preset: ModelPreset, source: ModelSource) -> Path | None:
    """The pipeline's folder if it is on this disk, else None. It is not checked, and the network is not used."""
    repo = source.repo(preset)
    if repo is not None:
        return find(repo, source.revision)
    folder = preset.folder if source.model_path is None else Path(source.model_path)
    return folder if folder is not None and folder.is_dir() else None


def is_repo(name: str) -> bool:
    """Whether a name is a hub repository's owner/name, not a path."""
    owner, slash, rest = name.partition("/")
    return bool(owner and slash and rest) and "/" not in rest and owner[0] not in "./~" and not Path(name).exists()


def refuse_pointer(path: Path) -> None:
    """Raise ValueError if a file is only a pointer of Git LFS."""
    with path.open("rb") as stream:
        if stream.read(len(LFS_POINTER)) == LFS_POINTER:
            raise ValueError(f"{path} is a pointer of Git LFS, not the file: fetch it with git lfs pull")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a model's folder.

    Raises:
        ValueError: if the file is missing or holds no JSON object.
    """
    try:
        refuse_pointer(path)
        if path.stat().st_size > MAX_JSON_BYTES:
            raise ValueError(f"{path} is larger than {MAX_JSON_BYTES // 2**20} MiB")
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} is missing: the model's folder is incomplete") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no JSON object")
    return content
