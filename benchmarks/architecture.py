"""A model's components on the meta device: the real classes, without their numbers."""

import torch
from diffusers import AutoencoderKL
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, LlamaConfig, LlamaModel, T5Config, T5EncoderModel

from hi_diffusers.families.hidream.shapes import ENCODERS, configurations
from hi_diffusers.families.hidream.transformer import HiDreamImageTransformer2DModel
from hi_diffusers.preset import ModelPreset


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
