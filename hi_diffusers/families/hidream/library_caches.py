"""The caches that diffusers brings (`transformer.enable_cache`), fitted to this transformer's blocks and names.

Shapes: B batch, S image tokens, T text tokens, D width.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from diffusers.hooks import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    MagCacheConfig,
    SeaCacheConfig,
    TaylorSeerCacheConfig,
    TextKVCacheConfig,
)
from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
from diffusers.hooks.faster_cache import _apply_faster_cache_on_attention_class as hook_attention
from diffusers.models.cache_utils import CacheMixin
from torch import Tensor, nn

from cache_functions import CacheState
from hi_diffusers.families.hidream.blocks import DoubleStreamBlock, HiDreamBlock

# The only list of blocks in which caches of the whole stack look, since all know this name.
STAGES = "transformer_blocks"
OF_THE_STACK = (FirstBlockCacheConfig, MagCacheConfig, SeaCacheConfig)
# Regular expressions of names, for TaylorSeerCacheConfig.
BLOCKS = r"(double|single)_stream_blocks\.\d+"
ATTENTIONS = BLOCKS + r"\.block\.attn1"
SUBLAYERS = BLOCKS + r"\.block\.(attn1|ff_i|ff_t)"
LAST_LAYER = "final_layer"
# What a forward takes of both branches of guidance, besides what diffusers lists.
OF_BOTH_BRANCHES = ("timesteps", "conditioning")


class Stage(nn.Module):
    """A block of either kind in the one form that caches of the whole stack need: from (image, text) to (image, text).

    The block is not a child, so that the names and the weights of the model stay what they are.

    Args:
        block: the block.
        is_last: whether nobody reads its text, which is then returned as it came.
    """

    def __init__(self, block: HiDreamBlock, is_last: bool):
        super().__init__()
        self._held = (block,)
        self.is_last = is_last

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, *inputs: Any) -> tuple[Tensor, Tensor]:
        """Run the block.

        Args:
            hidden_states: image tokens [B,S,D].
            encoder_hidden_states: text tokens [B,T,D].
            inputs: what a block takes besides: llama, temb, rotary, key_mask.
        """
        (block,) = self._held
        if isinstance(block.block, DoubleStreamBlock):
            image, text = block(hidden_states, encoder_hidden_states, *inputs)
            return image, text
        num_image = hidden_states.shape[1]
        tokens = torch.cat((hidden_states, encoder_hidden_states), dim=1)
        tokens = block(tokens, *inputs, num_image if self.is_last else None)
        return tokens[:, :num_image], encoder_hidden_states if self.is_last else tokens[:, num_image:]


class LibraryCaches(CacheMixin):
    """Mixin: diffusers' `CacheMixin` for a transformer whose blocks stand in two lists with names of their own."""

    double_stream_blocks: nn.ModuleList
    single_stream_blocks: nn.ModuleList

    @property
    def stages(self) -> nn.ModuleList | None:
        """All blocks as stages while a cache of the whole stack is switched on, else None."""
        return self._modules.get(STAGES)

    def enable_cache(self, config: Any) -> None:
        """Switch on one of diffusers' caches.

        Args:
            config: FirstBlockCacheConfig, MagCacheConfig, SeaCacheConfig, PyramidAttentionBroadcastConfig,
                FasterCacheConfig or TaylorSeerCacheConfig.

        Raises:
            ValueError: if the cache cannot work with this transformer, would skip nothing, or another one is on.
        """
        if is_wrapped_by_cache_dit(self):
            raise ValueError("cache-dit is switched on: call cache_dit.disable_cache before enable_cache")
        if self.is_cache_enabled:
            name = type(self._cache_config).__name__
            raise ValueError(f"{name} is switched on: call disable_cache before enable_cache")
        config = fit_config(config)
        before = self._count_hooks()
        with self._stages_for(config):
            super().enable_cache(config)
        if isinstance(config, FasterCacheConfig):
            self._hook_attentions(config)
        if self._count_hooks() == before and not skips_branch_alone(config):
            self.disable_cache()
            names = SUBLAYERS if isinstance(config, TaylorSeerCacheConfig) else ATTENTIONS
            raise ValueError(
                f"{type(config).__name__} would skip nothing, since its identifiers match no module of this transformer"
                f" ({names} does)"
            )

    def disable_cache(self) -> None:
        """Switch diffusers' cache off."""
        super().disable_cache()
        self._modules.pop(STAGES, None)

    def begin_drawing(self, timesteps: Sequence[float], index: int, guided: bool) -> None:
        """Let a cache, if one is switched on, forget what it keeps: a drawing begins, or goes on with another text.

        Args:
            timesteps: timesteps of all steps.
            index: the step that comes next.
            guided: whether the batch holds both branches of classifier-free guidance.

        Raises:
            ValueError: if the cache was made for other drawings, or cannot begin here.
        """
        if is_wrapped_by_cache_dit(self):
            check_cache_dit(self._context_manager, index)
        config = self._cache_config
        if config is None:
            return
        if isinstance(config, MagCacheConfig) and config.num_inference_steps != len(timesteps):
            raise ValueError(
                f"MagCacheConfig was made for num_inference_steps={config.num_inference_steps}, and the drawing has "
                f"{len(timesteps)} steps"
            )
        if isinstance(config, FasterCacheConfig) and index < len(timesteps):
            check_faster_cache(config, timesteps[index], guided)
        self._reset_stateful_cache()

    def check_caches(self, cache_dic: CacheState | None) -> None:
        """Raise ValueError if two caches are switched on."""
        caches = [] if cache_dic is None else ["cache="]
        if self.is_cache_enabled:
            caches.append(type(self._cache_config).__name__)
        if is_wrapped_by_cache_dit(self):
            caches.append("cache-dit")
        if len(caches) > 1:
            raise ValueError(
                f"two caches are switched on, {' and '.join(caches)}: leave out cache=, or call "
                "transformer.disable_cache() or cache_dit.disable_cache(pipe)"
            )

    @contextmanager
    def _stages_for(self, config: Any) -> Iterator[None]:
        """Make the stages that caches of the whole stack hook; remove them if that fails."""
        if not isinstance(config, OF_THE_STACK):
            yield
            return
        metadata = TransformerBlockMetadata(return_hidden_states_index=0, return_encoder_hidden_states_index=1)
        TransformerBlockRegistry.register(Stage, metadata)
        blocks = [*self.double_stream_blocks, *self.single_stream_blocks]
        self._modules[STAGES] = nn.ModuleList([Stage(block, block is blocks[-1]) for block in blocks])
        try:
            yield
        except BaseException:
            del self._modules[STAGES]
            raise

    def _hook_attentions(self, config: FasterCacheConfig) -> None:
        """Hook the attentions under names that FasterCache takes: it hooks none that stands outside of STAGES."""
        for stack in ("double_stream_blocks", "single_stream_blocks"):
            for index, block in enumerate(getattr(self, stack)):
                hook_attention(f"{STAGES}.{stack}.{index}.block.attn1", block.block.attn1, config)

    def _count_hooks(self) -> int:
        """The number of diffusers' hooks on the modules below this one."""
        registries = [getattr(module, "_diffusers_hook", None) for module in self.modules() if module is not self]
        return sum(len(registry.hooks) for registry in registries if registry is not None)


