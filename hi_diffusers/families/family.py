"""The interface of a family of models; the module `family` in each family's folder implements it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cache_functions import CacheConfig, CalibrationShelf
from hi_diffusers.denoising.denoiser import Denoiser
from hi_diffusers.denoising.ranks import Ranks
from hi_diffusers.denoising.start import Start
from hi_diffusers.denoising.steps import Change, StepEnd
from hi_diffusers.preset import ModelPreset
from hi_diffusers.request.placement import Placement
from hi_diffusers.weights.identity import ModelIdentity
from hi_diffusers.weights.layers import Layer
from hi_diffusers.weights.source import ModelFiles, ModelSource, Parts


@dataclass(frozen=True)
class TokenCount:
    """The tokens of a prompt, and the parts of it that a model ignores.

    Attributes:
        tokens: number of tokens, the largest of all tokenizers.
        limit: number of tokens that are read.
        lost: the end of the prompt that is cut off.
        unknown: words that the model was not taught.
    """

    tokens: int
    limit: int
    lost: str
    unknown: tuple[str, ...]


class Embeds(Protocol):
    """The text encoders' output for a batch of prompts: a few named tensors."""

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> "Embeds":
        """Make embeddings from named tensors; raises KeyError if one is missing."""

    @classmethod
    def join(cls, rows: Sequence["Embeds"]) -> "Embeds":
        """Join several batches into one, in their order."""

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by name."""

    def to(self, device: torch.device) -> "Embeds":
        """A copy on another device."""


class Model(Protocol):
    """A loaded model.

    Attributes:
        preset: the model's preset; None if it was not loaded by `load_pipeline`.
        identity: identity of its weights; None if it cannot draw.
        calibrations: where the model's calibrations are; None: nowhere.
        fp8: whether its blocks multiply in fp8.
        notices: sentences about how it was loaded that the user may not expect.
        ranks: the processes that draw together, set by `draw_with`; None: this one alone.
    """

    preset: ModelPreset | None
    identity: ModelIdentity | None
    calibrations: CalibrationShelf | None
    fp8: bool
    notices: tuple[str, ...]
    ranks: Ranks | None

    @property
    def drawing_device(self) -> torch.device:
        """The device that it computes on."""

    @property
    def drawing_dtype(self) -> torch.dtype:
        """The dtype of the denoiser's weights."""

    def encode(self, prompts: list[str], max_sequence_length: int, negative_prompts: list[str] | None = None) -> Any:
        """The embeddings of B prompts, or of [negative, positive] with guidance."""

    def count_tokens(self, prompt: str, limit: int) -> TokenCount:
        """Count the tokens of a prompt that is cut to `limit` tokens."""

    def draw_noise(self, batch_size: int, width: int, height: int, generator: Any = None) -> Tensor:
        """Initial latents [B,C,H,W], fp32, for pictures of width x height pixels."""

    def encode_pictures(self, pixels: np.ndarray) -> Tensor:
        """The latents [B,C,H,W], fp32, of pictures [B,H,W,3], float32 in 0..1."""

    def denoiser(self, embeds: Any, scheduler: Any, guidance: float) -> Denoiser:
        """The network for these embeddings, for a loop of the caller's; `condition` must be called first."""

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
        start: Start | None = None,
    ) -> Tensor:
        """Denoise latents [B,C,H,W], of noise or of a noised picture; returns fp32."""

    def decode(self, latents: Tensor) -> np.ndarray:
        """Decode latents to pictures [B,H,W,3], float in 0..1."""

    def preview(self, x0: Tensor) -> Image.Image:
        """Decode the first picture of a denoised estimate [B,C,H,W]."""

    def release(self) -> None:
        """Move offloaded components back to host memory."""

    def draw_with(self, ranks: Ranks) -> None:
        """Share all drawings with other processes; raises ValueError if the model cannot be split so."""


@dataclass(frozen=True)
class Shapes:
    """The sizes of a model, known without its weights.

    Attributes:
        components: name -> its layers.
        encoders, denoiser, decoder: names of the components that work in the three stages of a drawing.
        packed: component -> function: bytes of a Linear's quantized weight; None if it stays in the model's dtype.
        unpacking: component -> bytes per number that a quantized weight takes while it is unpacked to multiply.
        denoiser_bytes: size of a denoiser that stays quantized as in its own file; None for others.
        added_bytes: size of what is added to the denoiser, such as LoRA, as far as it is on this disk.
        width: width of the tokens, D.
        num_blocks: number of blocks, each with two cached features.
        num_hidden: width of a feed-forward's hidden layer.
        num_shared: width of the hidden layer of the expert that every token passes through; 0 without one.
        num_copies: experts that a token passes through; 1 without a mixture.
        latent_channels: C.
        latent_factor: pixels along the side of a latent pixel.
        patch_size: latent pixels along the side of a token.
        num_heads: heads of the attention.
        max_tokens: image tokens that a picture is padded to if it is not square.
        text_streams: text tokens of a block, as a multiple of the prompt's length.
        text_numbers, pooled_numbers: elements of the embeddings per token of a prompt, and per whole prompt.
        decoder_channels: channels of the decoder's feature maps at the picture's size.
        picture_channels: channels of the feature maps at the picture's size while a picture is encoded.
    """

    components: dict[str, tuple[Layer, ...]]
    encoders: tuple[str, ...]
    denoiser: str
    decoder: str
    packed: dict[str, Callable[[Layer], int | None]] = field(repr=False)
    unpacking: dict[str, int]
    denoiser_bytes: int | None
    added_bytes: int
    width: int
    num_blocks: int
    num_hidden: int
    num_shared: int
    num_copies: int
    latent_channels: int
    latent_factor: int
    patch_size: int
    num_heads: int
    max_tokens: int
    text_streams: int
    text_numbers: int
    pooled_numbers: int
    decoder_channels: int
    picture_channels: int


class Family(Protocol):
    """The functions that differ between families of models.

    Attributes:
        embeds: the class of the embeddings.
        tile: pixels along the side of a tile if pictures are decoded in tiles.
    """

    embeds: type[Embeds]
    tile: int

    def locate(
        self, preset: ModelPreset, source: ModelSource, parts: Parts = "all", *, offline: bool = False
    ) -> ModelFiles:
        """Find a model's files, download missing ones unless `offline`, and check them; raises ValueError."""

    def shapes(self, preset: ModelPreset, source: ModelSource, *, fp8: bool = False) -> Shapes:
        """The model's sizes, from its preset and its files on this disk; reads no weights."""

    def load(
        self, preset: ModelPreset, source: ModelSource, files: ModelFiles, placement: Placement, parts: Parts
    ) -> Model:
        """Load the files that `locate` found; raises ValueError if they are another model's."""

    def token_counter(self, preset: ModelPreset, files: ModelFiles) -> Callable[[str, int], TokenCount]:
        """A function like `Model.count_tokens` that needs only the tokenizers' files."""

    def is_quantized(self, preset: ModelPreset, source: ModelSource) -> bool:
        """Whether the denoiser's weights are quantized, by request or in its files on this disk."""

    def encoders_fingerprint(self, files: ModelFiles, quantization: str) -> str:
        """A hash that is equal if the text encoders make the same embeddings; 16 hexadecimal digits."""

    def save_quantized(self, model: Model, folder: Path) -> None:
        """Write a model that was quantized on loading; raises ValueError if it has drawn."""
