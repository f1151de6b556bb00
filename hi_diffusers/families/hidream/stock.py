"""Converts diffusers' own transformer, arguments and folders to ours."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hi_diffusers.families.hidream.presets import PRESETS, HiDreamPreset
from hi_diffusers.families.hidream.transformer import HiDreamImageTransformer2DModel
from hi_diffusers.weights.source import read_json

STOCK_CLASS = HiDreamImageTransformer2DModel.__name__
HUB = ("revision", "cache_dir", "token", "local_files_only", "force_download", "proxies", "variant", "use_safetensors")
# Arguments that diffusers' pipelines pass on to each component that they load.
OF_ALL = ("variant", "use_safetensors")
OF_DIFFUSERS = ("low_cpu_mem_usage", "max_memory", "offload_folder", "offload_state_dict", "disable_mmap")
SCHEDULERS = {"UniPCMultistepScheduler": "unipc", "FlowMatchEulerDiscreteScheduler": "euler"}


def as_ours(transformer: Any) -> Any:
    """Convert a transformer of diffusers' class to ours, with the same tensors; return anything else unchanged.

    Raises:
        ValueError: if its weights are quantized.
    """
    if type(transformer).__name__ != STOCK_CLASS or isinstance(transformer, HiDreamImageTransformer2DModel):
        return transformer
    if getattr(transformer, "hf_quantizer", None) is not None:
        raise ValueError("transformer is diffusers' own class with quantized weights: load it with ours")
    with torch.device("meta"):
        ours = HiDreamImageTransformer2DModel.from_config(transformer.config)
    ours.load_state_dict(transformer.state_dict(), assign=True)
    return ours.train(transformer.training)


def arguments_for(name: str, of_diffusers: bool, given: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a pipeline for a component that is loaded here, as diffusers would pass them on.

    Args:
        name: name of the component.
        of_diffusers: whether its class is from diffusers, else from transformers.
        given: the arguments of the pipeline's `from_pretrained`.

    Raises:
        ValueError: for a `device_map` that spreads components over devices.
    """
    names = (*OF_ALL, *(OF_DIFFUSERS if of_diffusers else ()))
    found = {key: given[key] for key in names if given.get(key) is not None}
    if given.get("device_map") == "balanced":
        raise ValueError(
            'device_map "balanced" is not supported: name a device, or use enable_model_cpu_offload() or several GPUs'
            " with sampling.py --shard"
        )
    if given.get("device_map") is not None:
        found["device_map"] = {"": given["device_map"]}
    dtype = given.get("dtype")
    if isinstance(dtype, dict):
        dtype = dtype.get(name, dtype.get("default", torch.float32))
    found["dtype"] = dtype
    quantization = given.get("quantization_config")
    own = None if quantization is None else quantization._resolve_quant_config(of_diffusers, name)
    return found if own is None else found | {"quantization_config": own}


def recognise(folder: Path, repo: str | None) -> HiDreamPreset | None:
    """The preset of a pipeline's folder or repository; None if it fits no preset.

    Args:
        folder: folder in the diffusers layout.
        repo: the repository that it was downloaded from.
    """
    for preset in PRESETS:
        if repo is not None and repo in (preset.repo, preset.nf4_repo):
            return preset
    try:
        config, vae, scheduler = (
            read_json(folder / name)
            for name in ("transformer/config.json", "vae/config.json", "scheduler/scheduler_config.json")
        )
        factor = 2 ** (len(vae["block_out_channels"]) - 1)
        area = factor**2 * config["max_resolution"][0] * config["max_resolution"][1]
    except (ValueError, LookupError, TypeError):
        return None
    name = SCHEDULERS.get(str(scheduler.get("_class_name")), "lcm")
    shift = scheduler.get("flow_shift") if name == "unipc" else scheduler.get("shift")
    alike = [one for one in PRESETS if one.area == area and (one.scheduler == "lcm") == (name == "lcm")]
    return next((one for one in alike if one.shift == shift), alike[0] if alike else None)


def check_encoders(pipe: nn.Module | Any) -> None:
    """Raise ValueError if a pipeline lacks a text encoder or a tokenizer, naming it."""
    for number in ("", "_2", "_3", "_4"):
        for name in (f"tokenizer{number}", f"text_encoder{number}"):
            if getattr(pipe, name) is None:
                raise ValueError(f"{name} is missing: give it to from_pretrained, or draw from embeddings")
