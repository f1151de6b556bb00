"""Loads a pipeline from its files onto its device."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import nn
from transformers import (
    AutoTokenizer,
    BitsAndBytesConfig,
    CLIPTextModelWithProjection,
    LlamaConfig,
    LlamaModel,
    PreTrainedTokenizerBase,
    T5EncoderModel,
)
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from hi_diffusers.console import Refusal
from hi_diffusers.families.hidream.files import LLAMA, PARTS, transformer_shapes
from hi_diffusers.families.hidream.pipeline import HiDreamImagePipeline
from hi_diffusers.families.hidream.shapes import KEPT_BY_NF4, TILE, takes_fp8
from hi_diffusers.families.hidream.transformer import HiDreamImageTransformer2DModel
from hi_diffusers.preset import ModelPreset
from hi_diffusers.request.placement import Placement, compile_blocks, resolve_device, resolve_dtype
from hi_diffusers.weights.fp8 import to_fp8
from hi_diffusers.weights.gptq import fill_gptq, take_gptq
from hi_diffusers.weights.lora import check_lora, read_lora
from hi_diffusers.weights.nf4 import Nf4, check_unused, load_nf4
from hi_diffusers.weights.single_file import load_single_file
from hi_diffusers.weights.source import ModelFiles, ModelSource, Parts, read_json


@dataclass(frozen=True)
class _How:
    """How weights are loaded.

    Attributes:
        quantization: "none", or "nf4" to quantize weights that are not quantized.
        device: device that computes.
        dtype: dtype of the arithmetic, and of weights that are not quantized.
        home: device that each component is moved to as soon as it is loaded, so that large ones are not in host
            memory together; None leaves them where they were loaded.
    """

    quantization: str
    device: torch.device
    dtype: torch.dtype
    home: torch.device | None

    def settle(self, module: nn.Module) -> nn.Module:
        """Move a component to its home."""
        return module if self.home is None else module.to(self.home)


def load(
    preset: ModelPreset, source: ModelSource, files: ModelFiles, placement: Placement, parts: Parts
) -> HiDreamImagePipeline:
    """Load a model from files that `locate` found.

    Args:
        preset, source: the requested model and files.
        files: the files that were found.
        placement: its device and how it computes; `encoder_device` is ignored.
        parts: as in `load_pipeline`.

    Raises:
        ValueError: if the files hold other weights than their configurations say.
    """
    device = resolve_device(placement.device)
    homes = {"none": device, "model": torch.device("cpu"), "group": None}
    how = _How(source.quantization, device, resolve_dtype(placement.dtype, device), homes[placement.offload])
    pipe = _assemble(files, parts, how, placement.fp8)
    pipe.set_progress_bar_config(disable=True)
    pipe.preset, pipe.fp8 = preset, placement.fp8
    if files.loras and parts != "encoders":
        pipe.notices = tuple(_add_loras(pipe, files))
    _place(pipe, device, placement.offload)
    if parts == "encoders":
        return pipe
    if placement.tiled:
        pipe.vae.tile_sample_min_size, pipe.vae.tile_latent_min_size = TILE, TILE // pipe.vae_scale_factor
        pipe.vae.enable_tiling()
    if placement.attention_backend is not None:
        pipe.transformer.set_attention_backend(placement.attention_backend)
    if placement.compiled:
        # quantized layers, LoRA and hooks may break a graph
        plain = not _is_packed(pipe.transformer) and not files.loras and placement.offload == "none"
        compile_blocks(pipe.transformer, fullgraph=plain)
    return pipe


def load_tokenizers(files: ModelFiles) -> tuple[PreTrainedTokenizerBase, ...]:
    """Load the four tokenizers alone: both CLIPs', T5's, Llama's."""
    llama = files.encoder or files.folder / LLAMA[1]
    folders = (*(files.folder / name for name in ("tokenizer", "tokenizer_2", "tokenizer_3")), llama)
    return tuple(AutoTokenizer.from_pretrained(folder) for folder in folders)


