"""Prompt embeddings, and what of a prompt the model does not get to see."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class PromptEmbeds:
    """What the text encoders make of a batch of prompts.

    Attributes:
        t5: [B,T,4096] at full size.
        llama: hidden states of all layers, [32,B,T,4096] at full size.
        pooled: both CLIPs' pooled vectors, [B,2048] at full size.
    """

    t5: Tensor
    llama: Tensor
    pooled: Tensor

    def to(self, device: torch.device) -> "PromptEmbeds":
        """The same on a device."""
        return PromptEmbeds(self.t5.to(device), self.llama.to(device), self.pooled.to(device))

    def after(self, negative: "PromptEmbeds") -> "PromptEmbeds":
        """Both guidance branches as one batch: [negative, positive]."""
        return PromptEmbeds(
            torch.cat((negative.t5, self.t5)),
            torch.cat((negative.llama, self.llama), dim=1),
            torch.cat((negative.pooled, self.pooled)),
        )


@dataclass(frozen=True)
class TokenCount:
    """What a model sees of a prompt.

    Attributes:
        tokens: of the longest reading of the four tokenizers.
        limit: how many are read.
        lost: the end of the prompt that is not.
        unknown: words that the bundled model has no token for.
    """

    tokens: int
    limit: int
    lost: str
    unknown: tuple[str, ...]


def count_tokens(tokenizers: Sequence[Any], prompt: str, limit: int, is_bundled: bool) -> TokenCount:
    """Read a prompt as a model does.

    Args:
        tokenizers: both CLIPs', T5's and Llama's.
        limit: tokens that are read.
        is_bundled: the model is the bundled one, whose vocabulary is small.
    """
    tokens = max(len(one(prompt, truncation=False, verbose=False)["input_ids"]) for one in tokenizers)
    lost = max((lost_words(one, prompt, limit) for one in tokenizers), key=len)
    return TokenCount(tokens, limit, lost, tuple(unknown_words(tokenizers[2], prompt)) if is_bundled else ())


def lost_words(tokenizer: Any, prompt: str, max_length: int) -> str:
    """The end of the prompt that does not fit into `max_length` tokens; empty if all of it does."""
    encoded = tokenizer(prompt, truncation=True, max_length=max_length, return_offsets_mapping=True)
    end = max((stop for _, stop in encoded["offset_mapping"]), default=0)
    whole = tokenizer(prompt, truncation=False, return_offsets_mapping=True, verbose=False)
    if len(whole["input_ids"]) <= max_length:
        return ""
    return prompt[end:].strip()


def unknown_words(tokenizer: Any, prompt: str) -> list[str]:
    """The prompt's words that the tokenizer has no token for, in order, each once."""
    encoded = tokenizer(prompt, return_offsets_mapping=True, verbose=False)
    words = [
        prompt[start:stop]
        for token, (start, stop) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
        if token == tokenizer.unk_token_id and stop > start
    ]
    return list(dict.fromkeys(words))
