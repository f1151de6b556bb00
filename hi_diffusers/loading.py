"""From a preset to a pipeline on a device. Whatever can be told without reading weights is told before."""

import json
import math
from pathlib import Path

import torch

from hi_diffusers.identity import ModelIdentity, find_calibrations, fingerprint
from hi_diffusers.models.transformer import HiDreamImageTransformer2DModel
from hi_diffusers.pipelines.hidream_image import HiDreamImagePipeline
from hi_diffusers.presets import ModelPreset, bundled_folder, find_preset

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
ENCODERS = tuple(f"{kind}{number}" for kind in ("text_encoder", "tokenizer") for number in ("", "_2", "_3", "_4"))
# What of the components is not loaded.
PARTS = {"all": (), "encoders": ("vae", "transformer"), "drawing": ENCODERS}
# A component's folder must hold one of these; what is not named here is a model and holds config.json.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "spiece.model")
DESCRIPTIONS = {"scheduler": ("scheduler_config.json",), "tokenizer": TOKENIZER_FILES}


def load_pipeline(
    model: str = "nano",
    *,
    device: str = "auto",
    dtype: str = "auto",
    model_path: str | Path | None = None,
    calibration_dir: str | Path | None = None,
    parts: str = "all",
) -> HiDreamImagePipeline:
    """Load a model, ready to draw.

    Args:
        model: name of a preset.
        device: "auto", "cpu", "cuda", "cuda:1", "mps"; auto takes CUDA, then MPS, then the CPU.
        dtype: "auto", "fp32", "bf16", "fp16"; auto is bf16 on CUDA and fp32 elsewhere.
        model_path: folder of the model in the diffusers layout, instead of the preset's own files.
        calibration_dir: where calibrations are looked up after the model's own; None is the user's cache folder.
        parts: "all", "encoders" (it can encode prompts only), or "drawing" (it draws from embeddings only).

    Returns:
        The pipeline, with the attributes `preset` and, where it can draw, `identity` and `calibrations`.

    Raises:
        ValueError: if the device or dtype is not to be had, or the files are missing or are another model's.
    """
    preset = find_preset(model)
    target = resolve_device(device)
    folder = model_folder(preset, model_path, parts)
    absent = dict.fromkeys(PARTS[parts])
    pipe = HiDreamImagePipeline.from_pretrained(folder, dtype=resolve_dtype(dtype, target), **absent)
    pipe.to(target)
    pipe.set_progress_bar_config(disable=True)
    pipe.preset = preset
    if parts != "encoders":
        pipe.identity = ModelIdentity(preset.name, fingerprint(folder / "transformer"))
        pipe.calibrations = find_calibrations(preset, folder, calibration_dir)
    return pipe


def resolve_device(name: str) -> torch.device:
    """The device of that name.

    Raises:
        ValueError: if this machine does not have it.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device must be auto, cpu, cuda or mps, got {name!r}") from None
    available = {
        "cpu": True,
        "cuda": torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count(),
        "mps": torch.backends.mps.is_available(),
    }
    if not available.get(device.type, False):
        raise ValueError(f"device must be one that this machine has, got {name!r}: torch sees no such device")
    return device


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of the weights.

    Raises:
        ValueError: if there is no such dtype.
    """
    if name == "auto":
        name = "bf16" if device.type == "cuda" else "fp32"
    if name not in DTYPES:
        raise ValueError(f"dtype must be one of auto, {', '.join(DTYPES)}, got {name!r}")
    return DTYPES[name]


def model_folder(preset: ModelPreset, model_path: str | Path | None = None, parts: str = "all") -> Path:
    """The folder of a model's files, checked as far as that goes without reading weights.

    Arguments as in `load_pipeline`.

    Raises:
        ValueError: in one sentence, what is missing or wrong and what to do.
    """
    if model_path is None and not preset.is_bundled:
        raise ValueError(
            f"model_type {preset.name} needs its files: hf download {preset.repo} --local-dir FOLDER, put"
            f" {preset.llama_repo} into FOLDER/text_encoder_4 and FOLDER/tokenizer_4, and give --model_path FOLDER"
        )
    folder = bundled_folder() if model_path is None else Path(model_path)
    if not folder.is_dir():
        raise ValueError(f"model_path must be a folder in the diffusers layout, got {folder}: there is no such folder")
    index = _read_json(folder / "model_index.json")
    if index.get("_class_name") != "HiDreamImagePipeline":
        raise ValueError(f"{folder} holds {index.get('_class_name', 'no pipeline')}, not a HiDreamImagePipeline")
    for name, entry in index.items():
        if name not in PARTS[parts] and not name.startswith("_") and isinstance(entry, list) and entry[0] is not None:
            _check_component(folder, name)
    if parts != "encoders":
        _check_transformer(_read_json(folder / "transformer" / "config.json"), preset, folder)
    return folder


def _read_json(path: Path) -> dict[str, object]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} is missing: the model's folder is incomplete") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no JSON object")
    return content


def _check_component(folder: Path, name: str) -> None:
    part = folder / name
    if not part.is_dir():
        raise ValueError(f"{part} is missing: the model's folder is incomplete")
    kind = name.split("_")[0]
    descriptions = DESCRIPTIONS.get(kind, ("config.json",))
    if not any((part / file).is_file() for file in descriptions):
        raise ValueError(f"{part} holds no {' or '.join(descriptions)}: the model's folder is incomplete")
    if kind in DESCRIPTIONS:
        return
    for index in part.glob("*.safetensors.index.json"):
        shards = _read_json(index).get("weight_map")
        for shard in sorted(set(shards.values())) if isinstance(shards, dict) else ():
            if not (part / str(shard)).is_file():
                raise ValueError(f"{part / str(shard)} is missing, which {index.name} names: the folder is incomplete")
    files = list(part.glob("*.safetensors"))
    if not files:
        raise ValueError(
            f"{part} holds no .safetensors file: the model's folder is incomplete, or its weights are pickled"
        )
    for path in files:
        _check_safetensors(path)


def _check_safetensors(path: Path) -> None:
    """A truncated or foreign file shows in its header: its size must be what the header says."""
    size = path.stat().st_size
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        try:
            header = json.loads(stream.read(length)) if 8 + length <= size else None
            end = max(entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")
        except (AttributeError, KeyError, TypeError, ValueError):
            raise ValueError(f"{path} is not a complete safetensors file: its header cannot be read") from None
    if size != 8 + length + end:
        raise ValueError(f"{path} is not a complete safetensors file: {size} bytes, its header says {8 + length + end}")


def _check_transformer(config: dict[str, object], preset: ModelPreset, folder: Path) -> None:
    expected = HiDreamImageTransformer2DModel.__name__
    if config.get("_class_name") != expected:
        raise ValueError(f"{folder / 'transformer'} holds {config.get('_class_name')}, not a {expected}")
    resolution = config.get("max_resolution")
    blocks = _read_json(folder / "vae" / "config.json").get("block_out_channels")
    factor = 2 ** (len(blocks) - 1) if isinstance(blocks, list) else 0
    area = factor**2 * math.prod(resolution) if _is_size(resolution) else 0
    if area != preset.area:
        raise ValueError(
            f"{folder} is not {preset.name}, which draws {preset.area} pixels: its max_resolution is {resolution}, with"
            f" {factor} pixels a latent pixel"
        )


def _is_size(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(isinstance(side, int) and side > 0 for side in value)