def _assemble(files: ModelFiles, parts: Parts, how: _How, fp8: bool) -> HiDreamImagePipeline:
    """Load the pipeline with its weights."""
    given: dict[str, object] = dict.fromkeys(PARTS[parts])
    if parts != "encoders":
        with _reading(files.transformer or files.folder / "transformer"):
            transformer = _load_transformer(files, how)
        if fp8:
            to_fp8(transformer, takes_fp8)
        given["transformer"] = how.settle(transformer)
        with _reading(files.folder / "vae"):
            given["vae"] = _whole(AutoencoderKL, files.folder / "vae", torch_dtype=how.dtype)
    if parts != "drawing":
        folder, tokenizer = (files.encoder or files.folder / name for name in LLAMA)
        with _reading(folder):
            llama = how.settle(_load_llama(folder, how.device, how.dtype))
        with _reading(tokenizer):
            given |= dict(zip(LLAMA, (llama, AutoTokenizer.from_pretrained(tokenizer)), strict=True))
        with _reading(files.folder / "text_encoder_3"):
            given["text_encoder_3"] = how.settle(_load_t5(files.folder / "text_encoder_3", how))
        for name in ("text_encoder", "text_encoder_2"):
            with _reading(files.folder / name):
                given[name] = _whole(CLIPTextModelWithProjection, files.folder / name, dtype=how.dtype)
    with _reading(files.folder):
        pipe = HiDreamImagePipeline.from_pretrained(files.folder, dtype=how.dtype, **given)
    for name, part in pipe.components.items():
        if name.startswith("tokenizer") and part is not None:
            path = files.encoder if files.encoder is not None and name == LLAMA[1] else files.folder / name
            with _reading(path):
                _try_out(part, getattr(pipe, name.replace("tokenizer", "text_encoder")))
    return pipe


