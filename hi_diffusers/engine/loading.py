"""Loads a model by its name, after checks that read no weights."""

import gc
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from cache_functions import CalibrationShelf
from hi_diffusers.families.family import Model
from hi_diffusers.families.table import find_family, find_preset
from hi_diffusers.preset import ModelPreset
from hi_diffusers.request.placement import Offload, Placement, resolve_device, resolve_dtype
from hi_diffusers.weights.fp8 import multiplies_fp8
from hi_diffusers.weights.identity import ModelIdentity, find_calibrations
from hi_diffusers.weights.source import ModelFiles, ModelSource, Parts


def load_pipeline(
    model: str = "nano",
    *,
    device: str = "auto",
    dtype: str = "auto",
    model_path: str | Path | None = None,
    revision: str | None = None,
    llama: str | Path | None = None,
    quantization: str = "none",
    transformer: str | Path | None = None,
    loras: Sequence[str] = (),
    calibration_dir: str | Path | None = None,
    parts: Parts = "all",
    offload: Offload = "none",
    tiled: bool = False,
    compiled: bool = False,
    fp8: bool = False,
    attention_backend: str | None = None,
) -> Model:
    """Load a model, ready to draw; missing files are downloaded.

    Args:
        model: name of a preset.
        device: "auto", "cpu", "cuda", "cuda:1", "mps"; auto takes CUDA, then MPS, then the CPU.
        dtype: "auto", "fp32", "bf16", "fp16"; auto is bf16 on CUDA and fp32 elsewhere.
        model_path, revision, llama, quantization, transformer, loras: see `ModelSource`.
        calibration_dir: folder searched for calibrations before the model's own; None is the user's cache folder.
        parts: "all", "encoders" (it can encode prompts only), or "drawing" (it draws from embeddings only).
        offload: "none"; "model" keeps each component in host memory while it does not work, CUDA only; "group" does so
            with each layer, which is slower.
        tiled: decode pictures in tiles, which needs less memory.
        compiled: compile attention and feed-forward, which takes a minute before the first picture.
        fp8: let the transformer's blocks multiply in fp8; see `hi_diffusers.weights.fp8`.
        attention_backend: attention backend of diffusers, such as "flash"; None is torch's choice.

    Returns:
        The pipeline. Its `preset` and, if it can draw, its `identity` and `calibrations` are set.

    Raises:
        ValueError: if the device or dtype is not available, or the files are missing or another model's.
    """
    source = ModelSource(_text(model_path), revision, _text(llama), quantization, _text(transformer), tuple(loras))
    placement = Placement(
        device=device,
        dtype=dtype,
        offload=offload,
        tiled=tiled,
        compiled=compiled,
        fp8=fp8,
        attention_backend=attention_backend,
    )
    preset = find_preset(model)
    check_weights(preset, source, placement)
    files = find_family(preset).locate(preset, source, parts)
    calibrations = None if parts == "encoders" else find_calibrations(preset, source, calibration_dir)
    return load_files(preset, source, files, placement, calibrations, parts)


def load_files(
    preset: ModelPreset,
    source: ModelSource,
    files: ModelFiles,
    placement: Placement,
    calibrations: CalibrationShelf | None,
    parts: Parts = "all",
) -> Model:
    """Load files that were found; encoders alone are put on the placement's `encoder_device`.

    Args:
        preset, source: the requested model and files.
        files: the files that `Family.locate` found for these parts.
        placement: where the model is kept, and how it computes.
        calibrations: where the model's calibrations are; None: nowhere.
        parts: as in `load_pipeline`.

    Raises:
        ValueError: if the device or dtype is not available, or the files are another model's.
    """
    if parts == "encoders" and placement.encoder_device is not None:
        dtype = placement.dtype
        if dtype == "auto":  # as on the device that draws, so that the embeddings are the same
            dtype = "bf16" if resolve_device(placement.device).type == "cuda" else "fp32"
        placement = replace(placement, device=placement.encoder_device, dtype=dtype, offload="none")
    model = find_family(preset).load(preset, source, files, placement, parts)
    if parts != "encoders":
        known = calibrations.model if calibrations is not None else None
        model.identity = ModelIdentity.of(preset, files, source.quantization, known)
        model.calibrations = calibrations
    return model


def check_weights(preset: ModelPreset, source: ModelSource, placement: Placement) -> None:
    """Raise ValueError if the weights cannot be used with fp8, compilation or the attention backend."""
    device, quantized = resolve_device(placement.device), find_family(preset).is_quantized(preset, source)
    resolve_dtype(placement.dtype, device)
    if placement.fp8:
        if source.loras or source.transformer is not None or quantized:
            raise ValueError("fp8 needs plain weights: drop lora, transformer and quantization, or drop fp8")
        check_fp8(device, placement.compiled)
    if placement.compiled and device.type == "cpu" and quantized:
        raise ValueError("compiled blocks of quantized weights do not work on a CPU: drop compile")
    if placement.attention_backend is not None:
        check_attention_backend(placement.attention_backend)


def check_placement(placement: Placement) -> list[str]:
    """Raise ValueError for devices and backends that this machine does not have, before weights are read.

    Returns:
        Sentences about settings that have no effect or are slow.

    Raises:
        ValueError: naming the device or the attention backend.
    """
    device, notices = resolve_device(placement.device), []
    if placement.fp8:
        check_fp8(device, placement.compiled)
        if not multiplies_fp8(device):
            notices.append(
                f"fp8 is emulated on this {device.type}, which has no fp8 arithmetic: same rounding error, but slow"
            )
    if placement.encoder_device is not None:
        try:
            same = resolve_device(placement.encoder_device) == device
        except ValueError as error:
            raise ValueError(f"encoder_{error}") from None
        if same:
            notices.append(
                f"encoder_device {placement.encoder_device} has no effect: it is where the pictures are drawn"
            )
    if placement.attention_backend is not None:
        check_attention_backend(placement.attention_backend)
    return notices


def check_fp8(device: torch.device, compiled: bool) -> None:
    """Check that fp8 can be used.

    Raises:
        ValueError: if blocks are compiled or the device is MPS.
    """
    if compiled or device.type == "mps":
        raise ValueError(f"fp8 cannot be combined with {'compile' if compiled else 'device mps'}: drop one of them")


def check_attention_backend(name: str) -> None:
    """Check that diffusers can use an attention backend.

    Raises:
        ValueError: if diffusers does not know the name, or its package is not installed.
    """
    from diffusers.models.attention_dispatch import AttentionBackendName, _check_attention_backend_requirements

    names = [one.value for one in AttentionBackendName if "hub" not in one.value]  # those download code
    if name not in names:
        raise ValueError(f"attention_backend must be one of {', '.join(names)}, got {name!r}")
    try:
        _check_attention_backend_requirements(AttentionBackendName(name))
    except (RuntimeError, ImportError, ValueError) as error:
        raise ValueError(f"attention_backend {name!r} cannot be used here: {error}") from error


def _text(path: str | Path | None) -> str | None:
    return None if path is None else str(path)


def free_memory() -> None:
    """Free the memory of a dropped model, whose modules refer to each other in cycles."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
