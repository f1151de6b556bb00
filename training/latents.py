"""What the transformer is trained on: latents of rendered scenes, and embeddings of their captions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor
from transformers import AutoTokenizer, CLIPTextModelWithProjection, LlamaModel, T5EncoderModel

from hi_diffusers.pipelines.hidream_image import HiDreamImagePipeline
from training import scenes
from training.render import render

ENCODE_BATCH = 250


class PromptReader:
    """The frozen text encoders, used through the pipeline's own encoding."""

    def __init__(self, pipe: HiDreamImagePipeline):
        self.pipe = pipe
        clips = (pipe.text_encoder, pipe.text_encoder_2)
        self.text_emb_dim = sum(clip.config.projection_dim for clip in clips)
        self.caption_channels = (pipe.text_encoder_3.config.d_model, pipe.text_encoder_4.config.hidden_size)
        self.num_llama_layers = pipe.text_encoder_4.config.num_hidden_layers

    @classmethod
    def load(cls, folder: Path, device: str) -> PromptReader:
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
    def build(cls, tier: str, vae_folder: Path, size: int, seed: int, path: Path, device: str) -> LatentPool:
        """Render and encode `size` scenes into `path`; a complete file is used as it is."""
        pool_tier = scenes.TIERS[tier]
        if path.exists():
            return cls(pool_tier, seed, np.load(path, mmap_mode="r"))
        vae = AutoencoderKL.from_pretrained(vae_folder, torch_dtype=torch.float32).to(device).eval()
        parts = []
        for start in range(0, size, ENCODE_BATCH):
            pixels = np.stack(
                [cls._picture(pool_tier, seed, index) for index in range(start, min(size, start + ENCODE_BATCH))]
            )
            with torch.no_grad():
                images = torch.from_numpy(pixels).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1
                latents = vae.encode(images.contiguous(memory_format=torch.channels_last)).latent_dist.mean
            parts.append(((latents - vae.config.shift_factor) * vae.config.scaling_factor).half().cpu().numpy())
            if start % (20 * ENCODE_BATCH) == 0:
                print(f"encoded {start + len(pixels)} of {size} pictures", flush=True)
        unfinished = path.with_suffix(".partial.npy")
        np.save(unfinished, np.concatenate(parts))
        unfinished.rename(path)
        return cls(pool_tier, seed, np.load(path, mmap_mode="r"))

    @staticmethod
    def _scene(tier: scenes.Tier, seed: int, index: int) -> tuple[scenes.Scene, np.random.Generator]:
        rng = np.random.default_rng((seed, index))
        return scenes.sample_scene(rng, tier), rng

    @classmethod
    def _picture(cls, tier: scenes.Tier, seed: int, index: int) -> np.ndarray:
        scene, rng = cls._scene(tier, seed, index)
        return render(scene, rng, tier.image_size)

    def latents(self, index: np.ndarray) -> Tensor:
        """[B,C,H,W], fp32."""
        return torch.from_numpy(self.values[index]).float()

    def caption(self, index: int, rng: np.random.Generator, text: PromptReader, length: int) -> str:
        """One of the scene's phrasings that fits into `length` tokens."""
        scene, _ = self._scene(self.tier, self.seed, int(index))
        for _ in range(8):
            caption = scenes.caption(scene, rng)
            if text.fits(caption, length):
                return caption
        return scenes.caption(scene)
