"""The transformer over one generation, with classifier-free guidance (arXiv 2207.12598).

Shapes: B pictures, C latent channels.
"""

from typing import Any

import torch
from torch import Tensor

from cache_functions import CacheState, Current
from hi_diffusers.denoising.ranks import Ranks
from hi_diffusers.families.hidream.prompts import PromptEmbeds
from hi_diffusers.families.hidream.transformer import Conditioning, HiDreamImageTransformer2DModel

NUM_TIMESTEPS = 1000  # the timestep of noise alone


class GuidedDenoiser:
    """Computes the guided velocity of a step.

    Args:
        transformer: the network; its output is minus the velocity.
        timesteps: timesteps of all steps; best on the CPU, where the host reads them without waiting for the device.
        embeds: embeddings of B prompts, or of [negative, positive] if guidance is above 1.
        guidance: classifier-free guidance scale; 1 or less turns guidance off.
        gated: whether the blocks' gates of all steps are computed at once, for forecasts of all blocks.
        attention_kwargs: {"scale": ...} scales LoRA.
        ranks: the processes that draw together; None: this one alone.

    Attributes:
        levels: the timesteps as numbers.
        index: the step that is or was computed last; None before the first.
    """

    def __init__(
        self,
        transformer: HiDreamImageTransformer2DModel,
        timesteps: Tensor,
        embeds: PromptEmbeds,
        guidance: float,
        gated: bool,
        attention_kwargs: dict[str, Any] | None = None,
        ranks: Ranks | None = None,
    ):
        self.transformer, self.timesteps, self.embeds, self.guidance = transformer, timesteps, embeds, guidance
        self.attention_kwargs, self.ranks = attention_kwargs, ranks
        self.sum_over_ranks = None if ranks is None else ranks.sum
        self.gated = (
            gated and not attention_kwargs
        )  # gates are computed outside of forward, where the LoRA scale is not applied
        self.dtype = (
            transformer.dtype
        )  # kept, since diffusers searches all modules for it, which costs more than an x0 forecast
        self.conditioning: Conditioning | None = None
        self.levels: list[float] = timesteps.tolist()
        self.index: int | None = None

    @property
    def timestep(self) -> float | None:
        """The timestep that is or was computed last; None before the first."""
        return None if self.index is None else self.levels[self.index]

    @property
    def has_one_branch(self) -> bool:
        """Whether this rank computes one of the two branches of guidance."""
        return self.guidance > 1 and self.ranks is not None and self.ranks.split.guidance

    def condition(self, latents: Tensor) -> None:
        """Compute the tensors that are constant over the generation, for latents [B,C,H,W] of that size."""
        self.timesteps = self.timesteps.to(latents.device)
        following = 0 if self.index is None else self.index + 1
        self.transformer.begin_drawing(self.levels, following, self.guidance > 1)
        patch_size = self.transformer.config.patch_size
        grid = (latents.shape[-2] // patch_size, latents.shape[-1] // patch_size)
        embeds = self.embeds
        if self.has_one_branch:
            assert self.ranks is not None
            embeds = embeds.chunk(2)[self.ranks.branch]
        texts = (text.to(self.dtype) for text in (embeds.t5, embeds.llama, embeds.pooled))
        conditioning = self.transformer.prepare(*texts, grid)
        self.conditioning = self.transformer.prepare_gates(conditioning, self.timesteps) if self.gated else conditioning

    def __call__(self, latents: Tensor, index: int, cache_dic: CacheState | None, current: Current) -> Tensor:
        """The guided velocity [B,C,H,W], fp32."""
        negative, *positive = self.branches(latents, index, cache_dic, current)
        return negative + self.guidance * (positive[0] - negative) if positive else negative

    def branches(
        self, latents: Tensor, index: int, cache_dic: CacheState | None, current: Current
    ) -> tuple[Tensor, ...]:
        """The velocities [B,C,H,W] of the negative and of the positive prompt, or the only one, fp32."""
        both = self.guidance > 1 and not self.has_one_branch
        branches = torch.cat((latents, latents)) if both else latents
        self.index = index
        with self.transformer.cache_context(
            "cond",
            step_index=index,
            num_inference_steps=len(self.levels),
            timestep=self.levels[index],
            sigma=self.levels[index] / NUM_TIMESTEPS,
        ):
            (output,) = self.transformer(
                branches.to(self.dtype),
                self.timesteps[index].expand(len(branches)),
                attention_kwargs=self.attention_kwargs,
                return_dict=False,
                conditioning=self.conditioning,
                cache_dic=cache_dic,
                current=current,
            )
        velocity = -output.float()
        if self.has_one_branch:
            assert self.ranks is not None
            return self.ranks.gather_branches(velocity)
        return velocity.chunk(2) if both else (velocity,)
