"""A model folder with random weights, in the layout that diffusers publishes: real classes at tiny sizes.

Written by stock diffusers, so that whatever reads it reads an ordinary folder. It draws 64x64 pictures, as the
bundled model does; every parameter is random, so that forecasts differ from what they stand for, and prompts, seeds
and steps from each other.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from hi_diffusers.pictures.metrics import psnr
from tests.tiny import randomize
from training import scenes
from training.text import WIDTH, build_encoders
from training.tokenizers import build_tokenizers

SIDE = 64
CHANNELS = 4
TRANSFORMER = {
    "patch_size": 2,
    "in_channels": CHANNELS,
    "num_layers": 1,
    "num_single_layers": 2,
    "attention_head_dim": 32,
    "num_attention_heads": 2,
    "caption_channels": [WIDTH, WIDTH],
    "text_emb_dim": 2 * WIDTH,
    "num_routed_experts": 4,
    "num_activated_experts": 2,
    "axes_dims_rope": [16, 8, 8],
    "max_resolution": [16, 16],
    "llama_layers": [0, 2, 3],
}
PROMPT = "a small red circle on a blue background"
OTHER_PROMPT = "a large green star on a yellow background"
# All that a folder holds besides model_index.json.
COMPONENTS = (
    "scheduler",
    "text_encoder",
    "text_encoder_2",
    "text_encoder_3",
    "text_encoder_4",
    "tokenizer",
    "tokenizer_2",
    "tokenizer_3",
    "tokenizer_4",
    "transformer",
    "vae",
)


def write_folder(folder: Path) -> Path:
    """Write the model; the same weights every time."""
    torch.manual_seed(0)
    tokenizers = build_tokenizers(scenes.vocabulary())
    encoders = build_encoders(len(tokenizers["tokenizer"]))
    transformer = diffusers.HiDreamImageTransformer2DModel(**TRANSFORMER)
    randomize(transformer)
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    pipe = diffusers.HiDreamImagePipeline(
        **tokenizers, **encoders, transformer=transformer, vae=_build_vae(), scheduler=scheduler
    )
    pipe.save_pretrained(folder)
    return folder


def _build_vae() -> diffusers.AutoencoderKL:
    widths = (8, 8, 8)
    vae = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        block_out_channels=widths,
        layers_per_block=1,
        latent_channels=CHANNELS,
        norm_num_groups=2,
        sample_size=SIDE,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
    )
    # Bright and varied pictures: a PSNR of two grey ones would say nothing.
    nn.init.normal_(vae.decoder.conv_out.weight, std=0.08)
    return vae


@dataclass
class Calls:
    """A stand-in that counts, and then does what it stands for (or raises)."""

    function: Any
    fail_at: int | None = None
    count: int = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.count += 1
        if self.count == self.fail_at:
            raise RuntimeError("this call fails")
        return self.function(*args, **kwargs)


def decibels(a: Any, b: Any) -> float:
    """PSNR in dB of two pictures, or of two tensors over the spread of the second."""
    if isinstance(a, Tensor):
        error, spread = (a.double() - b.double()).square().mean(), b.double().std()
        return float("inf") if error == 0 else (20 * (spread / error.sqrt()).log10()).item()
    return psnr(a, b)


def picture_of(array: np.ndarray) -> Image.Image:
    """Float [H,W,3] in 0..1 as an 8-bit picture, rounded."""
    return Image.fromarray((array * 255).round().astype("uint8"))


def visible_files(folder: Path) -> set[str]:
    """Everything in a folder, hidden and partial files too."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}