def _try_out(tokenizer: PreTrainedTokenizerBase, encoder: nn.Module | None) -> None:
    """Raise an exception if a tokenizer does not work, or makes tokens that its encoder does not embed."""
    tokens = tokenizer("a", padding="max_length", max_length=8, truncation=True)["input_ids"]
    if not isinstance(tokenizer.model_max_length, int):
        raise ValueError(f"model_max_length is {str(tokenizer.model_max_length)[:60]!r}")
    largest = max(*tokens, *tokenizer.get_vocab().values())
    embedded = None if encoder is None else encoder.get_input_embeddings().num_embeddings  # type: ignore[operator]
    if embedded is not None and largest >= embedded:
        raise ValueError(f"it has a token {largest}, but its text encoder embeds {embedded} tokens")


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """A context in which any error of a library that reads these files becomes a sentence about them.

    Raises:
        Refusal: naming the path and the reason.
    """
    try:
        yield
    except (Refusal, torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        said = reason if str(path) in reason else f"{path} cannot be loaded: {reason}"
        raise Refusal(said) from error


def _add_loras(pipe: HiDreamImagePipeline, files: ModelFiles) -> Iterator[str]:
    """Add LoRAs; yields a sentence about each LoRA that has unused tensors."""
    names, wanted = [f"lora{number}" for number in range(len(files.loras))], transformer_shapes(files.folder)
    for name, (path, _) in zip(names, files.loras, strict=True):
        found = check_lora(path, wanted)
        try:
            pipe.load_lora_weights(read_lora(path, found), adapter_name=name)
        except (RuntimeError, LookupError, NotImplementedError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()
            raise ValueError(f"lora {path} does not fit this transformer: {reason}") from error
        used = sum(name in getattr(module, "lora_A", ()) for module in pipe.transformer.modules())
        if used != len(found.layers):
            raise ValueError(
                f"lora {path}: {len(found.layers) - used} of its {len(found.layers)} layers were not added"
            )
        if found.others:
            whole = sum(len(parts) for parts in found.layers.values()) + len(found.others)
            which = f"{len(found.others)} of its {whole} tensors do not belong to the transformer and are not used"
            yield f"lora {path}: {which}, such as {found.others[0]}"
    pipe.set_adapters(names, [scale for _, scale in files.loras])


def _is_packed(module: torch.nn.Module) -> bool:
    """Whether weights are quantized; such layers are loaded directly to their device."""
    return any(not parameter.is_floating_point() for parameter in module.parameters())


def _place(pipe: HiDreamImagePipeline, target: torch.device, offload: str) -> None:
    """Move the components to the device, or set up their offloading."""
    if offload == "none":
        pipe.to(target)
    elif offload == "model":
        pipe.enable_model_cpu_offload(device=target)
    else:
        pipe.enable_group_offload(target, offload_type="leaf_level", use_stream=target.type == "cuda")


def _load_transformer(files: ModelFiles, how: _How) -> HiDreamImageTransformer2DModel:
    """Load the transformer from its folder or a single file; in nf4 if its files are, or if that is asked for."""
    folder = files.folder / "transformer"
    stated = read_json(folder / "config.json").get("quantization_config")
    if files.transformer is None and stated is None and how.quantization == "none":
        return _whole(HiDreamImageTransformer2DModel, folder, torch_dtype=how.dtype)
    with torch.device("meta"):
        model = HiDreamImageTransformer2DModel.from_config(HiDreamImageTransformer2DModel.load_config(folder))
    if files.transformer is not None:
        return load_single_file(model, files.transformer, how.device, how.dtype)
    settings = Nf4(KEPT_BY_NF4) if stated is None else Nf4.from_config(stated)
    return load_nf4(model, folder, settings, how.device, how.dtype)


def _load_llama(folder: Path, device: torch.device, dtype: torch.dtype) -> LlamaModel:
    """Load Llama without its head, plain, in nf4, or in GPTQ-INT4."""
    stated = read_json(folder / "config.json").get("quantization_config")
    if stated is None:
        return _whole(LlamaModel, folder, dtype=dtype)
    gptq = isinstance(stated, dict) and stated.get("quant_method") == "gptq"
    if gptq and not (device.type == "cuda" and find_spec("gptqmodel") and find_spec("optimum")):
        return load_gptq_llama(folder, dtype)
    return _whole(LlamaModel, folder, dtype=dtype, device_map={"": device})


def load_gptq_llama(folder: Path, dtype: torch.dtype) -> LlamaModel:
    """Load a GPTQ Llama without its head, on the CPU.

    Args:
        folder: config.json with a quantization_config of GPTQ with 4 bits in format v1, and safetensors files.
        dtype: dtype of embeddings and norms, and so of the arithmetic.

    Raises:
        ValueError: if the folder holds other weights than a Llama's.
    """
    content = read_json(folder / "config.json")
    settings = content.pop("quantization_config")
    config = LlamaConfig.from_dict(content)
    with torch.device("meta"):
        model = LlamaModel(config)
        take_gptq(model, settings["group_size"])
    model.rotary_emb = LlamaRotaryEmbedding(config)  # its table is computed, not read
    fill_gptq(model, folder, dtype, computed="rotary_emb.")
    return model.eval().requires_grad_(False)


def _load_t5(folder: Path, how: _How) -> T5EncoderModel:
    """Load T5, in nf4 if its files are, or if that is asked for."""
    stated = "quantization_config" in read_json(folder / "config.json")
    if not stated and how.quantization == "none":
        return _whole(T5EncoderModel, folder, dtype=how.dtype)
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=how.dtype)
    more = {} if stated else {"quantization_config": nf4}
    return _whole(T5EncoderModel, folder, dtype=how.dtype, device_map={"": how.device}, **more)


def _whole(kind: Any, folder: Path, **settings: Any) -> Any:
    """Load a component, and check that no weight is missing: the libraries would fill it with random numbers.

    Args:
        kind: class of the component, from diffusers or transformers.
        settings: arguments of its from_pretrained.
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


def save_quantized(pipe: HiDreamImagePipeline, folder: Path) -> None:
    """Write a model that was quantized on loading, without its Llama, so that the next start does not quantize again.

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
