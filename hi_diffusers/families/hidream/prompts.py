"""Prompt embeddings, and the parts of a prompt that are cut off."""

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hi_diffusers.families.family import TokenCount
from hi_diffusers.preset import unknown_words


@dataclass(frozen=True)
class PromptEmbeds:
    """The text encoders' output for a batch of prompts.

    Attributes:
        t5: [B,T,4096] at full size.
        llama: hidden states of all layers, [32,B,T,4096] at full size.
        pooled: both CLIPs' pooled vectors, [B,2048] at full size.
    """

    t5: Tensor
    llama: Tensor
    pooled: Tensor

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> "PromptEmbeds":
        """Make embeddings from tensors by name; raises KeyError if one is missing."""
        return cls(tensors["t5"], tensors["llama"], tensors["pooled"])

    @classmethod
    def join(cls, rows: Sequence["PromptEmbeds"]) -> "PromptEmbeds":
        """Join several batches of prompts into one, in their order."""
        return cls(
            torch.cat([row.t5 for row in rows]),
            torch.cat([row.llama for row in rows], dim=1),
            torch.cat([row.pooled for row in rows]),
        )

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by name."""
        return {"t5": self.t5, "llama": self.llama, "pooled": self.pooled}

    def to(self, device: torch.device) -> "PromptEmbeds":
        """A copy on another device."""
        return PromptEmbeds(self.t5.to(device), self.llama.to(device), self.pooled.to(device))

    def chunk(self, parts: int) -> list["PromptEmbeds"]:
        """Split the batch into equal parts."""
        chunks = zip(self.t5.chunk(parts), self.llama.chunk(parts, dim=1), self.pooled.chunk(parts), strict=True)
        return [PromptEmbeds(*one) for one in chunks]

    def after(self, negative: "PromptEmbeds") -> "PromptEmbeds":
        """Both guidance branches as one batch: [negative, positive]."""
        return self.join((negative, self))


def count_tokens(tokenizers: Sequence[Any], prompt: str, limit: int, vocabulary: Container[str] | None) -> TokenCount:
    """Count a prompt's tokens, and find the words that are cut off or unknown.

    Args:
        tokenizers: both CLIPs', T5's and Llama's.
        limit: number of tokens that are read.
        vocabulary: the words that the model was taught; None is no limit.
    """
    tokens = max(len(one(prompt, truncation=False, verbose=False)["input_ids"]) for one in tokenizers)
    lost = max((lost_words(one, prompt, limit) for one in tokenizers), key=len)
    unknown = () if vocabulary is None else tuple(unknown_words(prompt, vocabulary))
    return TokenCount(tokens, limit, lost, unknown)


def lost_words(tokenizer: Any, prompt: str, max_length: int) -> str:
    """The end of the prompt that does not fit into `max_length` tokens; empty if the whole prompt fits."""
    encoded = tokenizer(prompt, truncation=True, max_length=max_length, return_offsets_mapping=True)
    end = max((stop for _, stop in encoded["offset_mapping"]), default=0)
    whole = tokenizer(prompt, truncation=False, return_offsets_mapping=True, verbose=False)
    if len(whole["input_ids"]) <= max_length:
        return ""
    return prompt[end:].strip()
