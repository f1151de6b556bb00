"""A model at its published size without its files: the real classes, with random numbers or none."""

from collections.abc import Callable
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, LlamaConfig, LlamaModel, T5Config, T5EncoderModel

from hi_diffusers.console import say
from hi_diffusers.denoising.schedulers import make_scheduler
from hi_diffusers.families.hidream.pipeline import HiDreamImagePipeline
from hi_diffusers.families.hidream.shapes import ENCODERS, KEPT_BY_NF4, configurations, takes_fp8
from hi_diffusers.families.hidream.transformer import HiDreamImageTransformer2DModel
from hi_diffusers.preset import ModelPreset
from hi_diffusers.weights.fp8 import to_fp8
from hi_diffusers.weights.gptq import GROUP, GPTQLinear
from hi_diffusers.weights.nf4 import Nf4

TOKENIZERS = ("tokenizer", "tokenizer_2", "tokenizer_3", "tokenizer_4")
MakeNf4 = Callable[[nn.Linear, torch.device, torch.dtype], nn.Module]


def meta_components(preset: ModelPreset) -> dict[str, nn.Module]:
    """Component -> module, as published, or as the bundled model's files say."""
    configs = configurations(preset)
    clip, clip_2, t5, llama = (configs[name] for name in ENCODERS)
    with torch.device("meta"):
        components: dict[str, nn.Module] = {
            "text_encoder": CLIPTextModelWithProjection(CLIPTextConfig(**clip)),
            "text_encoder_2": CLIPTextModelWithProjection(CLIPTextConfig(**clip_2)),
            "text_encoder_3": T5EncoderModel(T5Config(**t5)),
            "text_encoder_4": LlamaModel(LlamaConfig(**llama)),
            "transformer": HiDreamImageTransformer2DModel.from_config(configs["transformer"]),
            "vae": AutoencoderKL.from_config(configs["vae"]),
        }
    components["text_encoder_3"].tie_weights()
    return components


def random_nf4(layer: nn.Linear, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """A layer of bitsandbytes with random weights, in place of one on the meta device."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    how: dict[str, Any] = {"compress_statistics": False, "quant_type": "nf4"}
    with torch.device("meta"):
        made = Linear4bit(layer.in_features, layer.out_features, layer.bias is not None, dtype, **how)
    weight = 0.02 * torch.randn(layer.out_features, layer.in_features, device=device, dtype=dtype)
    made.weight = Params4bit(weight, requires_grad=False, module=made, **how).to(device)
    if layer.bias is not None:
        made.bias = nn.Parameter(torch.zeros(layer.out_features, device=device, dtype=dtype), requires_grad=False)
    return made


def build(
    preset: ModelPreset,
    device: torch.device,
    dtype: torch.dtype,
    quantization: str = "none",
    *,
    fp8: bool = False,
    make_nf4: MakeNf4 = random_nf4,
) -> HiDreamImagePipeline:
    """A whole model with random weights, as it is loaded, but for its tokenizers.

    Args:
        quantization: "none", or "nf4" with a Llama in GPTQ-INT4.
        fp8: whether the transformer's blocks multiply in fp8.
        make_nf4: makes the layers that are quantized to nf4.
    """
    settings = Nf4(KEPT_BY_NF4)
    packing: dict[str, Callable[[str], str]] = {}
    if quantization == "nf4":
        packing = {
            "transformer": lambda name: "nf4" if settings.takes(name) else "plain",
            "text_encoder_3": lambda name: "plain" if name.endswith(".wo") else "nf4",
            "text_encoder_4": lambda name: "gptq",
        }
    components = meta_components(preset)
    for name, module in components.items():
        say(f"building {name}")
        fill(module, device, dtype, packing.get(name, plain), make_nf4)
        if name == "text_encoder_3":
            module.tie_weights()  # type: ignore[operator]  # two modules hold its embedding
        module.eval()
    if fp8:
        to_fp8(components["transformer"], takes_fp8)
    scheduler = make_scheduler(preset.scheduler, preset.shift)
    return HiDreamImagePipeline(scheduler=scheduler, **dict.fromkeys(TOKENIZERS), **components)


def plain(name: str) -> str:
    """No layer is packed."""
    return "plain"


def fill(
    model: nn.Module,
    device: torch.device,
    dtype: torch.dtype,
    packed: Callable[[str], str] = plain,
    make_nf4: MakeNf4 = random_nf4,
) -> None:
    """Give a model on the meta device random weights, layer by layer.

    Args:
        packed: name of a Linear -> "plain", "nf4" or "gptq".
    """
    for name, layer in list(model.named_modules()):
        kind = packed(name) if isinstance(layer, nn.Linear) else "plain"
        if kind == "nf4":
            model.set_submodule(name, make_nf4(layer, device, dtype))
        elif kind == "gptq":
            model.set_submodule(name, GPTQLinear(layer.in_features, layer.out_features, GROUP).to(device))
        else:
            for key, value in list(layer.named_parameters(recurse=False)):
                weight = 0.02 * torch.randn(value.shape, device=device, dtype=dtype)
                setattr(layer, key, nn.Parameter(weight, requires_grad=False))
            for key, buffer in list(layer.named_buffers(recurse=False)):
                layer.register_buffer(key, torch.zeros(buffer.shape, device=device, dtype=buffer.dtype))
