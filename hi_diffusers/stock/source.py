"""Where a pipeline of diffusers is, and how it is opened."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from cache_functions import CalibrationShelf
from hi_diffusers.request.placement import resolve_device, resolve_dtype
from hi_diffusers.stock.pipeline_class import PUBLISHED, PipelineClass, PublishedModel
from hi_diffusers.weights.hub import FILES, download, find
from hi_diffusers.weights.identity import add_folder, default_calibration_dir
from hi_diffusers.weights.source import read_json

INDEX = "model_index.json"
ROOM = 1.25
"""Bytes of memory for each byte of weights: what is computed with them needs some, too."""


@dataclass(frozen=True)
class StockSource:
    """A pipeline's files, and where it computes.

    Attributes:
        where: a name in PUBLISHED, a folder, or a repository's owner/name.
        revision: branch, tag or commit of the repository.
        device, dtype: as in `Placement`.
        loras: "FILE", "FOLDER" or "owner/name", followed by ":SCALE" if that is not 1.
        compiled: whether repeated blocks are compiled.
        attention_backend: attention backend of diffusers.
        vram: GiB of the GPU's memory that may be used; None is what is free.
    """

    where: str
    revision: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    loras: tuple[str, ...] = ()
    compiled: bool = False
    attention_backend: str | None = None
    vram: float | None = field(default=None, compare=False)

    @property
    def published(self) -> PublishedModel:
        """The published model of that name, or a nameless one."""
        return PUBLISHED.get(self.where, PublishedModel(self.where))

    @property
    def is_local(self) -> bool:
        """Whether it names a folder."""
        return self.where not in PUBLISHED and Path(self.where).is_dir()

    @cached_property
    def index(self) -> dict[str, Any]:
        """The content of model_index.json; of a repository that file alone is fetched.

        Raises:
            ValueError: if there is none.
        """
        if self.is_local:
            path = Path(self.where) / INDEX
            if not path.is_file():
                raise ValueError(f"pipeline must be a folder of diffusers, got {self.where}, which has no {INDEX}")
            return read_json(path)
        repo = self.published.repo
        folder = find(repo, self.revision, (INDEX,)) or download(repo, self.revision, (INDEX,))
        if not (folder / INDEX).is_file():
            raise ValueError(f"pipeline must be a repository of diffusers, got {repo}, which has no {INDEX}")
        return read_json(folder / INDEX)

    @cached_property
    def pipeline_class(self) -> PipelineClass:
        """The class of the pipeline; raises ValueError as `index` does."""
        return PipelineClass.of(self.index)

    @cached_property
    def folder(self) -> Path:
        """The folder of its files; those of a repository are downloaded.

        Raises:
            ValueError: in one sentence, if that fails.
        """
        if self.is_local:
            return Path(self.where)
        repo, files = self.published.repo, (*FILES, "*.jinja")
        found = find(repo, self.revision, files)
        return found if found is not None and self._is_whole(found) else download(repo, self.revision, files)

    def _is_whole(self, folder: Path) -> bool:
        """Whether a downloaded folder holds every component, with all of its shards."""
        parts = [name for name, value in self.index.items() if isinstance(value, list) and value[:1] != [None]]
        if not all(any((folder / name).glob("*")) for name in parts if isinstance(self.index[name][0], str)):
            return False
        indices = folder.glob("*/*.safetensors.index.json")
        shards = {path.parent / name for path in indices for name in read_json(path)["weight_map"].values()}
        weights = [any((folder / path.name).glob("*.safetensors")) for path in self._denoisers(folder)]
        return all(path.is_file() for path in shards) and all(weights)

    def default(self, option: str) -> Any:
        """An option's value where it is not given: the published one, else the pipeline's own."""
        return self.published.options.get(option, self.pipeline_class.default(option))

    def check(self) -> None:
        """Raise ValueError for a class that diffusers does not have, and for files that cannot be had."""
        if self.pipeline_class:
            self.weight_bytes()

    def part(self, name: str) -> Path:
        """The folder of a component's configuration; of a repository that alone is fetched."""
        if self.is_local:
            return Path(self.where) / name
        repo, files = self.published.repo, (f"{name}/*.json",)
        return (find(repo, self.revision, files) or download(repo, self.revision, files)) / name

    def denoiser_folders(self) -> list[Path]:
        """The folders of the networks that are called at every step."""
        return self._denoisers(self.folder)

    def _denoisers(self, folder: Path) -> list[Path]:
        return [
            folder / name
            for name, value in sorted(self.index.items())
            if name.startswith(("transformer", "unet")) and isinstance(value, list) and value[0] is not None
        ]

    @cached_property
    def fingerprint(self) -> str:
        """A hash over the denoisers' configurations and weight files, 16 hexadecimal digits."""
        digest = hashlib.sha256()
        for folder in self.denoiser_folders():
            add_folder(digest, folder)
        return digest.hexdigest()[:16]

    def model_key(self, guidance: str) -> str:
        """The model in a calibration's key: the denoisers, and the guidance arguments that change what they give."""
        return f"{self.fingerprint} {guidance}".strip()

    def shelf(self, guidance: str, calibration_dir: Path | None) -> CalibrationShelf:
        """Where calibrations for these denoisers and this guidance are.

        Args:
            guidance: all guidance arguments, which a calibration must share.
            calibration_dir: folder that is searched first; None is the user's own.
        """
        own = default_calibration_dir() if calibration_dir is None else calibration_dir
        altered = "LoRA" if self.loras else ""
        return CalibrationShelf(self.model_key(guidance), (own, self.folder / "calibration"), altered)

    def weight_bytes(self) -> list[int]:
        """Bytes of the weights of each component, largest first, as the files hold them."""
        folders = (path for path in self.folder.iterdir() if path.is_dir())
        sizes = (sum(file.stat().st_size for file in folder.glob("*.safetensors")) for folder in folders)
        return sorted((size for size in sizes if size), reverse=True)


