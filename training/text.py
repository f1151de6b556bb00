"""The four text encoders of hidream-nano, trained on the caption grammar alone and frozen afterwards.

    python -m training.text --output training/runs/text

Throw-away linear heads must read what a caption states from what the diffusion transformer will get: the
whole scene from each CLIP's pooled vector, T5's last token and Llama's last word, the objects from the words
that name them. Padding is made constant, since the transformer has no text mask and sees it too.
"""

import argparse
import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hi_diffusers.console import Parser, quiet_libraries, refuse_errors, run_script
from training import scenes
from training.captions import (
    NOT_THERE,
    NOUN_ATTRIBUTES,
    PHRASE_ATTRIBUTES,
    SCENE_ATTRIBUTES,
    CaptionBatch,
    draw_captions,
)
from training.checkpoint import load_checkpoint, save_checkpoint
from training.encoders import ENCODER_CLASSES, WIDTH, Encoded, build_encoders, encode, load_encoders
from training.process import ensure_allocator, written_whole
from training.progress import Progress
from training.recipe import require_positive, require_seed, require_share, warmup_and_decay
from training.tokenizers import build_tokenizers, save_tokenizers

LOSS_WEIGHTS = {"read": 1.0, "next_word": 0.1, "scale": 0.1, "padding": 0.3}


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
        require_positive(self, "steps", "batch_size", "learning_rate", "warmup_steps", "decay_share")
        require_seed(self)
        require_share(self, "empty_captions", "unknown_words")

    def lr_factor(self, step: int) -> float:
        """Share of the learning rate at a step: warm-up, plateau, linear decay."""
        return warmup_and_decay(step, self.steps, self.warmup_steps, self.decay_share)


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
        self.recipe, self.step = recipe, 0
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

    def state(self) -> dict[str, Any]:
        """What `restore` needs to go on as if nothing had happened."""
        parts = {name: getattr(self, name).state_dict() for name in ("encoders", "heads", "optimizer")}
        return {"step": self.step, **parts}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what `state` returned."""
        self.step = state["step"]
        for name in ("encoders", "heads", "optimizer"):
            getattr(self, name).load_state_dict(state[name])

    def export(self, folder: Path) -> None:
        """Write the eight folders of encoders, bf16, and tokenizers."""
        for name, encoder in self.encoders.items():
            with written_whole(folder / name) as partial:
                copy.deepcopy(encoder).to(torch.bfloat16).save_pretrained(partial)
        save_tokenizers(self.tokenizers, folder)


def train(trainer: Trainer, folder: Path, save_every: int = 250, log_every: int = 25) -> Progress:
    """Train to the end, saving a checkpoint every `save_every` steps and a log line every `log_every`."""
    progress = Progress(folder / "log.jsonl", trainer.step, trainer.recipe.steps)
    while trainer.step < trainer.recipe.steps:
        losses = trainer.train_step()
        if trainer.step % log_every == 0:
            seconds = round(progress.seconds_per_step(trainer.step), 3)
            progress.report(trainer.step, **losses, seconds_per_step=seconds)
        if trainer.step % save_every == 0 or trainer.step == trainer.recipe.steps:
            save_checkpoint(folder / "checkpoint.pt", trainer.recipe, trainer.state())
    trainer.export(folder)
    return progress


def report(trainer: Trainer, folder: Path, num_captions: int = 2048) -> dict[str, Any]:
    """Sizes of the encoders in `folder` and what can be read from them of held-out captions, tier by tier."""
    encoders, shares = load_encoders(folder), {}
    for tier in scenes.TIERS.values():
        rng = np.random.default_rng((trainer.recipe.seed, trainer.recipe.steps))
        held_out = draw_captions(trainer.tokenizers, rng, num_captions, tier, held_out=True)
        shares[tier.name] = accuracies(encoders, trainer.heads, held_out)
    sizes = {name: (folder / name / "model.safetensors").stat().st_size for name in ENCODER_CLASSES}
    return {"num_captions": num_captions, "accuracies": shares, "bytes": sizes}


def run(args: argparse.Namespace) -> None:
    """Do what the flags say."""
    quiet_libraries()
    recipe = refuse_errors(TextRecipe, steps=args.steps, batch_size=args.batch_size, seed=args.seed)
    state = refuse_errors(load_checkpoint, args.output / "checkpoint.pt", recipe)
    refuse_errors(args.output.mkdir, parents=True, exist_ok=True)
    trainer = Trainer(recipe)
    if state:
        trainer.restore(state)
    progress = train(trainer, args.output)
    result = report(trainer, args.output)
    progress.record(trainer.step, **result)
    for tier, read in result["accuracies"].items():
        for name, shares in read.items():
            worst = min(shares, key=shares.get)
            print(f"{tier} {name}: {shares[worst]:.2%} right in the worst attribute, {worst}")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    default = TextRecipe()
    parser = Parser(prog="python -m training.text", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--output", type=Path, required=True, help="folder for checkpoint, log, encoders and tokenizers"
    )
    parser.add_argument("--steps", type=int, default=default.steps, help="updates (default: %(default)s)")
    parser.add_argument(
        "--batch_size", type=int, default=default.batch_size, help="captions a step (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=default.seed, help="of everything drawn (default: %(default)s)")
    return run_script(run, parser, argv)


if __name__ == "__main__":
    ensure_allocator()
    raise SystemExit(main())
