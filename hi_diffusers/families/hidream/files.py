"""Finds a model's files, and checks them as far as possible without reading weights."""

import contextlib
import hashlib
import math
from collections.abc import Callable, Container, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeGuard

from hi_diffusers.console import require
from hi_diffusers.families.hidream.layers import transformer_layers
from hi_diffusers.families.hidream.presets import HiDreamPreset
from hi_diffusers.preset import ModelPreset
from hi_diffusers.weights.headers import check_shapes, check_transformer_file
from hi_diffusers.weights.hub import download, find
from hi_diffusers.weights.identity import add_folder
from hi_diffusers.weights.lora import check_lora
from hi_diffusers.weights.source import ModelFiles, ModelSource, Parts, find_folder, is_repo, read_json
from hi_diffusers.weights.whole import TOKENIZER_FILES, check_component, check_config, check_tokenizer, check_weights

TRANSFORMER_CLASS = "HiDreamImageTransformer2DModel"
ENCODERS = tuple(f"{kind}{number}" for kind in ("text_encoder", "tokenizer") for number in ("", "_2", "_3", "_4"))
LLAMA = ("text_encoder_4", "tokenizer_4")
TRANSFORMER_WEIGHTS = ("transformer/*.safetensors", "transformer/*.index.json")
GPTQ_V1 = {"quant_method": "gptq", "bits": 4, "checkpoint_format": "gptq"}
# Components that are not loaded.
PARTS: dict[Parts, tuple[str, ...]] = {"all": (), "encoders": ("vae", "transformer"), "drawing": ENCODERS}


def stated_quantization(preset: ModelPreset, source: ModelSource) -> str:
    """The quantization of the files on this disk, else the one that is asked for."""
    if source.transformer is not None:
        return "none"
    folder = find_folder(preset, source)
    config = folder / "transformer" / "config.json" if folder else None
    stated = config is not None and config.is_file() and "quantization_config" in read_json(config)
    return "nf4" if stated else source.quantization


def stated_llama(preset: ModelPreset, source: ModelSource) -> str:
    """The quantization of Llama, "plain", "nf4" or "gptq", from its files on this disk, else from its name."""
    name = source.llama
    folder = find_folder(preset, source) if name is None else None
    if folder is not None and (folder / LLAMA[0] / "config.json").is_file():
        found: Path | None = folder / LLAMA[0]
    else:
        name = name or _llama_repo(preset, source.quantization)
        found = Path(name) if name and Path(name).is_dir() else find(name) if name and is_repo(name) else None
    if found is not None and (found / "config.json").is_file():
        settings = read_json(found / "config.json").get("quantization_config")
        if not isinstance(settings, dict):
            return "plain"
        return "gptq" if settings.get("quant_method") == "gptq" else "nf4"
    return "gptq" if "gptq" in (name or "").lower() else "plain"


def _llama_repo(preset: ModelPreset, quantization: str) -> str | None:
    """The hub repository of the model's Llama; None if Llama is in the model's own folder."""
    assert isinstance(preset, HiDreamPreset), preset
    return preset.gptq_llama_repo if quantization == "nf4" else preset.llama_repo


