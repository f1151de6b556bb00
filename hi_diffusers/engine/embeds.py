"""Prompt embeddings on disk: encoded once, found again by the settings that determine them.

    FOLDER/<encoders>-<dtype>-<place>/<hash of prompt and max_sequence_length>.safetensors

Every prompt is encoded alone, so that an entry does not depend on other prompts of a batch. The place (such as cpu2,
the CPU with two threads) is part of the name, since sums in another order have other bits. An entry that cannot be read
is made again. The oldest entries are removed if the folder grows beyond its limit.
"""

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from hi_diffusers.families.family import Embeds
from hi_diffusers.pictures.metadata import write_atomically

CHECKSUM = "blake2b"
STALE_SECONDS = 24 * 3600  # a temporary file older than this was left by a killed run


class EmbedsCache:
    """A folder of encoded prompts.

    Args:
        folder: folder for one set of encoders; made when the first entry is written.
        kind: the family's class of embeddings.
        max_sequence_length: tokens that prompts are padded or cut to.
        limit_bytes: maximum size of the folder; None is no limit.
    """

    def __init__(self, folder: Path, kind: type[Embeds], max_sequence_length: int, limit_bytes: float | None = None):
        self.folder, self.kind = folder, kind
        self.max_sequence_length, self.limit_bytes = max_sequence_length, limit_bytes
        self.num_bytes: int | None = None  # size of the folder; measured when it is first needed

    def __contains__(self, prompt: str) -> bool:
        return self._path(prompt).is_file()

    def fill(self, prompts: Iterable[str], encode: Callable[[str], Embeds]) -> None:
        """Encode missing prompts, and make room by removing entries of other prompts, the oldest first."""
        wanted = {self._path(prompt): prompt for prompt in prompts}
        for path, prompt in wanted.items():
            if self._read(prompt) is None:
                self._put(path, prompt, encode(prompt))
            elif self.limit_bytes is not None:
                with contextlib.suppress(FileNotFoundError):  # another run may have removed it
                    os.utime(path)
        self._shrink(wanted)

    def get(self, prompts: Sequence[str], encode: Callable[[str], Embeds], device: torch.device) -> Embeds:
        """The embeddings of a batch of prompts; `encode` makes the missing ones."""
        found = {prompt: self._read(prompt) or encode(prompt) for prompt in dict.fromkeys(prompts)}
        return self.kind.join([found[prompt].to(device) for prompt in prompts])

    def _put(self, path: Path, prompt: str, embeds: Embeds) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: tensor.cpu().contiguous() for name, tensor in embeds.tensors().items()}
        data = save(tensors, self._made_of(prompt) | {CHECKSUM: _checksum(tensors)})
        write_atomically(path, data)
        if self.num_bytes is not None:
            self.num_bytes += len(data)

    def _path(self, prompt: str) -> Path:
        key = json.dumps([prompt, self.max_sequence_length])
        return self.folder / f"{hashlib.sha256(key.encode()).hexdigest()}.safetensors"

    def _made_of(self, prompt: str) -> dict[str, str]:
        return {"prompt": prompt, "max_sequence_length": str(self.max_sequence_length)}

    def _read(self, prompt: str) -> Embeds | None:
        """The prompt's entry; None if it is missing, damaged, another prompt's or not finite."""
        try:
            data = self._path(prompt).read_bytes()
            tensors = load(data)
            header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
            found = self.kind.of(tensors)
        except (OSError, SafetensorError, KeyError, ValueError, RecursionError):
            return None
        made_of = dict(header.get("__metadata__") or {})
        if made_of.pop(CHECKSUM, None) != _checksum(tensors) or made_of != self._made_of(prompt):
            return None
        return found if all(bool(tensor.isfinite().all()) for tensor in tensors.values()) else None

    def _shrink(self, wanted: Container[Path]) -> None:
        if self.limit_bytes is None or (self.num_bytes is not None and self.num_bytes <= self.limit_bytes):
            return
        entries = []
        for path in self.folder.glob("*.*"):
            with contextlib.suppress(FileNotFoundError):
                entries.append((path.stat().st_mtime, path.stat().st_size, path))
        self.num_bytes = sum(size for _, size, _ in entries)
        for age, size, path in sorted(entries):
            torn = path.suffix == ".tmp" and age < time.time() - STALE_SECONDS
            if torn or (self.num_bytes > self.limit_bytes and path.suffix != ".tmp" and path not in wanted):
                path.unlink(missing_ok=True)
                self.num_bytes -= size


def embeds_folder(root: Path, encoders: str, dtype: str, place: str) -> Path:
    """The folder of these encoders' embeddings, below a cache's root.

    Args:
        encoders: `encoders_fingerprint` of the model's folder.
        dtype: dtype of the encoders, such as "bf16".
        place: where they run, such as "cuda" or "cpu2".
    """
    return root / f"{encoders}-{dtype}-{place}"


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    """A checksum of the tensors' names, dtypes, shapes and values."""
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
