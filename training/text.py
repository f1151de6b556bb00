"""The four text encoders of hidream-nano, trained on the caption grammar alone and frozen afterwards.

    python -m training.text --output training/runs/text

Throw-away linear heads must read what a caption states from what the diffusion transformer will get: the
whole scene from each CLIP's pooled vector, T5's last token and Llama's last word, the objects from the words
that name them. Padding is made constant, since the transformer has no text mask and sees it too.
"""

import argparse
import copy
import json
import math
import os
import time
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    T5Config,
    T5EncoderModel,
)

from training import scenes
from training.tokenizers import build_tokenizers, save_tokenizers, split_words

WIDTH = 64
LLAMA_POSITIONS = 512
ENCODER_CLASSES = {
    "text_encoder": CLIPTextModelWithProjection,
    "text_encoder_2": CLIPTextModelWithProjection,
    "text_encoder_3": T5EncoderModel,
    "text_encoder_4": LlamaForCausalLM,
}
LOSS_WEIGHTS = {"read": 1.0, "next_word": 0.1, "scale": 0.1, "padding": 0.3}
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


@dataclass(frozen=True)
class TextRecipe:
    """The settings of a run, part of its checkpoint; raises ValueError for values that make no sense."""

    steps: int = 2500
    batch_size: int = 64
    learning_rate: float = 2e-3
    warmup_steps: int = 100
    decay_share: float = 0.6
    empty_captions: float = 0.1
    unknown_words: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "learning_rate", "decay_share"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be positive")
        for name in ("empty_captions", "unknown_words"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; allowed is 0 <= {name} < 1")

    def lr_factor(self, step: int) -> float:
        """Share of the learning rate at a step: warm-up, plateau, linear decay."""
        left = (self.steps - step) / (self.decay_share * self.steps)
        return min(1.0, (step + 1) / self.warmup_steps, left)


def build_encoders(vocab_size: int) -> nn.ModuleDict:
    """Random encoders by folder name, in the classes that HiDream's pipeline expects; all are WIDTH wide."""
    clip = CLIPTextConfig(
        vocab_size=vocab_size,
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=248,
        bos_token_id=2,
        eos_token_id=1,
        pad_token_id=1,
    )
    t5 = T5Config(
        vocab_size=vocab_size,
        d_model=WIDTH,
        d_kv=WIDTH // 4,
        d_ff=3 * WIDTH,
        num_layers=3,
        num_heads=4,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        is_encoder_decoder=False,
        use_cache=False,
        pad_token_id=0,
        eos_token_id=1,
    )
    llama = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=WIDTH,
        intermediate_size=3 * WIDTH,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=LLAMA_POSITIONS,
        initializer_range=0.1,
        tie_word_embeddings=True,
        bos_token_id=2,
        eos_token_id=1,
        pad_token_id=1,
    )
    configs = (clip, clip, t5, llama)
    encoders = {name: build(config) for (name, build), config in zip(ENCODER_CLASSES.items(), configs, strict=True)}
    # T5's padding starts far longer than anything a block adds, so the final norm makes it constant.
    encoders["text_encoder_3"].get_input_embeddings().weight.data[t5.pad_token_id] *= 64
    return nn.ModuleDict(encoders)


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


@dataclass(frozen=True)
class Encoded:
    """What the transformer gets: `pooled` of each CLIP [B, D], `t5` [B, T, D], `llama` [layers, B, T, D]."""

    pooled: tuple[Tensor, ...]
    t5: Tensor
    llama: Tensor
    llama_logits: Tensor


def encode(encoders: nn.ModuleDict, batch: CaptionBatch) -> Encoded:
    """Run the four encoders as HiDream's pipeline does."""
    pooled = tuple(encoders[name](batch.clip).text_embeds for name in ("text_encoder", "text_encoder_2"))
    t5 = encoders["text_encoder_3"](batch.t5, attention_mask=batch.t5_mask).last_hidden_state
    llama = encoders["text_encoder_4"](
        batch.llama,
        attention_mask=batch.llama_mask,
        position_ids=batch.llama_positions,
        output_hidden_states=True,
    )
    return Encoded(pooled, t5, torch.stack(llama.hidden_states[1:]), llama.logits)


@dataclass(frozen=True)
class Reading:
    """`states` [N, D] from which a head must read the `labels` [N, A] of A `attributes` (name -> classes)."""

    states: Tensor
    labels: Tensor
    attributes: dict[str, tuple[object, ...]]


