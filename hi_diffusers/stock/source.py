"""Where a pipeline of diffusers is, and how it is opened."""

import contextlib
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from cache_functions import CalibrationShelf
from hi_diffusers.console import one_line
from hi_diffusers.request.placement import compile_blocks, resolve_device, resolve_dtype
from hi_diffusers.stock.pipeline_class import PUBLISHED, PipelineClass, PublishedModel
from hi_diffusers.weights.headers import safetensors_header
from hi_diffusers.weights.hub import FILES, download, find
from hi_diffusers.weights.identity import add_file, add_folder, default_calibration_dir, file_fingerprint
from hi_diffusers.weights.source import read_json
from hi_diffusers.weights.whole import check_component

INDEX = "model_index.json"
VARIANTS = ("*.fp16.*", "*.fp16-*", "*.non_ema.*")
"""Second copies of weights in other precision."""
NOT_MODELS = ("processor", "feature_extractor", "image_processor", "guider", "text_processor")
"""Components that have no weights; others are schedulers, tokenizers and models."""
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
    def name(self) -> str:
        """What it is called in metadata and file names."""
        return one_line(Path(self.where).resolve().name) if self.is_local else self.published.repo

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
            if self.revision is not None:
                raise ValueError(f"revision has no effect on a folder, got {self.revision!r} with {self.where}")
            if not path.is_file():
                raise ValueError(f"pipeline must be a folder of diffusers, got {self.where}, which has no {INDEX}")
            return _checked_index(path)
        repo = self.published.repo
        folder = find(repo, self.revision, (INDEX,)) or download(repo, self.revision, (INDEX,))
        if not (folder / INDEX).is_file():
            raise ValueError(f"pipeline must be a repository of diffusers, got {repo}, which has no {INDEX}")
        return _checked_index(folder / INDEX)

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
            self._check_components(Path(self.where))
            return Path(self.where)
        repo, kinds = self.published.repo, (*FILES, "*.jinja")
        parts = [name for name, value in self.index.items() if isinstance(value, list) and value[0] is not None]
        files = (INDEX, *(f"{name}/{kind}" for name in parts for kind in kinds))  # not a second copy beside the folders
        found = find(repo, self.revision, files, VARIANTS)
        if found is not None:
            with contextlib.suppress(ValueError):  # fetched in part: the rest is downloaded
                self._check_components(found)
                return found
        found = download(repo, self.revision, files, VARIANTS)
        self._check_components(found)
        return found

    def _check_components(self, folder: Path) -> None:
        """Raise ValueError if a component lacks its configuration, its vocabulary or its weights."""
        for name, value in self.index.items():
            if not isinstance(value, list) or value[0] is None:
                continue
            if name.startswith(NOT_MODELS):
                if not (folder / name).is_dir():
                    raise ValueError(f"{folder / name} is missing: the model's folder is incomplete")
            else:
                check_component(folder / name, weights=True)

    def default(self, option: str) -> Any:
        """An option's value where it is not given: the published one, else the pipeline's own."""
        return self.published.options.get(option, self.pipeline_class.default(option))

    def check(self) -> None:
        """Raise ValueError for a class that diffusers does not have, and for files that cannot be had."""
        _ = self.pipeline_class, self.folder

    def part(self, name: str) -> Path:
        """The folder of a component's configuration; of a repository that alone is fetched."""
        if self.is_local:
            return Path(self.where) / name
        repo, files = self.published.repo, (f"{name}/*.json",)
        return (find(repo, self.revision, files) or download(repo, self.revision, files)) / name

    def denoiser_folders(self) -> list[Path]:
        """The folders of the networks that are called at every step."""
        return [
            self.folder / name
            for name, value in sorted(self.index.items())
            if name.startswith(("transformer", "unet")) and isinstance(value, list) and value[0] is not None
        ]

    @cached_property
    def files_fingerprint(self) -> str:
        """A hash over all files of the pipeline, 16 hexadecimal digits; of weights size, first and last MiB."""
        digest = hashlib.sha256()
        for path in sorted(self.folder.glob("*/*")):
            if path.is_file() and path.parent.name in self.index:
                digest.update(str(path.relative_to(self.folder)).encode())
                add_file(digest, path)
        return digest.hexdigest()[:16]

    @cached_property
    def lora_hashes(self) -> list[str]:
        """The LoRAs: hash, or repository, and scale."""
        found = []
        for given in self.loras:
            path, scale = split_lora(given)
            file = Path(path)
            name = file_fingerprint(file) if file.is_file() else path
            found.append(f"{name}:{scale:g}")
        return found

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
        pipe = diffusers.DiffusionPipeline.from_pretrained(
            str(source.folder), dtype=dtype, use_safetensors=True, **more
        )
        _check_keys(pipe, source.folder)
    except Exception as error:  # libraries raise anything for files that they do not expect
        raise ValueError(f"pipeline {source.where} cannot be loaded: {type(error).__name__}: {error}") from error
    pipe.set_progress_bar_config(disable=True)
    _add_loras(pipe, source.loras)
    if source.attention_backend is not None:
        for denoiser in _denoisers_with(pipe, "set_attention_backend"):
            denoiser.set_attention_backend(source.attention_backend)
    notices = _place(pipe, source, device)
    if source.compiled:
        for denoiser in _denoisers_with(pipe, "compile_repeated_blocks"):
            compile_blocks(denoiser)
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
        path, scale = split_lora(given)
        if not hasattr(pipe, "load_lora_weights"):
            raise ValueError(f"lora cannot be loaded: {type(pipe).__name__} of diffusers takes none")
        try:
            pipe.load_lora_weights(path, adapter_name=f"lora{number}", use_safetensors=True)
        except Exception as error:  # libraries raise anything for files that they do not expect
            raise ValueError(f"lora {path} cannot be loaded: {error}") from error
        names.append(f"lora{number}")
        scales.append(scale)
    if names:
        pipe.set_adapters(names, scales)


