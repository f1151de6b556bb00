"""What the transformer is trained on: latents of rendered scenes, and embeddings of their captions."""

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor
from tqdm import tqdm
from transformers import AutoTokenizer, CLIPTextModelWithProjection, LlamaModel, T5EncoderModel

from hi_diffusers.families.hidream.pipeline import HiDreamImagePipeline
from training import scenes
from training.pool import picture_pool
from training.process import written_whole
from training.vae import as_tensor

ENCODE_BATCH = 50


class PromptReader:
    """The frozen text encoders, used through the pipeline's own encoding."""

    def __init__(self, pipe: HiDreamImagePipeline):
        self.pipe = pipe
        clips = (pipe.text_encoder, pipe.text_encoder_2)
        self.text_emb_dim = sum(clip.config.projection_dim for clip in clips)
        self.caption_channels = (pipe.text_encoder_3.config.d_model, pipe.text_encoder_4.config.hidden_size)
        self.num_llama_layers = pipe.text_encoder_4.config.num_hidden_layers

    @classmethod
    def load(cls, folder: Path, device: torch.device | str) -> "PromptReader":
        """Read the eight folders that `training.text` writes."""
        classes = (CLIPTextModelWithProjection, CLIPTextModelWithProjection, T5EncoderModel, LlamaModel)
        parts = {}
        for model, suffix in zip(classes, ("", "_2", "_3", "_4"), strict=True):
            encoder = model.from_pretrained(folder / f"text_encoder{suffix}", dtype=torch.float32)
            parts[f"text_encoder{suffix}"] = encoder.to(device).eval().requires_grad_(False)
            parts[f"tokenizer{suffix}"] = AutoTokenizer.from_pretrained(folder / f"tokenizer{suffix}")
        return cls(HiDreamImagePipeline(scheduler=None, vae=None, transformer=None, **parts))

    def encode(self, captions: list[str], length: int) -> tuple[Tensor, Tensor, Tensor]:
        """(t5 [B,length,d], llama [L,B,length,d], pooled [B,p]) of captions padded to `length` tokens."""
        embeds = self.pipe.encode(captions, length)
        return embeds.t5, embeds.llama, embeds.pooled

    def fits(self, caption: str, length: int) -> bool:
        """Whether nothing of the caption is cut off at `length` tokens."""
        return len(self.pipe.tokenizer(caption).input_ids) <= length


class LatentPool:
    """A fixed number of scenes: their latents [N,C,H,W], normalised as the pipeline does it, and their captions."""

    def __init__(self, tier: scenes.Tier, seed: int, values: np.ndarray):
        self.tier, self.seed, self.values = tier, seed, values

    def __len__(self) -> int:
        return len(self.values)

    @classmethod
    def build(
        cls, tier: scenes.Tier, vae_folder: Path, size: int, seed: int, folder: Path, device: torch.device | str
    ) -> "LatentPool":
        """Encode `size` rendered scenes; pictures and latents are kept in `folder` and used again if they are there.

        The latents' file is named after the VAE's configuration, which holds what its latents were normalised with.
        """
        vae = AutoencoderKL.from_pretrained(vae_folder, torch_dtype=torch.float32).eval()
        vae.to(device, memory_format=torch.channels_last)
        shift, scale = vae.config.shift_factor, vae.config.scaling_factor
        path = folder / f"latents-{tier.name}-{seed}-{size}-{shift}-{scale}.npy"
        if not path.exists():
            values = encode_pictures(vae, picture_pool(tier, size, seed, folder))
            with written_whole(path) as partial, partial.open("wb") as file:
                np.save(file, values)
        return cls(tier, seed, np.load(path, mmap_mode="r"))

    def latents(self, index: np.ndarray) -> Tensor:
        """[B,C,H,W], fp32."""
        return torch.from_numpy(self.values[index]).float()

    def caption(self, index: int, rng: np.random.Generator, text: PromptReader, length: int) -> str:
        """One of the scene's phrasings that fits into `length` tokens."""
        scene = scenes.sample_scene(np.random.default_rng((self.seed, 0, int(index))), self.tier)
        for _ in range(8):
            caption = scenes.caption(scene, rng)
            if text.fits(caption, length):
                return caption
        return scenes.caption(scene)


@torch.no_grad()
def encode_pictures(vae: AutoencoderKL, pictures: np.ndarray) -> np.ndarray:
    """Means of the latents of uint8 pictures [N,H,W,3], normalised with the VAE's shift and scale, fp16 [N,C,h,w]."""
    parts = []
    for start in tqdm(range(0, len(pictures), ENCODE_BATCH), desc="encoding pictures", disable=None):
        batch = as_tensor(pictures[start : start + ENCODE_BATCH], vae.device)
        with torch.autocast(vae.device.type, torch.bfloat16):
            mean = vae.encode(batch).latent_dist.mean.float()
        parts.append(((mean - vae.config.shift_factor) * vae.config.scaling_factor).half().cpu().numpy())
    return np.concatenate(parts)