def readings(encoded: Encoded, batch: CaptionBatch) -> dict[str, Reading]:
    """Every place that something must be read from; the name begins with the encoder's folder."""
    num_words, rows = batch.nouns.shape[1], torch.arange(len(batch.scene))
    t5, in_phrase = encoded.t5[:, :num_words], (batch.phrases != NOT_THERE).any(-1)
    own = batch.phrases[batch.nouns][:, : len(NOUN_ATTRIBUTES)]
    found = {
        "text_encoder": Reading(encoded.pooled[0], batch.scene, SCENE_ATTRIBUTES),
        "text_encoder_2": Reading(encoded.pooled[1], batch.scene, SCENE_ATTRIBUTES),
        "text_encoder_3 words": Reading(t5[in_phrase], batch.phrases[in_phrase], PHRASE_ATTRIBUTES),
        "text_encoder_3 end": Reading(encoded.t5[rows, batch.t5_mask.sum(1) - 1], batch.scene, SCENE_ATTRIBUTES),
    }
    last = batch.llama_mask.sum(1) - 1
    for layer, states in enumerate(encoded.llama):
        behind_bos = states[:, 1 : num_words + 1]
        found |= {
            f"text_encoder_4 layer {layer} nouns": Reading(behind_bos[batch.nouns], own, NOUN_ATTRIBUTES),
            f"text_encoder_4 layer {layer} last": Reading(states[rows, last], batch.scene, SCENE_ATTRIBUTES),
        }
    return found


def _read_logits(head: nn.Linear, reading: Reading) -> tuple[Tensor, ...]:
    return head(reading.states).split([len(classes) for classes in reading.attributes.values()], dim=-1)


def _read_loss(head: nn.Linear, reading: Reading) -> Tensor:
    """Cross-entropy summed over attributes, each averaged where it exists: a rare third object counts too."""
    total = reading.states.new_zeros(())
    for logits, labels in zip(_read_logits(head, reading), reading.labels.T, strict=True):
        num_labels = (labels != NOT_THERE).sum().clamp(min=1)
        total = total + F.cross_entropy(logits, labels, ignore_index=NOT_THERE, reduction="sum") / num_labels
    return total


def _scale_loss(states: Tensor) -> Tensor:
    """Distance of the channels of `states` [N, D] from mean 0 and variance 1."""
    return ((states.var(0) - 1) ** 2 + states.mean(0) ** 2).mean()


def training_losses(encoders: nn.ModuleDict, heads: nn.ModuleDict, batch: CaptionBatch) -> dict[str, Tensor]:
    """The parts of the loss, scalars, by the names of LOSS_WEIGHTS."""
    encoded = encode(encoders, batch)
    found = readings(encoded, batch)
    t5_real, llama_real = batch.t5_mask.bool(), batch.llama_mask.bool()
    following = batch.llama[:, 1:].masked_fill(~llama_real[:, 1:], NOT_THERE).flatten()
    real = [*encoded.pooled, encoded.t5[t5_real], *encoded.llama[:, llama_real]]
    padding = [encoded.t5[~t5_real], *encoded.llama[:, ~llama_real]]
    return {
        "read": sum(_read_loss(heads[name], reading) for name, reading in found.items()) / len(found),
        "next_word": F.cross_entropy(encoded.llama_logits[:, :-1].flatten(0, 1), following, ignore_index=NOT_THERE),
        "scale": sum(_scale_loss(states) for states in real),
        "padding": sum(states.var(0).mean() for states in padding),
    }


@torch.no_grad()
def accuracies(encoders: nn.ModuleDict, heads: nn.ModuleDict, batch: CaptionBatch) -> dict[str, dict[str, float]]:
    """Share of right answers by reading and attribute, over the captions in which the attribute exists."""
    result: dict[str, dict[str, float]] = {}
    for name, reading in readings(encode(encoders, batch), batch).items():
        result[name] = {}
        logits = _read_logits(heads[name], reading)
        for attribute, answer, labels in zip(reading.attributes, logits, reading.labels.T, strict=True):
            there = labels != NOT_THERE
            if there.any():
                share = (answer.argmax(-1) == labels)[there].double().mean().item()
                result[name][attribute] = round(share, 5)
    return result


