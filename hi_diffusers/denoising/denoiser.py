"""The network during one generation. Shapes: B pictures, C latent channels."""

from typing import Any, Protocol

from torch import Tensor

from cache_functions import CacheState, Current


class Denoiser(Protocol):
    """The network during one generation.

    Attributes:
        embeds: the prompts' embeddings in use.
        guidance: classifier-free guidance scale; 1 or less turns guidance off.
    """

    embeds: Any
    guidance: float

    def condition(self, latents: Tensor) -> None:
        """Compute the tensors that stay constant until `embeds` changes, for latents of that size."""

    def __call__(self, latents: Tensor, index: int, cache_dic: CacheState | None, current: Current) -> Tensor:
        """The guided velocity [B,C,H,W] at a step, fp32; the network itself caches the features inside it."""

    def branches(
        self, latents: Tensor, index: int, cache_dic: CacheState | None, current: Current
    ) -> tuple[Tensor, ...]:
        """The velocities of the negative and of the positive prompt, or the only one without guidance."""
