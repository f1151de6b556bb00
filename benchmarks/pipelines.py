"""FLUX.1 and Qwen-Image: diffusers' own pipelines with random weights, at sizes that a CPU draws.

    stock = find_stock("flux", "small")
    pipe = stock.build(torch.device("cpu"), torch.float32, seed=0)
    picture = pipe(**stock.arguments(pipe, seed=0), num_inference_steps=stock.num_steps).images[0]

Timing does not depend on the weights' values. Texts are given as embeddings, so there are no text encoders; the VAE is
there, with few channels.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from torch import Tensor

TINY = {
    "in_channels": 64,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 32,
    "axes_dims_rope": (4, 4, 8),
}
SMALL = {
    "in_channels": 64,
    "attention_head_dim": 64,
    "num_attention_heads": 6,
    "joint_attention_dim": 512,
    "axes_dims_rope": (8, 28, 28),
}
NARROW = {
    "in_channels": 64,
    "attention_head_dim": 32,
    "num_attention_heads": 2,
    "joint_attention_dim": 64,
    "axes_dims_rope": (8, 12, 12),
}
SCALES = {"tiny": (64, 8, 10), "small": (144, 32, 50), "deep": (128, 32, 10)}
"""Size -> side of the picture in pixels, tokens of the prompt, denoising steps."""


@dataclass(frozen=True)
class Family:
    """What the sizes of a family share.

    Attributes:
        name: what --family takes.
        make: configuration of the transformer to the pipeline.
        texts: embeddings of random texts: a function that draws noise of a shape, and the number of tokens, to
            arguments of the pipeline's call.
        calls: calls of the transformer in every step.
        forecast: the modules whose results target module forecasts, by names as diffusers' hook takes them.
        needless: the modules whose results nobody reads then.
        transformers: configuration of the transformer, by size.
    """

    name: str
    make: Callable[[Mapping[str, Any]], Any]
    texts: Callable[[Callable[..., Tensor], int, Mapping[str, Any]], dict[str, Any]]
    calls: int
    forecast: tuple[str, ...]
    needless: tuple[str, ...]
    transformers: Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Stock:
    """A family at one size.

    Attributes:
        size: its name.
        transformer: configuration of the transformer.
        side: of the square picture, in pixels.
        num_text_tokens: of a prompt.
        num_steps: denoising steps.
    """

    family: Family
    size: str
    transformer: Mapping[str, Any]
    side: int
    num_text_tokens: int
    num_steps: int

    @property
    def num_image_tokens(self) -> int:
        """Patches of the picture; a latent has 8 × 8 pixels, a patch 2 × 2 latents."""
        return (self.side // 16) ** 2

    def build(self, device: torch.device, dtype: torch.dtype, seed: int) -> Any:
        """The pipeline with random weights, without its progress bar."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            pipe = self.family.make(self.transformer)
        pipe.set_progress_bar_config(disable=True)
        return pipe.to(device, dtype)

    def arguments(self, pipe: Any, seed: int) -> dict[str, Any]:
        """Arguments of the pipeline's call, but the number of steps: noise, texts, the picture's size."""
        generator = torch.Generator().manual_seed(seed)

        def noise(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(pipe.device, pipe.dtype)

        latents = noise(1, self.num_image_tokens, self.transformer["in_channels"])
        texts = self.family.texts(noise, self.num_text_tokens, self.transformer)
        return {"latents": latents, "height": self.side, "width": self.side, **texts}


def copy_of(pipe: Any) -> Any:
    """A pipeline whose class and transformer are its own, over the same weights: a cache may change both."""
    weights = {id(parameter): parameter for parameter in pipe.transformer.parameters()}
    own = {"transformer": copy.deepcopy(pipe.transformer, weights), "scheduler": copy.deepcopy(pipe.scheduler)}
    kind = type(type(pipe).__name__, (type(pipe),), {"__module__": type(pipe).__module__})
    copied = kind(**{**pipe.components, **own})
    copied.set_progress_bar_config(disable=True)
    return copied


def flux(config: Mapping[str, Any]) -> Any:
    """FLUX.1-dev: guidance is an input of the transformer."""
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 16, 16),
        latent_channels=16,
        norm_num_groups=4,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    transformer = FluxTransformer2DModel(guidance_embeds=True, **config)
    return FluxPipeline(scheduler, vae.eval(), None, None, None, None, transformer.eval())


def flux_texts(noise: Callable[..., Tensor], num_tokens: int, config: Mapping[str, Any]) -> dict[str, Any]:
    """What T5 and CLIP would give."""
    return {
        "prompt_embeds": noise(1, num_tokens, config["joint_attention_dim"]),
        "pooled_prompt_embeds": noise(1, config["pooled_projection_dim"]),
    }


def qwen_image(config: Mapping[str, Any]) -> Any:
    """Qwen-Image: the transformer is called twice in every step, with and without the prompt."""
    vae = AutoencoderKLQwenImage(base_dim=8, num_res_blocks=1)
    scheduler = FlowMatchEulerDiscreteScheduler(
        base_shift=0.5, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02, use_dynamic_shifting=True
    )
    transformer = QwenImageTransformer2DModel(**config)
    return QwenImagePipeline(scheduler, vae.eval(), None, None, transformer.eval())


def qwen_image_texts(noise: Callable[..., Tensor], num_tokens: int, config: Mapping[str, Any]) -> dict[str, Any]:
    """A prompt and a negative one of half its length."""
    lengths = {"": num_tokens, "negative_": num_tokens // 2}
    embeds = {f"{prefix}prompt_embeds": noise(1, n, config["joint_attention_dim"]) for prefix, n in lengths.items()}
    masks = {f"{prefix}prompt_embeds_mask": torch.ones(1, n, dtype=torch.bool) for prefix, n in lengths.items()}
    return {**embeds, **masks, "true_cfg_scale": 4.0}


FLUX = Family(
    "flux",
    flux,
    flux_texts,
    calls=1,
    forecast=(
        r"transformer_blocks\.\d+\.attn",
        r"transformer_blocks\.\d+\.ff",
        r"single_transformer_blocks\.\d+\.proj_out",
    ),
    needless=(
        r"transformer_blocks\.\d+\.ff_context",
        r"single_transformer_blocks\.\d+\.attn",
        r"single_transformer_blocks\.\d+\.proj_mlp",
    ),
    transformers={
        "tiny": {"num_layers": 1, "num_single_layers": 1, "pooled_projection_dim": 32, **TINY},
        "small": {"num_layers": 3, "num_single_layers": 6, "pooled_projection_dim": 256, **SMALL},
        "deep": {"num_layers": 19, "num_single_layers": 38, "pooled_projection_dim": 64, **NARROW},
    },
)
QWEN_IMAGE = Family(
    "qwen-image",
    qwen_image,
    qwen_image_texts,
    calls=2,
    forecast=(r"transformer_blocks\.\d+\.attn", r"transformer_blocks\.\d+\.img_mlp"),
    needless=(r"transformer_blocks\.\d+\.txt_mlp",),
    transformers={
        "tiny": {"num_layers": 2, **TINY},
        "small": {"num_layers": 4, **SMALL},
        "deep": {"num_layers": 60, **NARROW},
    },
)
FAMILIES = {family.name: family for family in (FLUX, QWEN_IMAGE)}


def find_stock(name: str, size: str) -> Stock:
    """A family at a size: tiny for tests, small to be measured, deep with as many blocks as the real model has."""
    family, (side, num_text_tokens, num_steps) = FAMILIES[name], SCALES[size]
    return Stock(family, size, family.transformers[size], side, num_text_tokens, num_steps)