def locate(preset: ModelPreset, source: ModelSource, parts: Parts = "all", *, offline: bool = False) -> ModelFiles:
    """Find a model's files, download missing ones, and check them.

    Args:
        preset: the model.
        source: the model's files.
        parts: as in `load_pipeline`.
        offline: raise ValueError instead of downloading.

    Raises:
        ValueError: in one sentence, what is missing or wrong and what to do.
    """
    repo = source.repo(preset)
    if source.revision is not None and repo is None:
        raise ValueError(f"revision {source.revision} has no effect, since the files come from a folder: drop revision")

    def is_outside(folder: Path) -> bool:
        return parts != "drawing" and (source.llama is not None or not (folder / LLAMA[0]).is_dir())

    def check(folder: Path) -> None:
        absent = {*PARTS[parts], *(LLAMA if is_outside(folder) else ())}
        _check_pipeline(folder, preset, parts, absent, needs_transformer=source.transformer is None)

    if source.quantization == "nf4":
        require("bitsandbytes", "quantization", "quantization nf4")
    if source.loras and parts != "encoders":
        require("peft", "lora", "lora")
    transformer = _locate_transformer(source) if parts != "encoders" else None
    loras = tuple(_locate_lora(one, offline) for one in source.loras) if parts != "encoders" else ()
    if repo is not None:
        absent = () if source.transformer is None else TRANSFORMER_WEIGHTS
        folder = _fetch(repo, source.revision, check, offline, absent=absent)
    else:
        found = find_folder(preset, source)
        if found is None:
            raise ValueError(
                "model_path must be a folder in the diffusers layout, or a hub repository's owner/name, got"
                f" {source.model_path or preset.folder}: there is no such folder"
            )
        folder = found
        check(folder)
    if transformer is not None and transformer.suffix == ".safetensors":
        check_shapes(transformer, transformer_shapes(folder))
    for lora, _ in loras:
        check_lora(lora, transformer_shapes(folder))
    llama = _locate_llama(preset, source, folder, offline) if is_outside(folder) else None
    return ModelFiles(folder, llama, transformer, loras)


def _locate_transformer(source: ModelSource) -> Path | None:
    """The transformer's single file; None if the source names none."""
    if source.transformer is None:
        return None
    path = Path(source.transformer)
    if not path.is_file():
        raise ValueError(f"transformer must be a .safetensors or .gguf file, got {path}: there is no such file")
    check_transformer_file(path)
    return path


def _locate_lora(text: str, offline: bool) -> tuple[Path, float]:
    """Find the file and the scale of a LoRA."""
    path, scale = _path_and_scale(text)
    owner, _, rest = str(path).partition("/")
    repo, _, file = rest.partition("/")
    if not path.exists() and path.suffix == ".safetensors" and file and is_repo(f"{owner}/{repo}"):
        path = _fetch(f"{owner}/{repo}", None, lambda folder: None, offline) / file
    elif not path.exists() and is_repo(str(path)):
        path = _fetch(str(path), None, lambda folder: None, offline)
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if len(files) != 1 or not files[0].is_file() or files[0].suffix != ".safetensors":
        found = f"{len(files)} such files" if path.is_dir() else "no such file"
        raise ValueError(
            f"lora must be a .safetensors file, or a folder or repository that holds one, got {path}: {found}"
        )
    if not math.isfinite(scale):
        raise ValueError(f"lora {path} must have a finite scale, got {scale}")
    return files[0], scale


def _path_and_scale(lora: str) -> tuple[Path, float]:
    """The parts of "PATH:SCALE"; without a number at the end the scale is 1."""
    name, _, scale = lora.rpartition(":")
    try:
        return (Path(name), float(scale)) if name else (Path(lora), 1.0)
    except ValueError:
        return Path(lora), 1.0


def loras_on_disk(source: ModelSource) -> list[Path]:
    """The LoRA files that need not be downloaded."""
    paths = [_path_and_scale(one)[0] for one in source.loras]
    found = [sorted(path.glob("*.safetensors"))[:1] if path.is_dir() else [path] for path in paths]
    return [path for files in found for path in files if path.is_file()]


def _fetch(
    repo: str,
    revision: str | None,
    check: Callable[[Path], None],
    offline: bool,
    absent: Sequence[str] = (),
    gated_hint: str = "",
) -> Path:
    """A repository's folder that passes `check`; it is downloaded if this disk has none or only a part of it."""
    folder = find(repo, revision, absent=absent)
    if folder is not None:
        with contextlib.suppress(ValueError):
            check(folder)
            return folder
    if offline:
        raise ValueError(f"{repo} is not on this disk, or only in part")
    folder = download(repo, revision, absent=absent, gated_hint=gated_hint)
    check(folder)
    return folder


