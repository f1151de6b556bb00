"""Trains the transformer of hidream-nano on the latents of drawn scenes, by flow matching.

    python -m training.train --vae training/runs/vae --text training/runs/text --output training/runs/transformer

The noisy latent is x = (1 - sigma) x0 + sigma n and the target n - x0; the network's output is its negative, as in the
published checkpoint. Block matrices are updated by Muon, everything else by AdamW; the learning rate is constant and
falls linearly to zero over the last part. The exponential moving average of the weights is what is shipped.
"""

import argparse
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from hi_diffusers.models.moe import MoEGate
from hi_diffusers.models.transformer import HiDreamImageTransformer2DModel
from training.latents import LatentPool, PromptReader
from training.process import ensure_allocator
from training.scenes import TIERS

TRANSFORMER = {
    "cpu": {
        "patch_size": 2,
        "in_channels": 8,
        "num_layers": 2,
        "num_single_layers": 4,
        "attention_head_dim": 32,
        "num_attention_heads": 4,
        "axes_dims_rope": (16, 8, 8),
        "max_resolution": (16, 16),
    },
    "gpu": {
        "patch_size": 2,
        "in_channels": 16,
        "num_layers": 2,
        "num_single_layers": 4,
        "attention_head_dim": 32,
        "num_attention_heads": 4,
        "axes_dims_rope": (16, 8, 8),
        "max_resolution": (16, 16),
    },
}
# Token counts to which captions are padded, with their shares: mostly short, since padding costs time, but all
# lengths are seen, since a pipeline may pad to any.
TEXT_LENGTHS = {24: 0.6, 32: 0.3, 64: 0.07, 128: 0.03}


@dataclass(frozen=True)
class Recipe:
    """The settings of a run, which are part of its checkpoint."""

    tier: str
    steps: int
    batch_size: int = 64
    muon_lr: float = 1.7e-3
    adam_lr: float = 1.5e-3
    warmup_steps: int = 100
    decay_share: float = 0.3
    ema: float = 0.998
    empty_captions: float = 0.1
    balance_weight: float = 0.01
    sigma_mean: float = 0.3
    sigma_std: float = 1.1
    uniform_share: float = 0.1
    seed: int = 0

    def lr_factor(self, step: int) -> float:
        """Share of the learning rate at a step: warm-up, plateau, linear decay."""
        left = (self.steps - step) / (self.decay_share * self.steps)
        return max(0.0, min(1.0, (step + 1) / self.warmup_steps, left))


def build_transformer(tier: str, text: PromptReader) -> HiDreamImageTransformer2DModel:
    """A transformer with modulation and output at zero, so that every block begins as the identity."""
    shape = TRANSFORMER[tier]
    num_blocks = shape["num_layers"] + shape["num_single_layers"]
    transformer = HiDreamImageTransformer2DModel(
        **shape,
        caption_channels=text.caption_channels,
        text_emb_dim=text.text_emb_dim,
        llama_layers=[min(layer, text.num_llama_layers - 1) for layer in range(num_blocks)],
    )
    for module in transformer.modules():
        if hasattr(module, "adaLN_modulation"):
            nn.init.zeros_(module.adaLN_modulation[1].weight)
            nn.init.zeros_(module.adaLN_modulation[1].bias)
    nn.init.zeros_(transformer.final_layer.linear.weight)
    nn.init.zeros_(transformer.final_layer.linear.bias)
    return transformer


