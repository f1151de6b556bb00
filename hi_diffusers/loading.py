"""From a preset to a pipeline on a device."""

from collections.abc import Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from transformers import (
    AutoTokenizer,
    BitsAndBytesConfig,
    CLIPTextModelWithProjection,
    LlamaModel,
    PreTrainedTokenizerBase,
    T5EncoderModel,
)

from hi_diffusers.console import say
from hi_diffusers.identity import ModelIdentity, find_calibrations
from hi_diffusers.memory.sizes import TILE
from hi_diffusers.model_files import (
    LLAMA,
    PARTS,
    ModelFiles,
    ModelSource,
    locate,
    read_json,
    stated_quantization,
)
from hi_diffusers.models.fp8 import multiplies_fp8, to_fp8
from hi_diffusers.models.gptq import load_gptq_llama
from hi_diffusers.models.nf4 import Nf4, check_unused, load_nf4
from hi_diffusers.models.single_file import load_single_file
from hi_diffusers.models.transformer import HiDreamImageTransformer2DModel
from hi_diffusers.pipelines.hidream_image import HiDreamImagePipeline
from hi_diffusers.placement import Placement
from hi_diffusers.presets import ModelPreset, find_preset
from hi_diffusers.weight_files import safetensors_header

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


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
    parts: str = "all",
    offload: str = "none",
    tiled: bool = False,
    compiled: bool = False,
    fp8: bool = False,
    attention_backend: str | None = None,
) -> HiDreamImagePipeline:
    """Load a model, ready to draw; what is not on this disk is downloaded.

    Args:
        model: name of a preset.
        device: "auto", "cpu", "cuda", "cuda:1", "mps"; auto takes CUDA, then MPS, then the CPU.
        dtype: "auto", "fp32", "bf16", "fp16"; auto is bf16 on CUDA and fp32 elsewhere.
        model_path, revision, llama, quantization, transformer, loras: see `ModelSource`.
        calibration_dir: where calibrations are looked up before the model's own; None is the user's cache folder.
        parts: "all", "encoders" (it can encode prompts only), or "drawing" (it draws from embeddings only).
        offload: "none"; "model" keeps each component in the host's memory while it does not work, CUDA only; "group"
            each layer, which takes longer.
        tiled: decode pictures in tiles, which takes less memory.
        compiled: compile attention and feed-forward, which takes a minute before the first picture.
        fp8: let the transformer's blocks multiply in fp8; see `hi_diffusers.models.fp8`.
        attention_backend: of diffusers, such as "flash"; None is torch's choice.

    Returns:
        The pipeline, with the attributes `preset` and, where it can draw, `identity` and `calibrations`.

    Raises:
        ValueError: if the device or dtype is not to be had, or the files are missing or are another model's.
    """
    preset = find_preset(model)
    target = resolve_device(device)
    source = ModelSource(_text(model_path), revision, _text(llama), quantization, _text(transformer), tuple(loras))
    if fp8 and (source.loras or source.transformer is not None or stated_quantization(preset, source) != "none"):
        raise ValueError("fp8 rounds plain weights: drop lora, transformer and quantization, or fp8")
    if fp8:
        check_fp8(target, compiled)
    files = locate(preset, source, parts)
    weights = resolve_dtype(dtype, target)
    if compiled and target.type == "cpu" and stated_quantization(preset, source) != "none":
        raise ValueError("compiled blocks of quantized weights do not work on a CPU: drop compile")
    home = torch.device("cpu") if offload == "model" else target if offload == "none" else None
    pipe = _assemble(files, parts, quantization, target, weights, home, fp8)
    if files.loras:
        _add_loras(pipe, files.loras)
    _place(pipe, target, offload)
    if tiled and parts != "encoders":
        pipe.vae.tile_sample_min_size, pipe.vae.tile_latent_min_size = TILE, TILE // pipe.vae_scale_factor
        pipe.vae.enable_tiling()
    if attention_backend is not None and parts != "encoders":
        _set_attention_backend(pipe.transformer, attention_backend)
    if compiled and parts != "encoders":
        # other layers and hooks may break a graph
        plain = not _is_packed(pipe.transformer) and not files.loras and offload == "none"
        pipe.transformer.compile_repeated_blocks(fullgraph=plain)
    pipe.set_progress_bar_config(disable=True)
    pipe.preset, pipe.fp8 = preset, fp8
    if parts != "encoders":
        pipe.identity = ModelIdentity.of(preset, files, quantization)
        pipe.calibrations = find_calibrations(preset, source, calibration_dir)
    return pipe