def choose_offload(sizes: Sequence[int], free: float) -> str:
    """How a pipeline is kept on a GPU: "none", "model" (one component at a time) or "sequential" (one layer).

    Args:
        sizes: bytes of the components' weights, largest first.
        free: bytes of memory that may be used.
    """
    if ROOM * sum(sizes) <= free:
        return "none"
    return "model" if ROOM * max(sizes, default=0) <= free else "sequential"


def open_pipeline(source: StockSource) -> tuple[Any, list[str]]:
    """Load a pipeline and put it on its device.

    Returns:
        The pipeline, and sentences about how it is kept.

    Raises:
        ValueError: if its files or a LoRA cannot be loaded, naming which.
    """
    import diffusers

    device = resolve_device(source.device)
    dtype = resolve_dtype(source.dtype, device)
    more = {}
    if source.pipeline_class.traits.decodes_in_fp32:
        decoder = getattr(diffusers, source.index["vae"][1])
        more["vae"] = decoder.from_pretrained(str(source.folder / "vae"), torch_dtype=torch.float32)
    try:
        pipe = diffusers.DiffusionPipeline.from_pretrained(str(source.folder), dtype=dtype, **more)
    except (OSError, ValueError, TypeError, AttributeError, ImportError, RuntimeError) as error:
        raise ValueError(f"pipeline {source.where} cannot be loaded: {error}") from error
    pipe.set_progress_bar_config(disable=True)
    _add_loras(pipe, source.loras)
    if source.attention_backend is not None:
        _on_denoisers(pipe, "set_attention_backend", source.attention_backend)
    notices = _place(pipe, source, device)
    if source.compiled:
        _on_denoisers(pipe, "compile_repeated_blocks")
    return pipe, notices


def _place(pipe: Any, source: StockSource, device: torch.device) -> list[str]:
    if device.type != "cuda":
        pipe.to(device)
        return []
    free = torch.cuda.mem_get_info(device)[0] if source.vram is None else source.vram * 2**30
    offload = choose_offload(source.weight_bytes(), free)
    if offload == "none":
        pipe.to(device)
        return []
    if offload == "model":
        pipe.enable_model_cpu_offload(device=device)
        return ["the components are moved to the GPU one at a time: all together they do not fit"]
    pipe.enable_sequential_cpu_offload(device=device)
    return ["the layers are moved to the GPU one at a time, which is slow: the largest component does not fit"]


def _add_loras(pipe: Any, loras: Sequence[str]) -> None:
    names, scales = [], []
    for number, given in enumerate(loras):
        path, colon, scale = given.rpartition(":")
        path, scale = (path, scale) if colon and _is_number(scale) else (given, "1")
        if not hasattr(pipe, "load_lora_weights"):
            raise ValueError(f"lora cannot be loaded: {type(pipe).__name__} of diffusers takes none")
        try:
            pipe.load_lora_weights(path, adapter_name=f"lora{number}")
        except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
            raise ValueError(f"lora {path} cannot be loaded: {error}") from error
        names.append(f"lora{number}")
        scales.append(float(scale))
    if names:
        pipe.set_adapters(names, scales)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _on_denoisers(pipe: Any, method: str, *args: Any) -> None:
    from forecasting.session import find_denoisers

    for denoiser in find_denoisers(pipe):
        if not hasattr(denoiser, method):
            raise ValueError(f"{method} cannot be used: {type(denoiser).__name__} of diffusers does not have it")
        getattr(denoiser, method)(*args)
