"""What the rest of the software asks of a family of models. A wing's module `family` answers it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cache_functions import CacheConfig, CalibrationShelf
from hi_diffusers.denoising.steps import Change, StepEnd
from hi_diffusers.preset import ModelPreset
from hi_diffusers.request.placement import Placement
from hi_diffusers.weights.identity import ModelIdentity
from hi_diffusers.weights.layers import Layer
from hi_diffusers.weights.source import ModelFiles, ModelSource, Parts


@dataclass(frozen=True)
class TokenCount:
    """What a model sees of a prompt.

    Attributes:
        tokens: of the longest reading of its tokenizers.
        limit: how many are read.
        lost: the end of the prompt that is not.
        unknown: words that the model was not taught.
    """

    tokens: int
    limit: int
    lost: str
    unknown: tuple[str, ...]


class Embeds(Protocol):
    """What text encoders make of a batch of prompts: a few named tensors."""

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> "Embeds":
        """From named tensors; raises KeyError if one is missing."""

    @classmethod
    def join(cls, rows: Sequence["Embeds"]) -> "Embeds":
        """Several batches as one, in their order."""

    def tensors(self) -> dict[str, Tensor]:
        """By name."""

    def to(self, device: torch.device) -> "Embeds":
        """The same on a device."""


class Model(Protocol):
    """A loaded model.

    Attributes:
        preset: which model it is; None where it was not loaded by `load_pipeline`.
        identity: which weights it has; None where it cannot draw.
        calibrations: where the cache's calibrations for it lie; None: nowhere.
        fp8: whether its blocks multiply in fp8.
        notices: sentences about what was loaded differently from what one may expect.
    """

    preset: ModelPreset | None
    identity: ModelIdentity | None
    calibrations: CalibrationShelf | None
    fp8: bool
    notices: tuple[str, ...]

    @property
    def drawing_device(self) -> torch.device:
        """Where it computes."""

    @property
    def drawing_dtype(self) -> torch.dtype:
        """Of the denoiser's weights."""

    def encode(self, prompts: list[str], max_sequence_length: int, negative_prompts: list[str] | None = None) -> Any:
        """The embeddings of B prompts, or of [negative, positive] with guidance."""

    def count_tokens(self, prompt: str, limit: int) -> TokenCount:
        """What it sees of a prompt that is cut to so many tokens."""

    def draw_noise(self, batch_size: int, width: int, height: int, generator: Any = None) -> Tensor:
        """Initial latents [B,C,H,W], fp32, for pictures of width x height pixels."""

    def denoise(
        self,
        latents: Tensor,
        embeds: Any,
        *,
        scheduler: Any,
        guidance: float,
        cache: CacheConfig,
        generator: Any = None,
        on_step_end: Callable[[StepEnd], Change | None] | None = None,
    ) -> Tensor:
        """From noise to denoised latents [B,C,H,W], fp32."""

    def decode(self, latents: Tensor) -> np.ndarray:
        """Latents to pictures [B,H,W,3], float in 0..1."""

    def preview(self, x0: Tensor) -> Image.Image:
        """The first picture of a denoised estimate [B,C,H,W]."""

    def release(self) -> None:
        """Let what waits in the host's memory go back there."""


@dataclass(frozen=True)
class Shapes:
    """How large a model is, told without its numbers.

    Attributes:
        components: name -> its layers.
        encoders, denoiser, decoder: names of the components that work in the three stages of a drawing.
        packed: component -> bytes that the weight of a Linear takes there; None where it stays in the model's dtype.
        denoiser_bytes: of a denoiser that stays packed as its own file has it; None where it does not.
        width: of its tokens, D.
        num_blocks: blocks, each of which the cache meets twice.
        num_hidden: width of a feed-forward's hidden layer.
        num_copies: experts that a token passes through; 1 without a mixture.
        latent_channels: C.
        latent_factor: pixels along the side of a latent pixel.
        patch_size: latent pixels along the side of a token.
        max_tokens: image tokens that a picture is padded to if it is not square.
        text_streams: prompts' lengths among the tokens of a block.
        text_numbers, pooled_numbers: of the embeddings, for each token of a prompt and for the whole prompt.
        decoder_channels: of the decoder's feature maps at the picture's size.
    """

    components: dict[str, tuple[Layer, ...]]
    encoders: tuple[str, ...]
    denoiser: str
    decoder: str
    packed: dict[str, Callable[[Layer], int | None]] = field(repr=False)
    denoiser_bytes: int | None
    width: int
    num_blocks: int
    num_hidden: int
    num_copies: int
    latent_channels: int
    latent_factor: int
    patch_size: int
    max_tokens: int
    text_streams: int
    text_numbers: int
    pooled_numbers: int
    decoder_channels: int


class Family(Protocol):
    """What differs between families of models.

    Attributes:
        embeds: the class of the embeddings.
        tile: pixels along the side of a tile where pictures are decoded in tiles.
    """

    embeds: type[Embeds]
    tile: int

    def locate(
        self, preset: ModelPreset, source: ModelSource, parts: Parts = "all", *, offline: bool = False
    ) -> ModelFiles:
        """Find a model's files, download what is absent unless `offline`, and check them; raises ValueError."""

    def shapes(self, preset: ModelPreset, source: ModelSource, *, fp8: bool = False) -> Shapes:
        """How large it is, by its name and what its files on this disk say; reads no weights."""

    def load(
        self, preset: ModelPreset, source: ModelSource, files: ModelFiles, placement: Placement, parts: Parts
    ) -> Model:
        """Load what `locate` found; raises ValueError if the files are another model's."""

    def token_counter(self, preset: ModelPreset, files: ModelFiles) -> Callable[[str, int], TokenCount]:
        """`Model.count_tokens` without a model: from its tokenizers' files alone."""

    def is_quantized(self, preset: ModelPreset, source: ModelSource) -> bool:
        """Whether its denoiser's weights are in fewer bits, as asked for or as its files on this disk are."""

    def encoders_fingerprint(self, files: ModelFiles, quantization: str) -> str:
        """Equal where the text encoders make the same embeddings; 16 hexadecimal digits."""

    def save_quantized(self, model: Model, folder: Path) -> None:
        """Write a model that was quantized on loading; raises ValueError if it has drawn."""