def _locate_llama(preset: ModelPreset, source: ModelSource, folder: Path, offline: bool) -> Path:
    wanted = source.llama or _llama_repo(preset, source.quantization)
    if wanted is None:
        raise ValueError(
            f"{folder / LLAMA[0]} is missing: the model's folder is incomplete; give another Llama with --llama"
        )

    def check(llama: Path) -> None:
        _check_llama(llama, folder)
        if not any((llama / file).is_file() for file in TOKENIZER_FILES):
            raise ValueError(f"{llama} holds no tokenizer.json: the folder must hold the tokenizer and the weights")
        embedded = check_config(llama).get("vocab_size")
        check_tokenizer(llama, embedded if isinstance(embedded, int) else None)
        check_weights(llama)

    if Path(wanted).is_dir():
        check(Path(wanted))
        return Path(wanted)
    if not is_repo(wanted):
        raise ValueError(f"llama must be a folder or a hub repository's owner/name, got {wanted!r}")
    ungated = _llama_repo(preset, "nf4")
    hint = f"; --llama {ungated} needs no account" if ungated not in (None, wanted) else ""
    return _fetch(wanted, None, check, offline, gated_hint=hint)


def _check_pipeline(
    folder: Path, preset: ModelPreset, parts: Parts, absent: Container[str], needs_transformer: bool
) -> None:
    """Raise ValueError unless a folder is a pipeline of this model with all components that are not in `absent`.

    Args:
        needs_transformer: whether the transformer's weights must be there, not only its configuration.
    """
    index = read_json(folder / "model_index.json")
    if index.get("_class_name") != "HiDreamImagePipeline":
        raise ValueError(f"{folder} holds {index.get('_class_name', 'no pipeline')}, not a HiDreamImagePipeline")
    for name, entry in index.items():
        if name in absent or name.startswith("_") or not isinstance(entry, list):
            continue
        if len(entry) != 2:
            raise ValueError(f"{folder / 'model_index.json'} must name library and class of {name}, got {entry!r:.60}")
        if entry[0] is not None:
            check_component(folder / name, weights=needs_transformer or name != "transformer")
    if parts != "drawing":
        _check_tokenizers(folder, absent)
        _check_nf4(read_json(folder / "text_encoder_3" / "config.json"), folder / "text_encoder_3")
        if LLAMA[0] not in absent:
            _check_llama(folder / LLAMA[0], folder)
    if parts != "encoders":
        _check_transformer(read_json(folder / "transformer" / "config.json"), preset, folder)


def _check_nf4(config: dict[str, object], folder: Path) -> None:
    """Raise ValueError for weights that are neither plain nor in nf4."""
    settings = config.get("quantization_config")
    if settings is None:
        return
    if not (isinstance(settings, dict) and is_nf4(settings)):
        raise ValueError(f"{folder} must hold plain or nf4 weights, but its config.json says {settings}")
    require("bitsandbytes", "quantization", str(folder))


def is_nf4(settings: dict[str, Any]) -> bool:
    """Whether a quantization_config describes bitsandbytes' nf4."""
    return (settings.get("quant_method"), settings.get("bnb_4bit_quant_type")) == ("bitsandbytes", "nf4")


def _check_llama(llama: Path, folder: Path) -> None:
    """Raise ValueError for a Llama that the transformer in `folder` was not trained with."""
    config = read_json(llama / "config.json")
    if config.get("model_type") != "llama":
        raise ValueError(f"{llama} holds a model of type {config.get('model_type')}, not a Llama")
    quantized = config.get("quantization_config")
    if quantized is not None:
        check_llama_format(quantized, llama)
    transformer = read_json(folder / "transformer" / "config.json")
    layers, widths = transformer.get("llama_layers"), transformer.get("caption_channels")
    found = (config.get("num_hidden_layers"), config.get("hidden_size"))
    if not isinstance(layers, list) or not all(isinstance(one, int) for one in layers):
        raise ValueError(f"{folder / 'transformer' / 'config.json'} must list llama_layers, got {str(layers)[:60]}")
    if isinstance(found[0], int) and layers and max(layers) >= found[0]:
        raise ValueError(f"{llama} has {found[0]} layers, but the transformer reads layer {max(layers)} of its Llama")
    if isinstance(widths, list) and widths[-1] != found[1]:
        raise ValueError(f"{llama} is {found[1]} wide, but the transformer reads states of {widths[-1]} channels")