def split_lora(given: str) -> tuple[str, float]:
    """The file, folder or repository of a LoRA, and its scale.

    Raises:
        ValueError: for a scale that is no number.
    """
    path, colon, scale = given.rpartition(":")
    if not colon or "/" in scale or "\\" in scale:
        return given, 1.0
    try:
        number = float(scale)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"lora must be FILE, FOLDER or owner/name with a scale behind a colon, got {given!r}")
    return path, number


def _check_keys(pipe: Any, folder: Path) -> None:
    """Raise ValueError if a network of diffusers' has other weights than its files.

    Files with more layers than the configuration says would be cut in silence. (Text encoders are not compared:
    transformers renames what it loads.)
    """
    from diffusers import ModelMixin

    for name, network in pipe.components.items():
        if not isinstance(network, ModelMixin) or getattr(network.config, "quantization_config", None):
            continue
        held = {key for path in (folder / name).glob("*.safetensors") for key in safetensors_header(path)}
        wanted = set(network.state_dict())
        for key in sorted((held - {"__metadata__"}) ^ wanted):
            where = "is not in its files" if key in wanted else "is in its files and not in its configuration"
            raise ValueError(f"{folder / name}: {key} {where}")


def _checked_index(path: Path) -> dict[str, Any]:
    """The content of model_index.json; raises ValueError if a component is not [library, class]."""
    index = read_json(path)
    for name, value in index.items():
        is_pair = (
            isinstance(value, list) and len(value) == 2 and all(one is None or isinstance(one, str) for one in value)
        )
        if not name.startswith("_") and isinstance(value, list | dict) and not is_pair and name != "id2label":
            raise ValueError(f"{path} must name library and class of {name[:60]}, got {str(value)[:60]}")
    if not isinstance(index.get("scheduler"), list):
        raise ValueError(f"{path} names no scheduler: its pipeline cannot be drawn here")
    return index


def _denoisers_with(pipe: Any, method: str) -> list[Any]:
    from forecasting.session import find_denoisers

    denoisers = find_denoisers(pipe)
    for denoiser in denoisers:
        if not hasattr(denoiser, method):
            raise ValueError(f"{method} cannot be used: {type(denoiser).__name__} of diffusers does not have it")
    return denoisers
