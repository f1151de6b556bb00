"""The two kinds of blocks. Each has two cached features: the outputs of its attention and of its feed-forward.

A block takes its tokens first, under diffusers' names for them: other caches look for these names.

Text tokens come in two parts: `text`, which runs through all blocks, and `llama`, the states of this block's own Llama
layer, which are read in this block only. The latter serve as keys and values; their outputs are not needed, so they
are not computed.

Shapes: B batch, S image tokens, T text tokens, D width.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cache_functions import CacheState, Current, FeatureName, compute_or_forecast, forecasts
from hi_diffusers.families.hidream.attention import HiDreamAttention
from hi_diffusers.families.hidream.embeddings import Rotary
from hi_diffusers.families.hidream.fast_paths import HasFastPaths
from hi_diffusers.families.hidream.moe import MoEFeedForward, SwiGLU

TARGET = "module"
PARTS = ("attention", "feed_forward")
NORM_EPS = 1e-6
# Indices of the image stream's two gates among the modulation's chunks of D rows.
IMAGE_GATES = (2, 5)


@dataclass(frozen=True)
class Modulation:
    """How the timestep modulates one sub-layer (AdaLN-Zero, arXiv 2212.09748); each [B,1,D].

    On a forecast step nothing is normalized, and `shift` and `scale` are None. `fused` is `FastPaths.fewer_passes`.
    """

    shift: Tensor | None
    scale: Tensor | None
    gate: Tensor
    fused: bool = False

    def apply(self, norm: nn.LayerNorm, tokens: Tensor) -> Tensor:
        """Normalize and modulate tokens [B,N,D]."""
        assert self.shift is not None and self.scale is not None, "on a forecast step nothing is normed"
        if self.fused:
            normed = norm(tokens)
            return torch.addcmul(self.shift, normed, self.scale + 1, out=normed)
        return norm(tokens) * (1 + self.scale) + self.shift

    def add(self, tokens: Tensor, mixed: Tensor) -> Tensor:
        """Add the sub-layer's gated result [B,N,D] to the tokens that it was computed from."""
        return torch.addcmul(tokens, self.gate, mixed) if self.fused else tokens + self.gate * mixed


class AdaLN(HasFastPaths, nn.Sequential):
    """The projection of the timestep embedding [B,D] to the modulations of a block's sub-layers."""

    def __init__(self, width: int, num_modulations: int):
        super().__init__(nn.SiLU(), nn.Linear(width, 3 * num_modulations * width))

    def modulations(self, temb: Tensor) -> list[Modulation]:
        """One modulation per sub-layer: the image's attention and feed-forward, then the text's."""
        chunks = self(temb)[:, None].split(temb.shape[-1], dim=-1)
        fused = self.takes("fewer_passes")
        return [
            Modulation(shift, scale, gate, fused)
            for shift, scale, gate in zip(chunks[::3], chunks[1::3], chunks[2::3], strict=True)
        ]

    def image_gates(self, temb: Tensor) -> list[Modulation]:
        """The gates of the image's two sub-layers, without computing the rest of the projection."""
        activation, linear = self
        width = temb.shape[-1]
        if type(linear) is not nn.Linear or hasattr(linear, "_hf_hook") or hasattr(linear, "_diffusers_hook"):
            return self.modulations(temb)[: len(IMAGE_GATES)]
        temb = activation(temb)
        rows = [slice(gate * width, (gate + 1) * width) for gate in IMAGE_GATES]
        gates = [F.linear(temb, linear.weight[row], linear.bias[row])[:, None] for row in rows]
        return [Modulation(None, None, gate, self.takes("fewer_passes")) for gate in gates]


class CachedBlock(nn.Module):
    """A block with two cached features: the outputs of its attention and of its feed-forward.

    Attributes:
        layer: index over both stacks, which names its features in the cache.
    """

    layer: int

    def feature(self, part: str) -> FeatureName:
        """The name under which the cache keeps "attention" or "feed_forward" of this block."""
        return FeatureName(TARGET, self.layer, part)