def load_placed(
    model: str, source: ModelSource, placement: Placement, parts: str = "all", calibration_dir: Path | None = None
) -> HiDreamImagePipeline:
    """`load_pipeline` of a source and a placement; encoders alone go to the placement's own device for them.

    Args:
        model, parts, calibration_dir: as in `load_pipeline`.
        source: where the model's files are.
        placement: where it is kept, and how it computes.

    Raises:
        ValueError: as `load_pipeline` does.
    """
    settings = asdict(placement)
    encoder_device = settings.pop("encoder_device")
    if parts == "encoders" and encoder_device is not None:
        if placement.dtype == "auto":  # embeddings are what they would be where the pictures are drawn
            settings["dtype"] = "bf16" if resolve_device(placement.device).type == "cuda" else "fp32"
        settings |= {"device": encoder_device, "offload": "none"}
    return load_pipeline(model, parts=parts, calibration_dir=calibration_dir, **asdict(source), **settings)


def _assemble(
    files: ModelFiles,
    parts: str,
    quantization: str,
    device: torch.device,
    dtype: torch.dtype,
    home: torch.device | None,
    fp8: bool,
) -> HiDreamImagePipeline:
    """The pipeline with its weights.

    Args:
        device: where it computes.
        home: where each component is put as soon as it is loaded, so that the large ones do not wait for each other
            somewhere else; None leaves them where they were loaded.
    """
    given: dict[str, object] = dict.fromkeys(PARTS[parts])

    def settled(module: torch.nn.Module) -> torch.nn.Module:
        return module if home is None else module.to(home)

    if parts != "encoders":
        transformer = _load_transformer(files, quantization, device, dtype)
        if fp8:
            to_fp8(transformer)
        given["transformer"] = settled(transformer)
        given["vae"] = _whole(AutoencoderKL, files.folder / "vae", torch_dtype=dtype)
    if parts != "drawing":
        llama_folders = [files.llama or files.folder / name for name in LLAMA]
        model, tokenizer = _load_llama(*llama_folders, device, dtype)
        given |= dict(zip(LLAMA, (settled(model), tokenizer), strict=True))
        given["text_encoder_3"] = settled(_load_t5(files.folder / "text_encoder_3", quantization, device, dtype))
        for name in ("text_encoder", "text_encoder_2"):
            given[name] = _whole(CLIPTextModelWithProjection, files.folder / name, dtype=dtype)
    return HiDreamImagePipeline.from_pretrained(files.folder, dtype=dtype, **given)