class Trainer:
    """One run: everything that a checkpoint must hold."""

    def __init__(self, recipe: TextRecipe) -> None:
        torch.manual_seed(recipe.seed)
        self.recipe, self.step, self.log = recipe, 0, []
        self.tokenizers = build_tokenizers(scenes.vocabulary())
        self.encoders = build_encoders(len(self.tokenizers["tokenizer"]))
        sample = self.draw()
        self.heads = nn.ModuleDict(
            {
                name: nn.Linear(WIDTH, sum(map(len, reading.attributes.values())))
                for name, reading in readings(encode(self.encoders, sample), sample).items()
            }
        )
        parameters = [*self.encoders.parameters(), *self.heads.parameters()]
        self.optimizer = torch.optim.AdamW(parameters, recipe.learning_rate, betas=(0.9, 0.99), weight_decay=0.01)

    def draw(self) -> CaptionBatch:
        """The training captions of the current step, of the tier whose grammar contains the other's."""
        rng = np.random.default_rng((self.recipe.seed, self.step))
        shares = {"empty": self.recipe.empty_captions, "unknown": self.recipe.unknown_words}
        return draw_captions(self.tokenizers, rng, self.recipe.batch_size, scenes.GPU_TIER, **shares)

    def train_step(self) -> dict[str, float]:
        """One update; returns the parts of the loss."""
        losses = training_losses(self.encoders, self.heads, self.draw())
        self.optimizer.zero_grad(set_to_none=True)
        sum(LOSS_WEIGHTS[name] * loss for name, loss in losses.items()).backward()
        (group,) = self.optimizer.param_groups
        nn.utils.clip_grad_norm_(group["params"], 1.0)
        group["lr"] = self.recipe.learning_rate * self.recipe.lr_factor(self.step)
        self.optimizer.step()
        self.step += 1
        return {name: round(loss.item(), 4) for name, loss in losses.items()}

    def save(self, folder: Path) -> None:
        """Write log and checkpoint; a run killed meanwhile leaves the old checkpoint or the new one."""
        parts = {name: getattr(self, name).state_dict() for name in ("encoders", "heads", "optimizer")}
        state = {"recipe": asdict(self.recipe), "step": self.step, "log": self.log, **parts}
        (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in self.log))
        torch.save(state, folder / "checkpoint.tmp")
        os.replace(folder / "checkpoint.tmp", folder / "checkpoint.pt")

    def restore(self, checkpoint: Path) -> None:
        """Go on from a checkpoint; raises ValueError if it is of another recipe."""
        state = torch.load(checkpoint, weights_only=True)
        if state["recipe"] != asdict(self.recipe):
            raise ValueError(f"{checkpoint} is of {state['recipe']}, asked for is {asdict(self.recipe)}")
        self.step, self.log = state["step"], state["log"]
        for name in ("encoders", "heads", "optimizer"):
            getattr(self, name).load_state_dict(state[name])

    def export(self, folder: Path) -> None:
        """Write the eight folders of encoders, bf16, and tokenizers."""
        for name, encoder in self.encoders.items():
            copy.deepcopy(encoder).to(torch.bfloat16).save_pretrained(folder / name)
        save_tokenizers(self.tokenizers, folder)


def load_encoders(folder: Path) -> nn.ModuleDict:
    """The encoders that `folder` holds, in fp32."""
    loaded = {name: kind.from_pretrained(folder / name, dtype=torch.float32) for name, kind in ENCODER_CLASSES.items()}
    return nn.ModuleDict(loaded)


def train(trainer: Trainer, folder: Path, save_every: int = 250, log_every: int = 25) -> None:
    """Train to the end, saving a checkpoint every `save_every` steps and a log line every `log_every`."""
    started, first = time.perf_counter(), trainer.step
    while trainer.step < trainer.recipe.steps:
        losses = trainer.train_step()
        if trainer.step % log_every == 0:
            per_step = (time.perf_counter() - started) / (trainer.step - first)
            trainer.log.append({"step": trainer.step, **losses, "seconds_per_step": round(per_step, 3)})
            left = math.ceil((trainer.recipe.steps - trainer.step) * per_step / 60)
            print(json.dumps(trainer.log[-1]), f"{left} min left", flush=True)
        if trainer.step % save_every == 0 or trainer.step == trainer.recipe.steps:
            trainer.save(folder)


def report(trainer: Trainer, folder: Path, num_captions: int = 2048) -> dict[str, object]:
    """Sizes of the encoders in `folder` and what can be read from them of held-out captions, tier by tier."""
    encoders, shares = load_encoders(folder), {}
    for tier in scenes.TIERS.values():
        rng = np.random.default_rng((trainer.recipe.seed, trainer.recipe.steps))
        held_out = draw_captions(trainer.tokenizers, rng, num_captions, tier, held_out=True)
        shares[tier.name] = accuracies(encoders, trainer.heads, held_out)
    sizes = {name: (folder / name / "model.safetensors").stat().st_size for name in ENCODER_CLASSES}
    return {"step": trainer.step, "num_captions": num_captions, "accuracies": shares, "bytes": sizes}


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    default = TextRecipe()
    parser = argparse.ArgumentParser(prog="python -m training.text", description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="checkpoint, log and the eight folders go here")
    parser.add_argument("--steps", type=int, default=default.steps, help=f"default: {default.steps}")
    parser.add_argument("--batch_size", type=int, default=default.batch_size, help=f"default: {default.batch_size}")
    parser.add_argument("--seed", type=int, default=default.seed, help=f"default: {default.seed}")
    args = parser.parse_args(argv)
    try:
        trainer = Trainer(TextRecipe(steps=args.steps, batch_size=args.batch_size, seed=args.seed))
        if (args.output / "checkpoint.pt").exists():
            trainer.restore(args.output / "checkpoint.pt")
            print(f"resuming at step {trainer.step}", flush=True)
    except ValueError as error:
        parser.error(str(error))
    args.output.mkdir(parents=True, exist_ok=True)
    train(trainer, args.output)
    trainer.export(args.output)
    result = report(trainer, args.output)
    trainer.log = [line for line in trainer.log if "accuracies" not in line] + [result]
    trainer.save(args.output)
    for tier, read in result["accuracies"].items():
        for name, shares in read.items():
            worst = min(shares, key=shares.get)
            print(f"{tier} {name}: {shares[worst]:.2%} right in the worst attribute, {worst}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
