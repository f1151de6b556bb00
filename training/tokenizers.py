"""Word-level tokenizers of hidream-nano: one vocabulary in the shapes that its four text encoders expect."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

PAD, EOS, BOS, UNK = SPECIAL_TOKENS = ("<pad>", "<eos>", "<bos>", "<unk>")
"""Ids 0 to 3. <eos> must not be 2: or transformers' CLIP pools at the largest id, not the first <eos>."""

FOLDERS = ("tokenizer", "tokenizer_2", "tokenizer_3", "tokenizer_4")

_TEMPLATES = {
    "tokenizer": (f"{BOS} $A {EOS}", EOS, 248),
    "tokenizer_2": (f"{BOS} $A {EOS}", EOS, 248),
    "tokenizer_3": (f"$A {EOS}", PAD, 512),
    # diffusers pads Llama with its <eos>, whatever the tokenizer says, so <eos> ends no prompt here
    "tokenizer_4": (f"{BOS} $A", EOS, 512),
}


def build_tokenizers(vocabulary: list[str]) -> dict[str, PreTrainedTokenizerFast]:
    """Tokenizers by folder name: CLIP twice (<bos> words <eos>), T5 (words <eos>) and Llama (<bos> words).

    Texts are lower-cased and split at white space and around punctuation; an unknown word becomes <unk>.
    Padding is on the right. The longest text is 248 tokens for CLIP, 512 for T5 and Llama.

    `vocabulary` holds lower-case words and punctuation marks; a word's id is its index + 4. Raises ValueError
    if a word stands there twice or could not come out of the splitting.
    """
    words = list(SPECIAL_TOKENS) + list(vocabulary)
    if len(set(words)) != len(words):
        raise ValueError("vocabulary has a word twice, or one of the special tokens <pad>, <eos>, <bos>, <unk>")
    split = [
        word
        for word in vocabulary
        if _splitter().pre_tokenize_str(word) != [(word, (0, len(word)))] or word != word.lower()
    ]
    if split:
        raise ValueError(f"vocabulary words {split} are not lower case or would be split; they would never be found")
    ids = {word: index for index, word in enumerate(words)}
    return {folder: _tokenizer(ids, *_TEMPLATES[folder]) for folder in FOLDERS}


def _splitter() -> pre_tokenizers.PreTokenizer:
    # the very split of the grammar: an underscore only separates
    return pre_tokenizers.Split(Regex(r"[^\W_]+|[^\w\s]"), behavior="removed", invert=True)


def _tokenizer(ids: dict[str, int], template: str, pad: str, max_length: int) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(WordLevel(ids, unk_token=UNK))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = _splitter()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=template,
        pair=None,
        special_tokens=[(token, ids[token]) for token in (BOS, EOS) if token in template],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNK,
        pad_token=pad,
        padding_side="right",
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )


def split_words(tokenizer: PreTrainedTokenizerFast, text: str) -> list[str]:
    """The normalised words and punctuation marks of `text`, one for each token that is not a special one."""
    backend = tokenizer.backend_tokenizer
    return [word for word, _ in backend.pre_tokenizer.pre_tokenize_str(backend.normalizer.normalize_str(text))]


def unknown_words(tokenizer: PreTrainedTokenizerFast, text: str) -> list[str]:
    """The words of `text` outside the vocabulary, lower-cased, each once, in the order of the text."""
    known = tokenizer.get_vocab()
    return list(dict.fromkeys(word for word in split_words(tokenizer, text) if word not in known))


def save_tokenizers(tokenizers: dict[str, PreTrainedTokenizerFast], folder: Path) -> None:
    """Write each tokenizer into its sub-folder of `folder`, where AutoTokenizer and diffusers find it."""
    for name, tokenizer in tokenizers.items():
        tokenizer.save_pretrained(folder / name)
