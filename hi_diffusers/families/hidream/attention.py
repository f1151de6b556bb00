"""Joint attention over image and text tokens, with RMS-normed and rotated queries and keys.

Shapes: B batch, S image tokens, T text tokens, N tokens, D width, H heads.
"""

from typing import Any

import torch
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import Tensor, nn

from hi_diffusers.families.hidream.embeddings import Rotary
from hi_diffusers.families.hidream.fast_paths import HasFastPaths

RMS_NORM_EPS = 1e-5


class HiDreamAttnProcessor:
    """The default processor. diffusers' `set_attention_backend` sets `_attention_backend` on it."""

    _attention_backend = None
    _parallel_config = None

    def __call__(
        self,
        attn: "HiDreamAttention",
        tokens: Tensor,
        text: Tensor | None,
        rotary: Rotary,
        key_mask: Tensor | None,
        num_queries: int,
    ) -> Tensor | tuple[Tensor, Tensor]:
        num_image = rotary.cos.shape[1]
        num_tokens = tokens.shape[1] if text is not None else num_queries
        query = attn.split_heads(attn.q_rms_norm(attn.to_q(tokens[:, :num_tokens])))
        key = attn.split_heads(attn.k_rms_norm(attn.to_k(tokens)))
        value = attn.split_heads(attn.to_v(tokens))
        rotate = _rotate_image_in_place if attn.rotates_in_place(query) else _rotate_image
        query, key = rotate(query, rotary, num_image), rotate(key, rotary, num_image, key_mask)
        if text is not None:
            num_text = num_queries - num_tokens
            query_text = attn.split_heads(attn.q_rms_norm_t(attn.to_q_t(text[:, :num_text])))
            query = torch.cat((query, query_text), dim=1)
            key = torch.cat((key, attn.split_heads(attn.k_rms_norm_t(attn.to_k_t(text)))), dim=1)
            value = torch.cat((value, attn.split_heads(attn.to_v_t(text))), dim=1)
        mixed = dispatch_attention_fn(
            query, key, value, backend=self._attention_backend, parallel_config=self._parallel_config
        )
        mixed = mixed.flatten(2).to(tokens.dtype)
        if text is None:
            return attn.to_out(mixed)
        return attn.to_out(mixed[:, :num_tokens]), attn.to_out_t(mixed[:, num_tokens:])


class HiDreamAttention(HasFastPaths, nn.Module, AttentionModuleMixin):
    """Attention of one block; in a double-stream block text tokens have their own projections.

    Args:
        width: D.
        num_heads: H.
        head_dim: channels per head, D / H.
        single: whether image and text tokens share one set of projections.
    """

    processor: Any  # both come from the mixin
    set_processor: Any
    _default_processor_cls = HiDreamAttnProcessor
    _available_processors = (HiDreamAttnProcessor,)
    _supports_qkv_fusion = False

    def __init__(self, width: int, num_heads: int, head_dim: int, single: bool):
        super().__init__()
        inner = num_heads * head_dim
        self.heads = num_heads
        self.single = single
        self.to_q = nn.Linear(width, inner)
        self.to_k = nn.Linear(width, inner)
        self.to_v = nn.Linear(width, inner)
        self.to_out = nn.Linear(inner, width)
        self.q_rms_norm = nn.RMSNorm(inner, RMS_NORM_EPS)
        self.k_rms_norm = nn.RMSNorm(inner, RMS_NORM_EPS)
        if not single:
            self.to_q_t = nn.Linear(width, inner)
            self.to_k_t = nn.Linear(width, inner)
            self.to_v_t = nn.Linear(width, inner)
            self.to_out_t = nn.Linear(inner, width)
            self.q_rms_norm_t = nn.RMSNorm(inner, RMS_NORM_EPS)
            self.k_rms_norm_t = nn.RMSNorm(inner, RMS_NORM_EPS)
        self.set_processor(HiDreamAttnProcessor())

    def rotates_in_place(self, heads: Tensor) -> bool:
        """Whether the faster rotation is used; compilers and MPS do not support its complex numbers."""
        return self.takes("rotation") and heads.device.type != "mps" and not torch.compiler.is_compiling()

    def split_heads(self, projected: Tensor) -> Tensor:
        """[B,N,D] to [B,N,H,head_dim]."""
        return projected.unflatten(-1, (self.heads, -1))

    def forward(
        self,
        tokens: Tensor,
        text: Tensor | None,
        rotary: Rotary,
        key_mask: Tensor | None = None,
        num_queries: int | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Mix the tokens.

        Args:
            tokens: double stream: image tokens [B,S,D]; single stream: image, then text tokens [B,N,D].
            text: double stream: text tokens [B,T,D]; single stream: None.
            rotary: rotation of the image tokens.
            key_mask: [B or 1, S], 0 where a token is padding: its key is multiplied by 0 and so keeps its softmax
                weight, as in training; None without padding.
            num_queries: number of leading tokens, in the order (tokens, text), whose result is needed; the others
                are keys and values only. None is all.

        Returns:
            Double stream: (image [B,S,D], text [B,num_queries-S,D]); single stream: [B,num_queries,D].
        """
        if num_queries is None:
            num_queries = tokens.shape[1] + (0 if text is None else text.shape[1])
        return self.processor(self, tokens, text, rotary, key_mask, num_queries)


def _rotate_image(heads: Tensor, rotary: Rotary, num_image: int, key_mask: Tensor | None = None) -> Tensor:
    image = rotary.rotate(heads[:, :num_image])
    if key_mask is not None:
        image = image * key_mask[:, :, None, None].to(image.dtype)
    if heads.shape[1] == num_image:
        return image
    return torch.cat((image, heads[:, num_image:]), dim=1)


def _rotate_image_in_place(heads: Tensor, rotary: Rotary, num_image: int, key_mask: Tensor | None = None) -> Tensor:
    image = heads[:, :num_image]
    rotary.rotate_in_place(image)
    if key_mask is not None:
        image.mul_(key_mask[:, :, None, None].to(image.dtype))
    return heads