def check_llama_format(settings: object, folder: Path) -> None:
    """Raise ValueError unless a Llama is in 4-bit GPTQ, format v1, or in bitsandbytes' nf4.

    Args:
        settings: the quantization_config in config.json.

    Raises:
        ValueError: naming the format that was found.
    """
    if not isinstance(settings, dict):
        raise ValueError(f"{folder} must name its quantization, but its config.json says {str(settings)[:60]}")
    if is_nf4(settings):
        require("bitsandbytes", "quantization", str(folder))
        return
    found = {"checkpoint_format": "gptq"} | {name: settings[name] for name in GPTQ_V1 if name in settings}
    if found != GPTQ_V1 or not isinstance(settings.get("group_size"), int):
        raise ValueError(f"{folder} must hold GPTQ weights of 4 bits in format v1, or nf4, or plain ones, got {found}")


def _check_tokenizers(folder: Path, absent: Container[str]) -> None:
    """Raise ValueError for vocabularies that do not fit the text encoders."""
    for number in ("", "_2", "_3", "_4"):
        if f"tokenizer{number}" not in absent:
            embedded = read_json(folder / f"text_encoder{number}" / "config.json").get("vocab_size")
            check_tokenizer(folder / f"tokenizer{number}", embedded if isinstance(embedded, int) else None)


def _check_transformer(config: dict[str, object], preset: ModelPreset, folder: Path) -> None:
    if config.get("_class_name") != TRANSFORMER_CLASS:
        raise ValueError(f"{folder / 'transformer'} holds {config.get('_class_name')}, not a {TRANSFORMER_CLASS}")
    _check_nf4(config, folder / "transformer")
    resolution, vae = config.get("max_resolution"), read_json(folder / "vae" / "config.json")
    for name, lowest in (("scaling_factor", 1e-6), ("shift_factor", -math.inf)):
        value = vae.get(name)
        if value is not None and not (isinstance(value, int | float) and lowest < value < math.inf):
            raise ValueError(f"{folder / 'vae' / 'config.json'} has the invalid {name} {value}")
    blocks = vae.get("block_out_channels")
    factor = 2 ** (len(blocks) - 1) if isinstance(blocks, list) else 0
    area = factor**2 * math.prod(resolution) if _is_size(resolution) else 0
    if area != preset.area:
        raise ValueError(
            f"{folder} is not {preset.name}, which draws {preset.area} pixels: its max_resolution is {resolution}, with"
            f" {factor} pixels per latent pixel"
        )


def _is_size(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and len(value) == 2 and all(isinstance(side, int) and side > 0 for side in value)


def transformer_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every weight of the transformer that a pipeline's folder describes.

    Raises:
        ValueError: if its configuration is not a transformer's.
    """
    config = check_config(folder / "transformer")
    try:
        layers = transformer_layers(config)
    except (TypeError, ValueError, LookupError, OverflowError) as error:
        raise ValueError(f"{folder / 'transformer' / 'config.json'} is not a transformer's: {error}") from error
    return {name: shape for layer in layers for name, shape in layer.named()}


def encoders_fingerprint(files: ModelFiles, quantization: str) -> str:
    """A hash of a model's text encoders, its whole tokenizers, and the version that runs them; 16 hex digits."""
    digest = hashlib.sha256(f"1 {version('transformers')}{'' if quantization == 'none' else quantization}".encode())
    for part in sorted(files.folder.glob("text_encoder*")):
        add_folder(digest, part)
    for path in sorted(path for path in files.folder.glob("tokenizer*/*") if path.is_file()):
        digest.update(f"{path.parent.name}/{path.name}".encode() + path.read_bytes())
    if files.encoder is not None:
        add_folder(digest, files.encoder)
        for path in sorted(path for path in files.encoder.glob("*token*") if path.is_file()):
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]