class DoubleStreamBlock(CachedBlock):
    """A block in which image and text tokens attend jointly, each with their own weights.

    Args:
        width: D.
        num_heads: attention heads.
        head_dim: channels per head.
        num_experts: routed experts of the image feed-forward; 0 makes it a plain SwiGLU.
        num_activated: experts per token.
        layer: index over both stacks, which names its features in the cache.
    """

    def __init__(self, width: int, num_heads: int, head_dim: int, num_experts: int, num_activated: int, layer: int):
        super().__init__()
        self.layer = layer
        self.adaLN_modulation = AdaLN(width, num_modulations=4)
        self.norm1_i = nn.LayerNorm(width, eps=NORM_EPS, elementwise_affine=False)
        self.norm1_t = nn.LayerNorm(width, eps=NORM_EPS, elementwise_affine=False)
        self.attn1 = HiDreamAttention(width, num_heads, head_dim, single=False)
        self.norm3_i = nn.LayerNorm(width, eps=NORM_EPS, elementwise_affine=False)
        self.ff_i = _image_feed_forward(width, num_experts, num_activated)
        self.norm3_t = nn.LayerNorm(width, eps=NORM_EPS, elementwise_affine=False)
        self.ff_t = SwiGLU(width, 4 * width)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        llama: tuple[Tensor, ...],
        temb: Tensor,
        rotary: Rotary,
        key_mask: Tensor | None = None,
        cache_dic: CacheState | None = None,
        current: Current | None = None,
    ) -> tuple[Tensor, Tensor]:
        """One block.

        Args:
            hidden_states: image tokens [B,S,D].
            encoder_hidden_states: text tokens [B,T,D].
            llama: every block's Llama tokens, [B,T',D] each.
            temb: timestep and pooled text [B,D].
            rotary: rotation of the image tokens.
            key_mask: [B or 1, S], see `HiDreamAttention`.
            cache_dic, current: the cache and the running step, or None.

        Returns:
            (image, text); on a forecast step `text` is returned unchanged.
        """
        image, text = hidden_states, encoder_hidden_states
        text_attention: Modulation | None = None
        text_ff: Modulation | None = None
        if forecasts(cache_dic, current, TARGET):
            image_attention, image_ff = self.adaLN_modulation.image_gates(temb)
        else:
            image_attention, image_ff, text_attention, text_ff = self.adaLN_modulation.modulations(temb)

        def attend() -> tuple[Tensor, Tensor]:
            assert text_attention is not None
            context = text_attention.apply(self.norm1_t, torch.cat((text, llama[self.layer]), dim=1))
            num_queries = image.shape[1] + text.shape[1]
            return self.attn1(image_attention.apply(self.norm1_i, image), context, rotary, key_mask, num_queries)

        mixed, text_mixed = compute_or_forecast(cache_dic, current, self.feature("attention"), attend)
        image = image_attention.add(image, mixed)
        if text_mixed is not None and text_attention is not None:
            text = text_attention.add(text, text_mixed)

        def feed_forward() -> tuple[Tensor, Tensor]:
            assert text_ff is not None
            return self.ff_i(image_ff.apply(self.norm3_i, image)), self.ff_t(text_ff.apply(self.norm3_t, text))

        mixed, text_mixed = compute_or_forecast(cache_dic, current, self.feature("feed_forward"), feed_forward)
        image = image_ff.add(image, mixed)
        if text_mixed is not None and text_ff is not None:
            text = text_ff.add(text, text_mixed)
        return image, text


class SingleStreamBlock(CachedBlock):
    """A block in which image and text tokens are one sequence. Arguments as in `DoubleStreamBlock`."""

    def __init__(self, width: int, num_heads: int, head_dim: int, num_experts: int, num_activated: int, layer: int):
        super().__init__()
        self.layer = layer
        self.adaLN_modulation = AdaLN(width, num_modulations=2)
        self.norm1_i = nn.LayerNorm(width, eps=NORM_EPS, elementwise_affine=False)
        self.attn1 = HiDreamAttention(width, num_heads, head_dim, single=True)
        self.norm3_i = nn.LayerNorm(width, eps=NORM_EPS, elementwise_affine=False)
        self.ff_i = _image_feed_forward(width, num_experts, num_activated)

    def forward(
        self,
        hidden_states: Tensor,
        llama: tuple[Tensor, ...],
        temb: Tensor,
        rotary: Rotary,
        key_mask: Tensor | None = None,
        num_outputs: int | None = None,
        cache_dic: CacheState | None = None,
        current: Current | None = None,
    ) -> Tensor:
        """One block.

        Args:
            hidden_states: image, then text tokens [B,S+T,D]; on a forecast step the image tokens alone [B,S,D].
            llama, temb, rotary, key_mask, cache_dic, current: as in `DoubleStreamBlock`.
            num_outputs: number of leading tokens that are needed later, at least S; None is all.

        Returns:
            [B,num_outputs,D].
        """
        tokens = hidden_states
        if forecasts(cache_dic, current, TARGET):
            attention, feed = self.adaLN_modulation.image_gates(temb)
        else:
            attention, feed = self.adaLN_modulation.modulations(temb)
        num_image = rotary.cos.shape[1]
        num_outputs = tokens.shape[1] if num_outputs is None else num_outputs

        def attend() -> tuple[Tensor, Tensor]:
            whole = attention.apply(self.norm1_i, torch.cat((tokens, llama[self.layer]), dim=1))
            mixed = self.attn1(whole, None, rotary, key_mask, num_outputs)
            return mixed[:, :num_image], mixed

        image_mixed, mixed = compute_or_forecast(cache_dic, current, self.feature("attention"), attend)
        tokens = attention.add(tokens[:, :num_outputs], image_mixed if mixed is None else mixed)

        def feed_forward() -> tuple[Tensor, Tensor]:
            mixed = self.ff_i(feed.apply(self.norm3_i, tokens))
            return mixed[:, :num_image], mixed

        image_mixed, mixed = compute_or_forecast(cache_dic, current, self.feature("feed_forward"), feed_forward)
        return feed.add(tokens, image_mixed if mixed is None else mixed)


class HiDreamBlock(nn.Module):
    """A wrapper for the level `block` in the checkpoint's keys."""

    def __init__(self, block: DoubleStreamBlock | SingleStreamBlock):
        super().__init__()
        self.block = block

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the block; offloading hooks are attached to this level."""
        return self.block(*args, **kwargs)


def _image_feed_forward(width: int, num_experts: int, num_activated: int) -> MoEFeedForward | SwiGLU:
    if num_experts == 0:
        return SwiGLU(width, 4 * width)
    return MoEFeedForward(width, 4 * width, num_experts, num_activated)