def is_wrapped_by_cache_dit(transformer: nn.Module) -> bool:
    """Whether `cache_dit.enable_cache` is in force."""
    return bool(getattr(transformer, "_is_cached", False))


def check_cache_dit(manager: Any, index: int) -> None:
    """Raise ValueError if cache-dit would go on with features of another drawing or text.

    Args:
        manager: cache-dit's context manager; outside of the pipeline's call, which resets it, it has no context.
        index: the step that comes next.
    """
    if manager._current_context is None and not manager.persistent_context:
        raise ValueError("cache-dit works in pipe(...) alone: draw with it, or call cache_dit.disable_cache(pipe)")
    if index > 0:
        raise ValueError("cache-dit cannot go on with another text: call cache_dit.disable_cache(pipe) to change it")


def fit_config(config: Any) -> Any:
    """A configuration with what diffusers leaves open filled in for this transformer.

    Raises:
        ValueError: if the cache cannot work with this transformer.
    """
    if isinstance(config, TextKVCacheConfig):
        raise ValueError(
            "TextKVCacheConfig keeps keys and values of a text that is the same at every step, and HiDream's changes "
            "with the timestep: use FirstBlockCacheConfig, or cache=CacheConfig.best(K) of the pipeline"
        )
    if isinstance(config, FasterCacheConfig):
        return _fit_faster_cache(config)
    if isinstance(config, TaylorSeerCacheConfig):
        return _fit_taylorseer(config)
    if isinstance(config, SeaCacheConfig) and config.raw_vision_callback is None:
        return replace(config, raw_vision_callback=_latents_as_frames)
    return config


def skips_branch_alone(config: Any) -> bool:
    """Whether FasterCache is to leave out the unconditional branch, and no attention."""
    return isinstance(config, FasterCacheConfig) and config.spatial_attention_block_skip_range is None


def check_faster_cache(config: FasterCacheConfig, timestep: float, guided: bool) -> None:
    """Raise ValueError if FasterCache cannot begin at a timestep of such a drawing."""
    if config.is_guidance_distilled:
        low, high = config.spatial_attention_timestep_skip_range
        if low < timestep < high:
            raise ValueError(
                f"FasterCacheConfig.spatial_attention_timestep_skip_range must leave out the timestep {timestep}, at "
                f"which nothing has been computed yet, got ({low}, {high})"
            )
    elif not guided:
        raise ValueError("FasterCacheConfig needs is_guidance_distilled=True to draw without guidance")


def _fit_faster_cache(config: FasterCacheConfig) -> FasterCacheConfig:
    if config.tensor_format != "BCHW":
        raise ValueError(f'FasterCacheConfig.tensor_format must be "BCHW" for pictures, got "{config.tensor_format}"')
    if config.current_timestep_callback is None:
        raise ValueError("FasterCacheConfig needs current_timestep_callback=lambda: pipe.current_timestep, got None")
    split = (*config._unconditional_conditional_input_kwargs_identifiers, *OF_BOTH_BRANCHES)
    return replace(config, _unconditional_conditional_input_kwargs_identifiers=split)


def _fit_taylorseer(config: TaylorSeerCacheConfig) -> TaylorSeerCacheConfig:
    """diffusers' default is all attentions, its lite mode all blocks and the layer after them, by other names."""
    if config.use_lite_mode:
        return replace(config, use_lite_mode=False, skip_predict_identifiers=[BLOCKS], cache_identifiers=[LAST_LAYER])
    return config if config.cache_identifiers else replace(config, cache_identifiers=[ATTENTIONS])


def _latents_as_frames(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor] | None:
    """The latents of a forward, each picture [C,H,W] as a film of one frame [C,1,H,W]; None for patches."""
    latents = args[0] if args else kwargs["hidden_states"]
    return [latent[:, None] for latent in latents] if latents.ndim == 4 else None
