"""The shapes of a model's components, without their numbers."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, LlamaConfig, LlamaModel, T5Config, T5EncoderModel

from hi_diffusers import published
from hi_diffusers.models.transformer import HiDreamImageTransformer2DModel
from hi_diffusers.presets import ModelPreset, bundled_folder

ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3", "text_encoder_4")


@dataclass(frozen=True)
class Architecture:
    """A model's components on the meta device: shapes without numbers."""

    components: dict[str, nn.Module]

    @classmethod
    def of(cls, preset: ModelPreset) -> "Architecture":
        """As published, or as the bundled model's files say."""
        if preset.is_bundled:
            configs = {name: _read(bundled_folder() / name) for name in (*ENCODERS, "transformer", "vae")}
        else:
            encoders = (published.CLIP_L, published.CLIP_G, published.T5, published.LLAMA)
            configs = dict(zip(ENCODERS, encoders, strict=True))
            configs |= {"transformer": published.TRANSFORMER, "vae": published.VAE}
        clip, clip_2, t5, llama = (configs[name] for name in ENCODERS)
        with torch.device("meta"):
            architecture = cls(
                {
                    "text_encoder": CLIPTextModelWithProjection(CLIPTextConfig(**clip)),
                    "text_encoder_2": CLIPTextModelWithProjection(CLIPTextConfig(**clip_2)),
                    "text_encoder_3": T5EncoderModel(T5Config(**t5)),
                    "text_encoder_4": LlamaModel(LlamaConfig(**llama)),
                    "transformer": HiDreamImageTransformer2DModel.from_config(configs["transformer"]),
                    "vae": AutoencoderKL.from_config(configs["vae"]),
                }
            )
        architecture.components["text_encoder_3"].tie_weights()
        return architecture

    @property
    def config(self) -> Any:
        """The transformer's."""
        return self.components["transformer"].config


def _read(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return content
