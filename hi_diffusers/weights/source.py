"""Which files a model is loaded from, as asked for and as found."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from hi_diffusers.preset import ModelPreset
from hi_diffusers.weights.hub import find

QUANTIZATIONS = ("none", "nf4")
Parts = Literal["all", "encoders", "drawing"]
"""What of a model is loaded: everything, what encodes prompts, or what draws from embeddings."""
GIB = 2**30
LFS_POINTER = b"version https://git-lfs"
MAX_JSON_BYTES = 256 * 2**20  # a vocabulary of 128 000 words takes 9 MB


@dataclass(frozen=True)
class ModelSource:
    """Which files a model is loaded from. None is the preset's own.

    Attributes:
        model_path: folder of the pipeline in the diffusers layout, or a hub repository's owner/name.
        revision: of that repository: branch, tag or commit.
        llama: folder or repository of Llama-3.1-8B-Instruct, in bf16, nf4 or GPTQ-INT4.
        quantization: "none", or "nf4": the transformer and T5 in 4 bits, quantized on loading where the files are not.
        transformer: a .safetensors or .gguf file that holds the transformer, in the place of the pipeline's own.
        loras: LoRAs to be added: "FILE", "FOLDER" or "owner/name", with ":SCALE" behind it where that is not 1.
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
            raise ValueError("transformer names a file, which is loaded as it is: drop quantization")
        if self.quantization not in QUANTIZATIONS:
            raise ValueError(f"quantization must be one of {', '.join(QUANTIZATIONS)}, got {self.quantization!r}")

    def packed_alike(self) -> "ModelSource":
        """Another model's own files, in the same quantization and with the same text encoder."""
        return ModelSource(llama=self.llama, quantization=self.quantization)

    def repacked(self, quantization: str) -> "ModelSource":
        """The same model's own files, in another quantization."""
        return replace(self, transformer=None, llama=None, quantization=quantization)

    def packing(self) -> list[str]:
        """What of it the bits of a picture depend on, beside the files themselves."""
        return [self.quantization, self.llama or ""]

    def repo(self, preset: ModelPreset) -> str | None:
        """The hub repository of the pipeline; None where it is a folder."""
        if self.model_path is None:
            return preset.nf4_repo if self.quantization == "nf4" else preset.repo
        return self.model_path if is_repo(self.model_path) else None


@dataclass(frozen=True)
class ModelFiles:
    """Folders that hold what was asked for.

    Attributes:
        folder: of the pipeline.
        encoder: of a text encoder's weights and tokenizer that lie outside of `folder`; None where none does.
        transformer: file of the transformer, None where it lies in `folder`.
        loras: file and scale of each.
    """

    folder: Path
    encoder: Path | None = None
    transformer: Path | None = None
    loras: tuple[tuple[Path, float], ...] = ()

    def paths(self) -> list[Path]:
        """All of them."""
        given = (self.folder, self.encoder, self.transformer, *(path for path, _ in self.loras))
        return [path for path in given if path is not None]


def find_folder(preset: ModelPreset, source: ModelSource) -> Path | None:
    """The pipeline's folder, if it is on this disk. Nothing is checked, and no network is touched."""
    repo = source.repo(preset)
    if repo is not None:
        return find(repo, source.revision)
    folder = preset.folder if source.model_path is None else Path(source.model_path)
    return folder if folder is not None and folder.is_dir() else None


def is_repo(name: str) -> bool:
    """Whether it is a hub repository's owner/name, and no path."""
    owner, slash, rest = name.partition("/")
    return bool(owner and slash and rest) and "/" not in rest and owner[0] not in "./~" and not Path(name).exists()


def refuse_pointer(path: Path) -> None:
    """Refuse a file that Git LFS has left a pointer for; raises ValueError."""
    with path.open("rb") as stream:
        if stream.read(len(LFS_POINTER)) == LFS_POINTER:
            raise ValueError(f"{path} is a pointer of Git LFS, not the file: fetch it with git lfs pull")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a model's folder.

    Raises:
        ValueError: if it is absent or none.
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
