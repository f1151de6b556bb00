"""What a caption states, as labels: of the whole scene, and of every word of its noun phrases.

The text encoders are trained to let these be read; see `training.text`.
"""

from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from training import scenes
from training.tokenizers import split_words

LLAMA_POSITIONS = 512
"""Up to this position padding may stand behind a text."""
NOT_THERE = -100
"""The label of what does not exist in a caption, such as the second object's colour where there is one."""

MAX_OBJECTS = max(tier.max_objects for tier in scenes.TIERS.values())
_NOUNS = scenes.SHAPES + scenes.PICTOGRAMS
_CONTENT = {*_NOUNS, *scenes.COLOURS, *scenes.SIZES, *scenes.FINISHES, *scenes.BACKGROUND_KINDS, "background"}
_KINDS = (None, *scenes.BACKGROUND_KINDS)
_OF_OBJECT = {
    "shape": _NOUNS,
    "colour": scenes.COLOURS,
    "size": (None, *scenes.SIZES),
    "finish": (None, *scenes.FINISHES),
}
_OF_SCENE = {"num_objects": tuple(range(MAX_OBJECTS + 1))} | {
    f"relation_{i}": (None, *scenes.RELATIONS) for i in range(MAX_OBJECTS - 1)
}

# Each maps an attribute's name to its classes; None is what the caption leaves open.
# Objects are numbered in the order of telling.
SCENE_ATTRIBUTES = {
    **_OF_SCENE,
    **{f"{name}_{i}": classes for i in range(MAX_OBJECTS) for name, classes in _OF_OBJECT.items()},
    "background_colour": scenes.COLOURS,
    "background_kind": _KINDS,
}
# What a causal model can know at a noun, and what a noun phrase's words can know after the whole caption.
NOUN_ATTRIBUTES = {"owner": (*range(MAX_OBJECTS), "background"), **_OF_OBJECT, "kind": _KINDS}
PHRASE_ATTRIBUTES = NOUN_ATTRIBUTES | _OF_SCENE


def _encode(values: dict[str, object], attributes: dict[str, tuple[object, ...]]) -> list[int]:
    return [classes.index(values[name]) if name in values else NOT_THERE for name, classes in attributes.items()]


@dataclass(frozen=True)
class LabelledCaption:
    """W words, labels `scene` [SCENE_ATTRIBUTES] and `phrases` [W][PHRASE_ATTRIBUTES], `nouns` [W] flags."""

    words: list[str]
    scene: list[int]
    phrases: list[list[int]]
    nouns: list[bool]

    @classmethod
    def of(cls, words: list[str], scene: scenes.Scene | None) -> "LabelledCaption":
        """Labels of a caption that states `scene` (see `scenes.parse_caption`); None is the empty caption."""
        caption = cls(words, [], [_encode({}, PHRASE_ATTRIBUTES) for _ in words], [False] * len(words))
        if scene is None:
            caption.scene[:] = _encode({"num_objects": 0}, SCENE_ATTRIBUTES)
            return caption
        # Every unbroken run of content words is one noun phrase, and it ends in its noun.
        runs = [list(run) for found, run in groupby(range(len(words)), lambda i: words[i] in _CONTENT) if found]
        first = next(run for run in runs if words[run[-1]] in _NOUNS)
        if (words[first[-1]], words[first[-2]]) != (scene.objects[0].shape, scene.objects[0].colour):
            scene = scenes.mirrored(scene)  # "left of a circle is a star" parses as the star, then the circle
        told: dict[str, object] = {"num_objects": len(scene.objects)}
        told |= {f"relation_{i}": (scene.relations or (None, None))[i] for i in range(len(scene.objects) - 1)}
        objects = [{name: getattr(item, name) for name in _OF_OBJECT} for item in scene.objects]
        background = {"background_colour": scene.background_colour, "background_kind": scene.background_kind}
        numbered = {f"{name}_{i}": value for i, item in enumerate(objects) for name, value in item.items()}
        caption.scene[:] = _encode(told | numbered | background, SCENE_ATTRIBUTES)
        ground = {"owner": "background", "colour": scene.background_colour, "kind": scene.background_kind}
        owners = iter([{"owner": i} | item for i, item in enumerate(objects)])
        for run in runs:
            own = next(owners) if words[run[-1]] in _NOUNS else ground
            for index in run:
                caption.phrases[index] = _encode(told | own, PHRASE_ATTRIBUTES)
            caption.nouns[run[-1]] = True
        return caption

    def insert_unknown_word(self, place: int) -> None:
        """Put a word that means nothing before word `place`; what the caption states stays the same."""
        self.words.insert(place, "unknown")
        self.phrases.insert(place, _encode({}, PHRASE_ATTRIBUTES))
        self.nouns.insert(place, False)