def build_optimizers(transformer: nn.Module, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside blocks, AdamW for the rest."""
    matrices, rest = [], []
    for name, parameter in transformer.named_parameters():
        in_block = "_stream_blocks." in name and "adaLN" not in name and ".gate." not in name
        (matrices if in_block and parameter.ndim == 2 else rest).append(parameter)
    return [
        torch.optim.Muon(matrices, lr=recipe.muon_lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=recipe.adam_lr, betas=(0.9, 0.98), weight_decay=0.01),
    ]


def sample_sigmas(recipe: Recipe, count: int, generator: torch.Generator) -> Tensor:
    """Noise levels [count]: logit-normal (arXiv 2403.03206, section 3.1) with a uniform share."""
    normal = torch.randn(count, generator=generator) * recipe.sigma_std + recipe.sigma_mean
    uniform = torch.rand(count, generator=generator)
    take_uniform = torch.rand(count, generator=generator) < recipe.uniform_share
    return torch.where(take_uniform, uniform, normal.sigmoid()).clamp(1e-3, 1.0)


class ExpertBalance:
    """Collects, from every gate's forward, the share of tokens and of score that each expert gets."""

    def __init__(self, transformer: nn.Module):
        self.losses: list[Tensor] = []
        for module in transformer.modules():
            if isinstance(module, MoEGate):
                module.register_forward_hook(self._observe)

    def _observe(self, gate: MoEGate, inputs: tuple[Tensor], routing: object) -> None:
        if not torch.is_grad_enabled():
            return
        num_experts = gate.weight.shape[0]
        scores = F.linear(inputs[0], gate.weight).float().softmax(dim=-1).mean(dim=0)
        share = F.one_hot(routing.expert.flatten(), num_experts).float().mean(dim=0)
        self.losses.append(num_experts * (scores * share).sum())

    def take(self) -> Tensor:
        """Mean over the gates since the last call: 1 when balanced, E when one expert takes all."""
        loss = torch.stack(self.losses).mean()
        self.losses.clear()
        return loss


class Trainer:
    """One run: everything that a checkpoint must hold."""

    def __init__(self, recipe: Recipe, pool: LatentPool, text: PromptReader, device: str):
        torch.manual_seed(recipe.seed)
        self.recipe, self.pool, self.text, self.device = recipe, pool, text, device
        self.transformer = build_transformer(recipe.tier, text).to(device).train()
        self.average = {name: value.detach().clone() for name, value in self.transformer.state_dict().items()}
        self.optimizers = build_optimizers(self.transformer, recipe)
        self.balance = ExpertBalance(self.transformer)
        self.generator = torch.Generator().manual_seed(recipe.seed)
        self.rng = np.random.default_rng(recipe.seed)
        self.step = 0
        self.autocast = device != "cpu" or torch.cpu._is_avx512_bf16_supported()
        # On a CPU the fused attention's backward is slower than the plain one at these sizes.
        kernels = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
        self.attention = [SDPBackend.MATH] if device == "cpu" else kernels

    def loss(self) -> tuple[Tensor, Tensor]:
        """(velocity loss, balance loss) of the next batch."""
        recipe = self.recipe
        index = self.rng.integers(len(self.pool), size=recipe.batch_size)
        length = int(self.rng.choice(list(TEXT_LENGTHS), p=list(TEXT_LENGTHS.values())))
        captions = [self.pool.caption(i, self.rng, self.text, length) for i in index]
        captions = ["" if self.rng.random() < recipe.empty_captions else caption for caption in captions]
        embeds = self.text.encode(captions, length)
        x0 = self.pool.latents(index).to(self.device)
        sigma = sample_sigmas(recipe, len(x0), self.generator).to(self.device)
        noise = torch.randn(x0.shape, generator=self.generator).to(self.device)
        noisy = x0 + sigma[:, None, None, None] * (noise - x0)
        with torch.autocast(self.device.split(":")[0], torch.bfloat16, enabled=self.autocast):
            (output,) = self.transformer(noisy, 1000 * sigma, *embeds, return_dict=False)
        return F.mse_loss(-output.float(), noise - x0), self.balance.take()

    def train_step(self) -> dict[str, float]:
        """One update; returns what the log shows."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        with sdpa_kernel(self.attention):
            velocity, balance = self.loss()
            (velocity + self.recipe.balance_weight * balance).backward()
        norm = nn.utils.clip_grad_norm_(self.transformer.parameters(), 1.0)
        factor = self.recipe.lr_factor(self.step)
        for optimizer, lr in zip(self.optimizers, (self.recipe.muon_lr, self.recipe.adam_lr), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = lr * factor
            optimizer.step()
        self.step += 1
        decay = min(self.recipe.ema, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            values = self.transformer.state_dict()
            torch._foreach_lerp_(list(self.average.values()), [values[name] for name in self.average], 1 - decay)
        return {"loss": velocity.item(), "balance": balance.item(), "norm": norm.item(), "lr_factor": factor}

    def state(self) -> dict[str, object]:
        """What `restore` needs to go on as if nothing had happened."""
        return {
            "recipe": vars(self.recipe),
            "step": self.step,
            "transformer": self.transformer.state_dict(),
            "average": self.average,
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "generator": self.generator.get_state(),
            "rng": self.rng.bit_generator.state,
        }

    def restore(self, state: dict[str, object]) -> None:
        """Continue a run.

        Raises:
            ValueError: if the checkpoint is of another recipe.
        """
        if state["recipe"] != vars(self.recipe):
            raise ValueError(f"the checkpoint is of another recipe: {state['recipe']}, asked for {vars(self.recipe)}")
        self.step = state["step"]
        self.transformer.load_state_dict(state["transformer"])
        self.average = state["average"]
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.generator.set_state(state["generator"])
        self.rng.bit_generator.state = state["rng"]

    def export(self, folder: Path) -> None:
        """Write the averaged weights, bf16, as an ordinary transformer folder."""
        averaged = build_transformer(self.recipe.tier, self.text)
        averaged.load_state_dict(self.average)
        averaged.to(torch.bfloat16).save_pretrained(folder)


def run(trainer: Trainer, output: Path, save_every: int) -> None:
    """Train to the end, saving a checkpoint every `save_every` steps and a log line every 20."""
    checkpoint, log = output / "checkpoint.pt", output / "log.jsonl"
    if checkpoint.exists():
        trainer.restore(torch.load(checkpoint, weights_only=False))
        print(f"resuming at step {trainer.step}", flush=True)
    started, first = time.perf_counter(), trainer.step
    sums: dict[str, float] = {}
    while trainer.step < trainer.recipe.steps:
        for key, value in trainer.train_step().items():
            sums[key] = sums.get(key, 0.0) + value
        if trainer.step % 20 == 0:
            rate = (trainer.step - first) / (time.perf_counter() - started)
            line = {"step": trainer.step} | {key: round(value / 20, 5) for key, value in sums.items()}
            line["samples_per_second"] = round(rate * trainer.recipe.batch_size, 1)
            with log.open("a") as stream:
                stream.write(json.dumps(line) + "\n")
            left = (trainer.recipe.steps - trainer.step) / rate
            print(json.dumps(line), f"{math.ceil(left / 60)} min left", flush=True)
            sums = {}
        if trainer.step % save_every == 0 or trainer.step == trainer.recipe.steps:
            unfinished = checkpoint.with_suffix(".partial")
            torch.save(trainer.state(), unfinished)
            unfinished.replace(checkpoint)
            trainer.export(output / "transformer")


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    ensure_allocator()
    parser = argparse.ArgumentParser(prog="python -m training.train", description=__doc__.splitlines()[0])
    parser.add_argument("--tier", choices=sorted(TRANSFORMER), default="cpu")
    parser.add_argument("--vae", type=Path, required=True, help="folder of the trained VAE")
    parser.add_argument("--text", type=Path, required=True, help="folder of the trained encoders and tokenizers")
    parser.add_argument("--output", type=Path, required=True, help="checkpoints, log and transformer/ go here")
    parser.add_argument("--pool_size", type=int, default=80_000, help="number of pictures (default: 80000)")
    parser.add_argument("--steps", type=int, default=1_600)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--save_every", type=int, default=200, help="steps between checkpoints (default: 200)")
    args = parser.parse_args(argv)
    args.output.mkdir(parents=True, exist_ok=True)
    text = PromptReader.load(args.text, args.device)
    folder = args.output.parent  # pictures and latents are shared between runs
    pool = LatentPool.build(TIERS[args.tier], args.vae, args.pool_size, args.seed, folder, args.device)
    recipe = Recipe(tier=args.tier, steps=args.steps, batch_size=args.batch_size, seed=args.seed)
    run(Trainer(recipe, pool, text, args.device), args.output, args.save_every)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