def _add_loras(pipe: HiDreamImagePipeline, loras: Sequence[tuple[Path, float]]) -> None:
    names = [f"lora{number}" for number in range(len(loras))]
    for name, (path, _) in zip(names, loras, strict=True):
        try:
            pipe.load_lora_weights(path.parent, weight_name=path.name, adapter_name=name)
            if name not in pipe.get_list_adapters().get("transformer", ()):
                raise ValueError("none of its layers is the transformer's")
        except (RuntimeError, ValueError, LookupError, NotImplementedError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()
            raise ValueError(f"lora {path} does not fit this transformer: {reason}") from error
        given = sum(key.endswith(("lora_A.weight", "lora_down.weight")) for key in safetensors_header(path))
        used = sum(name in getattr(module, "lora_A", ()) for module in pipe.transformer.modules())
        if used < given:
            say(f"lora {path}: {given - used} of its {given} layers are not the transformer's, and not used")
    pipe.set_adapters(names, [scale for _, scale in loras])


def load_tokenizers(preset: ModelPreset, source: ModelSource) -> tuple[PreTrainedTokenizerBase, ...]:
    """A model's four tokenizers alone, from files that are on this disk: both CLIPs', T5's, Llama's.

    Raises:
        ValueError: if they are not.
    """
    files = locate(preset, source, offline=True)
    llama = files.llama or files.folder / LLAMA[1]
    folders = (*(files.folder / name for name in ("tokenizer", "tokenizer_2", "tokenizer_3")), llama)
    return tuple(AutoTokenizer.from_pretrained(folder) for folder in folders)


def _is_packed(module: torch.nn.Module) -> bool:
    """Whether weights are quantized; such layers are loaded to where they belong."""
    return any(not parameter.is_floating_point() for parameter in module.parameters())


def _place(pipe: HiDreamImagePipeline, target: torch.device, offload: str) -> None:
    """Put the components where they work, or where they wait."""
    if offload == "none":
        pipe.to(target)
    elif offload == "model":
        pipe.enable_model_cpu_offload(device=target)
    else:
        pipe.enable_group_offload(target, offload_type="leaf_level", use_stream=target.type == "cuda")


def _set_attention_backend(transformer: HiDreamImageTransformer2DModel, name: str) -> None:
    check_attention_backend(name)
    transformer.set_attention_backend(name)


def check_placement(placement: Placement) -> None:
    """Refuse what this machine does not have, before a weight is read; say what has no effect or is slow.

    Raises:
        ValueError: naming the device or the attention backend.
    """
    device = resolve_device(placement.device)
    if placement.fp8:
        check_fp8(device, placement.compiled)
    if placement.fp8 and not multiplies_fp8(device):
        say(f"fp8 is emulated on this {device.type}, which has no such products: it shows the error, and is slow")
    if placement.encoder_device is not None:
        try:
            same = resolve_device(placement.encoder_device) == device
        except ValueError as error:
            raise ValueError(f"encoder_{error}") from None
        if same:
            say(f"encoder_device {placement.encoder_device} has no effect: it is where the pictures are drawn")
    if placement.attention_backend is not None:
        check_attention_backend(placement.attention_backend)


def check_fp8(device: torch.device, compiled: bool) -> None:
    """Refuse what fp8 does not go with.

    Raises:
        ValueError: naming it.
    """
    if compiled or device.type == "mps":
        raise ValueError(f"fp8 does not go with {'compile' if compiled else 'mps'}: drop one of them")


def check_attention_backend(name: str) -> None:
    """Refuse a name that diffusers does not know, or whose package is not installed.

    Raises:
        ValueError: if so.
    """
    from diffusers.models.attention_dispatch import AttentionBackendName, _check_attention_backend_requirements

    names = [one.value for one in AttentionBackendName if "hub" not in one.value]  # those download code
    if name not in names:
        raise ValueError(f"attention_backend must be one of {', '.join(names)}, got {name!r}")
    try:
        _check_attention_backend_requirements(AttentionBackendName(name))
    except (RuntimeError, ImportError, ValueError) as error:
        raise ValueError(f"attention_backend {name!r} cannot be used here: {error}") from error


def save_quantized(pipe: HiDreamImagePipeline, folder: Path) -> None:
    """Write a model that was quantized on loading, without its Llama, so that the next start need not quantize.

    Raises:
        ValueError: if it has drawn on a CPU, see `check_unused`.
    """
    check_unused(pipe.transformer)
    llama = {name: getattr(pipe, name) for name in LLAMA}
    pipe.register_modules(**dict.fromkeys(LLAMA))
    try:
        pipe.save_pretrained(folder)
    finally:
        pipe.register_modules(**llama)


def _text(path: str | Path | None) -> str | None:
    return None if path is None else str(path)


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


def _load_transformer(
    files: ModelFiles, quantization: str, device: torch.device, dtype: torch.dtype
) -> HiDreamImageTransformer2DModel:
    """The transformer, from its folder or a file of its own; in nf4 if its files are or if that is asked for."""
    folder = files.folder / "transformer"
    config = read_json(folder / "config.json")
    stated = config.get("quantization_config")
    if files.transformer is None and stated is None and quantization == "none":
        return _whole(HiDreamImageTransformer2DModel, folder, torch_dtype=dtype)
    settings = Nf4() if stated is None else Nf4.from_config(stated)
    with torch.device("meta"):
        model = HiDreamImageTransformer2DModel.from_config(HiDreamImageTransformer2DModel.load_config(folder))
    if files.transformer is not None:
        return load_single_file(model, files.transformer, device, dtype)
    return load_nf4(model, folder, settings, device, dtype)


def _load_llama(
    folder: Path, tokenizer: Path, device: torch.device, dtype: torch.dtype
) -> tuple[LlamaModel, PreTrainedTokenizerBase]:
    """Llama without its head, plain, in nf4, or in GPTQ-INT4; and its tokenizer."""
    return _load_llama_model(folder, device, dtype), AutoTokenizer.from_pretrained(tokenizer)


def _load_llama_model(folder: Path, device: torch.device, dtype: torch.dtype) -> LlamaModel:
    stated = read_json(folder / "config.json").get("quantization_config")
    if stated is None:
        return _whole(LlamaModel, folder, dtype=dtype)
    gptq = isinstance(stated, dict) and stated.get("quant_method") == "gptq"
    if gptq and not (device.type == "cuda" and find_spec("gptqmodel") and find_spec("optimum")):
        return load_gptq_llama(folder, dtype)
    return _whole(LlamaModel, folder, dtype=dtype, device_map={"": device})


def _load_t5(folder: Path, quantization: str, device: torch.device, dtype: torch.dtype) -> T5EncoderModel:
    """T5, in nf4 if its files are or if that is asked for."""
    stated = "quantization_config" in read_json(folder / "config.json")
    if not stated and quantization == "none":
        return _whole(T5EncoderModel, folder, dtype=dtype)
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    how = {} if stated else {"quantization_config": nf4}
    return _whole(T5EncoderModel, folder, dtype=dtype, device_map={"": device}, **how)


def _whole(kind: Any, folder: Path, **settings: Any) -> Any:
    """A component with all of its weights: the libraries would draw those that are missing at random.

    Args:
        kind: its class, of diffusers or transformers.
        settings: of its from_pretrained.
    """
    try:
        model, found = kind.from_pretrained(folder, output_loading_info=True, **settings)
    except (RuntimeError, ValueError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[-1]
        raise ValueError(f"{folder} holds other weights than its config.json says: {reason}") from error
    missing = sorted(found["missing_keys"])
    if missing:
        raise ValueError(f"{folder} lacks {len(missing)} of the model's weights, among them {missing[0]}")
    return model
