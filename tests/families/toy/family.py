"""What the rest of the software asks of the family."""

from dataclasses import dataclass

import torch
from PIL import Image

from hi_diffusers.denoising.cached import denoise_with_cache
from hi_diffusers.families.family import Shapes, TokenCount
from hi_diffusers.weights.layers import Layer
from hi_diffusers.weights.source import ModelFiles

tile = 32


@dataclass(frozen=True)
class embeds:
    grey: torch.Tensor

    @classmethod
    def of(cls, tensors):
        return cls(tensors["grey"])

    @classmethod
    def join(cls, rows):
        return cls(torch.cat([row.grey for row in rows]))

    def tensors(self):
        return {"grey": self.grey}

    def to(self, device):
        return embeds(self.grey.to(device))


class Denoiser:
    """The velocity that leads to a flat picture of the prompts' grey, and a ripple that fades with the noise."""

    def __init__(self, embeds, sigmas):
        self.embeds, self.sigmas, self.guidance, self.num_evaluations = embeds, sigmas, 0.0, 0

    def condition(self, latents):
        self.flat = self.embeds.grey[:, None, None, None].expand_as(latents)

    def __call__(self, latents, index, cache_dic, current):
        self.num_evaluations += 1
        x0 = self.flat + 0.1 * self.sigmas[index] * torch.sin(torch.arange(latents.shape[-1]))
        return (latents - x0) / self.sigmas[index]


class Model:
    preset = identity = calibrations = ranks = None
    fp8, notices = False, ()
    drawing_device, drawing_dtype = torch.device("cpu"), torch.float32

    def encode(self, prompts, max_sequence_length, negative_prompts=None):
        return embeds(torch.tensor([len(prompt) / max_sequence_length for prompt in prompts]))

    def count_tokens(self, prompt, limit):
        return TokenCount(len(prompt), limit, prompt[limit:], ())

    def draw_noise(self, batch_size, width, height, generator=None):
        return torch.stack([torch.randn(3, height, width, generator=one) for one in generator])

    def encode_pictures(self, pixels):
        return torch.from_numpy(pixels).movedim(-1, 1)

    def denoise(self, latents, embeds, *, scheduler, guidance, cache, generator=None, on_step_end=None, start=None):
        self.denoiser = Denoiser(embeds, scheduler.sigmas.tolist())
        return denoise_with_cache(latents, self.denoiser, scheduler, cache, generator, on_step_end, start)

    def decode(self, latents):
        return latents.clamp(0, 1).permute(0, 2, 3, 1).numpy()

    def preview(self, x0):
        return Image.fromarray((self.decode(x0)[0] * 255).astype("uint8"))

    def release(self):
        pass


def locate(preset, source, parts="all", *, offline=False):
    return ModelFiles(preset.folder)


def shapes(preset, source, *, fp8=False):
    return Shapes(
        components={"denoiser": (Layer("only", ((2, 2),)),), "encoder": (Layer("only", ((2, 2),)),)},
        encoders=("encoder",),
        denoiser="denoiser",
        decoder="denoiser",
        packed={},
        unpacking={},
        denoiser_bytes=None,
        added_bytes=0,
        width=1,
        num_blocks=1,
        num_hidden=1,
        num_shared=0,
        num_copies=1,
        latent_channels=3,
        latent_factor=1,
        patch_size=1,
        num_heads=1,
        max_tokens=32 * 32,
        text_streams=1,
        text_numbers=1,
        pooled_numbers=1,
        decoder_channels=3,
        picture_channels=3,
    )


def load(preset, source, files, placement, parts):
    model = Model()
    model.preset = preset
    return model


def token_counter(preset, files):
    return Model().count_tokens


def is_quantized(preset, source):
    return False


def encoders_fingerprint(files, quantization):
    return "toy"


def save_quantized(model, folder):
    raise ValueError("nothing to quantize")