@dataclass(frozen=True)
class CaptionBatch:
    """Token ids and labels of B captions, int64, padded to the longest: T tokens, W words.

    `clip`, `t5`, `llama` [B, T]; `t5_mask`, `llama_mask` [B, T], 1 is real, 0 padding; `llama_positions`
    [B, T]: padding stands anywhere behind the text, so that any length of padding is learned. `scene`
    [B, SCENE_ATTRIBUTES], `phrases` [B, W, PHRASE_ATTRIBUTES], NOT_THERE where nothing is to be known;
    `nouns` [B, W] bool.
    """

    clip: Tensor
    t5: Tensor
    t5_mask: Tensor
    llama: Tensor
    llama_mask: Tensor
    llama_positions: Tensor
    scene: Tensor
    phrases: Tensor
    nouns: Tensor

    @classmethod
    def of(
        cls,
        captions: list[LabelledCaption],
        tokenizers: dict[str, PreTrainedTokenizerBase],
        rng: np.random.Generator,
    ) -> "CaptionBatch":
        """Tokenize and pad to the longest caption."""
        words = [caption.words for caption in captions]
        clip, t5, llama = (
            tokenizers[name](words, is_split_into_words=True, padding="longest", return_tensors="pt")
            for name in ("tokenizer", "tokenizer_3", "tokenizer_4")
        )
        length = llama.attention_mask.sum(1, keepdim=True)
        behind = length + torch.from_numpy(rng.random(llama.input_ids.shape)) * (LLAMA_POSITIONS - length)
        positions = torch.where(llama.attention_mask.bool(), torch.arange(behind.shape[1]), behind.long())
        phrases = [
            torch.tensor(caption.phrases, dtype=torch.int64).reshape(-1, len(PHRASE_ATTRIBUTES)) for caption in captions
        ]
        nouns = [torch.tensor(caption.nouns, dtype=torch.bool) for caption in captions]
        return cls(
            clip.input_ids,
            t5.input_ids,
            t5.attention_mask,
            llama.input_ids,
            llama.attention_mask,
            positions,
            torch.tensor([caption.scene for caption in captions]),
            pad_sequence(phrases, batch_first=True, padding_value=NOT_THERE),
            pad_sequence(nouns, batch_first=True),
        )


def draw_captions(
    tokenizers: dict[str, PreTrainedTokenizerBase],
    rng: np.random.Generator,
    size: int,
    tier: scenes.Tier,
    *,
    empty: float = 0.0,
    unknown: float = 0.0,
    held_out: bool = False,
) -> CaptionBatch:
    """A batch with each number of objects equally often; shares of it are empty or get unknown words."""
    captions = []
    for _ in range(size):
        text, scene = "", None
        if rng.random() >= empty:
            num_objects = rng.integers(1, tier.max_objects + 1)
            while scene is None or len(scene.objects) != num_objects:
                scene = scenes.sample_scene(rng, tier, held_out=held_out)
            text = scenes.caption(scene, rng)
            scene = scenes.parse_caption(text)
        caption = LabelledCaption.of(split_words(tokenizers["tokenizer"], text), scene)
        if rng.random() < unknown:
            for _ in range(rng.integers(1, 3)):
                caption.insert_unknown_word(int(rng.integers(len(caption.words) + 1)))
        captions.append(caption)
    return CaptionBatch.of(captions, tokenizers, rng)
