"""Trains the transformer of hidream-nano on the latents of drawn scenes, by flow matching.

    python -m training.train --vae training/runs/vae --text training/runs/text --output training/runs/transformer

The noisy latent is x = (1 - sigma) x0 + sigma n and the target n - x0; the network's output is its negative, as in the
published checkpoint. Block matrices are updated by Muon, everything else by AdamW; the learning rate is constant and
falls linearly to zero over the last part. The exponential moving average of the weights is what is shipped.
"""

import argparse
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from hi_diffusers.console import Parser, quiet_libraries, refuse_errors, run_script
from hi_diffusers.engine.loading import resolve_device
from hi_diffusers.families.hidream.attention import HiDreamAttention
from hi_diffusers.families.hidream.moe import MoEGate, SwiGLU
from hi_diffusers.families.hidream.transformer import HiDreamImageTransformer2DModel
from training import encoders
from training.checkpoint import load_checkpoint, save_checkpoint
from training.latents import LatentPool, PromptReader
from training.process import DIFFUSERS_FILES, ensure_allocator, require_files, written_whole
from training.progress import Progress
from training.recipe import average_decay, require_positive, require_seed, require_share, warmup_and_decay
from training.scenes import TIERS

# Of a head's 32 channels the published ratio would rotate 8 for rows and 8 for columns, at frequencies 1, 0.1, 0.01 and
# 0.001, which hardly tell eight rows apart; of 12 channels the second frequency is 0.2.
_SHAPE = {
    "patch_size": 2,
    "num_layers": 2,
    "num_single_layers": 4,
    "attention_head_dim": 32,
    "num_attention_heads": 4,
    "axes_dims_rope": (8, 12, 12),
    "max_resolution": (16, 16),
}
# By tier; the channels are those of its VAE.
TRANSFORMER = {"cpu": {**_SHAPE, "in_channels": 4}, "gpu": {**_SHAPE, "in_channels": 16}}
# Token counts to which captions are padded, with their shares: mostly short, since padding costs time, but all
# lengths are seen, since a pipeline may pad to any.
TEXT_LENGTHS = {24: 0.66, 32: 0.3, 64: 0.03, 128: 0.01}
LOG_EVERY = 20
# Forms of one compiled module: kinds of blocks times token counts.
MAX_COMPILED = 64
POOL_SIZE = 80_000


@dataclass(frozen=True)
class TransformerRecipe:
    """The settings of a run, part of its checkpoint; raises ValueError for values that make no sense.

    Attributes:
        parts: a batch is split into so many parts, each computed by a thread of its own. The operations are too small
            for two cores to share one: two threads of one core each do 58 pictures a second, one of two 37.
    """

    tier: str = "cpu"
    steps: int = 5_200
    batch_size: int = 64
    parts: int = 2
    muon_lr: float = 1.7e-3
    adam_lr: float = 1.5e-3
    warmup_steps: int = 100
    decay_share: float = 0.3
    ema: float = 0.998
    empty_captions: float = 0.1
    balance_weight: float = 0.01
    sigma_mean: float = 0.6
    sigma_std: float = 1.1
    uniform_share: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.tier not in TRANSFORMER:
            raise ValueError(f"tier must be one of {', '.join(TRANSFORMER)}, got {self.tier!r}")
        require_positive(self, "steps", "batch_size", "parts", "muon_lr", "adam_lr", "warmup_steps", "decay_share")
        if self.batch_size % self.parts:
            raise ValueError(f"batch_size must be a multiple of the {self.parts} parts, got {self.batch_size}")
        require_seed(self)
        require_share(self, "ema", "empty_captions", "uniform_share")

    def lr_factor(self, step: int) -> float:
        """Share of the learning rates at a step: warm-up, plateau, linear decay."""
        return warmup_and_decay(step, self.steps, self.warmup_steps, self.decay_share)


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


def build_optimizers(transformer: nn.Module, recipe: TransformerRecipe) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside blocks, AdamW for the rest."""
    matrices, rest = [], []
    for name, parameter in transformer.named_parameters():
        in_block = "_stream_blocks." in name and "adaLN" not in name and ".gate." not in name
        (matrices if in_block and parameter.ndim == 2 else rest).append(parameter)
    return [
        torch.optim.Muon(matrices, lr=recipe.muon_lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=recipe.adam_lr, betas=(0.9, 0.98), weight_decay=0.01),
    ]


def compile_parts(transformer: nn.Module) -> None:
    """Compile attention, for every number of tokens, and the experts, whose numbers of rows vary freely."""
    for module in transformer.modules():
        if isinstance(module, HiDreamAttention):
            module.compile(dynamic=False)
        elif isinstance(module, SwiGLU):
            module.compile(dynamic=True)


def _begin_worker(num_threads: int) -> None:
    torch.set_num_threads(num_threads)
    torch._dynamo.config.recompile_limit = MAX_COMPILED  # a setting of the thread


def sample_sigmas(recipe: TransformerRecipe, count: int, generator: torch.Generator) -> Tensor:
    """Noise levels [count]: logit-normal (arXiv 2403.03206, section 3.1) with a uniform share."""
    normal = torch.randn(count, generator=generator) * recipe.sigma_std + recipe.sigma_mean
    uniform = torch.rand(count, generator=generator)
    take_uniform = torch.rand(count, generator=generator) < recipe.uniform_share
    return torch.where(take_uniform, uniform, normal.sigmoid()).clamp(1e-3, 1.0)


class ExpertBalance:
    """Collects, from every gate's forward, the share of tokens and of score that each expert gets."""

    def __init__(self, transformer: nn.Module) -> None:
        self.of_thread = threading.local()
        for module in transformer.modules():
            if isinstance(module, MoEGate):
                module.register_forward_hook(self._observe)

    def _observe(self, gate: MoEGate, inputs: tuple[Tensor], routing: object) -> None:
        if not torch.is_grad_enabled():
            return
        num_experts = gate.weight.shape[0]
        scores = F.linear(inputs[0], gate.weight).float().softmax(dim=-1).mean(dim=0)
        share = F.one_hot(routing.expert.flatten(), num_experts).float().mean(dim=0)
        self._losses().append(num_experts * (scores * share).sum())

    def take(self) -> Tensor:
        """Mean over the gates since this thread's last call: 1 when balanced, E / k when k of E experts take all."""
        loss = torch.stack(self._losses()).mean()
        self._losses().clear()
        return loss

    def _losses(self) -> list[Tensor]:
        if not hasattr(self.of_thread, "losses"):
            self.of_thread.losses = []
        return self.of_thread.losses


@dataclass(frozen=True)
class Batch:
    """What one step, or a part of it, learns from.

    Attributes:
        captions: B of them, empty ones among them.
        length: tokens they are padded to.
        x0, noise: [B,C,H,W], fp32.
        sigma: noise levels [B].
    """

    captions: list[str]
    length: int
    x0: Tensor
    noise: Tensor
    sigma: Tensor

    def split(self, parts: int) -> list["Batch"]:
        """Equal parts."""
        size = len(self.captions) // parts
        cuts = [slice(start, start + size) for start in range(0, len(self.captions), size)]
        return [Batch(self.captions[c], self.length, self.x0[c], self.noise[c], self.sigma[c]) for c in cuts]


class Trainer:
    """One run: everything that a checkpoint must hold."""

    def __init__(
        self,
        recipe: TransformerRecipe,
        pool: LatentPool,
        text: PromptReader,
        device: torch.device | str,
        compiled: bool = False,
    ) -> None:
        torch.manual_seed(recipe.seed)
        self.recipe, self.pool, self.text, self.device = recipe, pool, text, torch.device(device)
        self.transformer = build_transformer(recipe.tier, text).to(device).train()
        self.average = {name: value.detach().clone() for name, value in self.transformer.state_dict().items()}
        self.optimizers = build_optimizers(self.transformer, recipe)
        self.balance = ExpertBalance(self.transformer)
        self.generator = torch.Generator().manual_seed(recipe.seed)
        self.rng = np.random.default_rng(recipe.seed)
        self.step = 0
        self.encoding = threading.Lock()  # a tokenizer's padding is its state: two threads would mix up theirs
        threads = max(1, torch.get_num_threads() // recipe.parts)
        self.workers = ThreadPoolExecutor(recipe.parts, initializer=_begin_worker, initargs=(threads,))
        if compiled:
            compile_parts(self.transformer)
        on_cpu = self.device.type == "cpu"
        self.autocast = not on_cpu or torch.cpu._is_avx512_bf16_supported()
        # On a CPU the fused attention's backward is slower than the plain one at these sizes.
        kernels = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
        self.attention = [SDPBackend.MATH] if on_cpu else kernels

    def draw_batch(self) -> Batch:
        """The next batch; all that is random is drawn here."""
        recipe = self.recipe
        index = self.rng.integers(len(self.pool), size=recipe.batch_size)
        length = int(self.rng.choice(list(TEXT_LENGTHS), p=list(TEXT_LENGTHS.values())))
        captions = [self.pool.caption(i, self.rng, self.text, length) for i in index]
        captions = ["" if self.rng.random() < recipe.empty_captions else caption for caption in captions]
        x0 = self.pool.latents(index)
        sigma = sample_sigmas(recipe, len(x0), self.generator)
        noise = torch.randn(x0.shape, generator=self.generator)
        return Batch(captions, length, *(part.to(self.device) for part in (x0, noise, sigma)))

    def loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(velocity loss, balance loss) of a batch."""
        with self.encoding:
            embeds = self.text.encode(batch.captions, batch.length)
        target = batch.noise - batch.x0
        noisy = batch.x0 + batch.sigma[:, None, None, None] * target
        # The cache of cast weights is the process's: one thread would empty it while the other one uses it
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast, cache_enabled=False):
            (output,) = self.transformer(noisy, 1000 * batch.sigma, *embeds, return_dict=False)
        return F.mse_loss(-output.float(), target), self.balance.take()

    def _learn(self, part: Batch) -> tuple[float, float]:
        """Add a part's share of the gradients; returns its velocity and balance loss."""
        velocity, balance = self.loss(part)
        ((velocity + self.recipe.balance_weight * balance) / self.recipe.parts).backward()
        return velocity.item(), balance.item()

    def train_step(self) -> dict[str, float]:
        """One update; returns what the log shows."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        parts = self.draw_batch().split(self.recipe.parts)
        with sdpa_kernel(self.attention):
            losses = list(self.workers.map(self._learn, parts))
        velocity, balance = (sum(values) / len(parts) for values in zip(*losses, strict=True))
        norm = nn.utils.clip_grad_norm_(self.transformer.parameters(), 1.0)
        factor = self.recipe.lr_factor(self.step)
        for optimizer, lr in zip(self.optimizers, (self.recipe.muon_lr, self.recipe.adam_lr), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = lr * factor
            optimizer.step()
        self.step += 1
        decay = average_decay(self.step, self.recipe.ema)
        with torch.no_grad():
            values = self.transformer.state_dict()
            torch._foreach_lerp_(list(self.average.values()), [values[name] for name in self.average], 1 - decay)
        return {"loss": velocity, "balance": balance, "norm": norm.item(), "lr_factor": factor}

    def state(self) -> dict[str, Any]:
        """What `restore` needs to go on as if nothing had happened."""
        return {
            "step": self.step,
            "transformer": self.transformer.state_dict(),
            "average": self.average,
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "generator": self.generator.get_state(),
            "rng": self.rng.bit_generator.state,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what `state` returned."""
        self.step = state["step"]
        self.transformer.load_state_dict(state["transformer"])
        self.average = {name: value.to(self.device) for name, value in state["average"].items()}
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.generator.set_state(state["generator"])
        self.rng.bit_generator.state = state["rng"]

    def export(self, folder: Path) -> None:
        """Write the averaged weights, bf16, as an ordinary transformer folder."""
        averaged = build_transformer(self.recipe.tier, self.text)
        averaged.load_state_dict(self.average)
        with written_whole(folder) as partial:
            averaged.to(torch.bfloat16).save_pretrained(partial)


def train(trainer: Trainer, folder: Path, save_every: int = 200) -> None:
    """Train to the end, with a checkpoint and a transformer every `save_every` steps and a log line every LOG_EVERY."""
    progress = Progress(folder / "log.jsonl", trainer.step, trainer.recipe.steps)
    recent: list[dict[str, float]] = []
    while trainer.step < trainer.recipe.steps:
        recent.append(trainer.train_step())
        if trainer.step % LOG_EVERY == 0:
            means = {name: round(sum(one[name] for one in recent) / len(recent), 5) for name in recent[0]}
            rate = round(trainer.recipe.batch_size / progress.seconds_per_step(trainer.step), 1)
            progress.report(trainer.step, **means, samples_per_second=rate)
            recent = []
        if trainer.step % save_every == 0 and trainer.step < trainer.recipe.steps:
            save(trainer, folder)
    save(trainer, folder)


def save(trainer: Trainer, folder: Path) -> None:
    """Write the checkpoint, and the transformer as it is by now."""
    save_checkpoint(folder / "checkpoint.pt", trainer.recipe, trainer.state())
    trainer.export(folder / "transformer")


def run(args: argparse.Namespace) -> None:
    """Do what the flags say."""
    quiet_libraries()
    device = refuse_errors(resolve_device, args.device)
    recipe = refuse_errors(
        TransformerRecipe,
        tier=args.tier,
        steps=args.steps,
        batch_size=args.batch_size,
        parts=2 if device.type == "cpu" else 1,
        seed=args.seed,
    )
    refuse_errors(require_positive, args, "pool_size", "save_every")
    refuse_errors(require_files, "--vae", args.vae, DIFFUSERS_FILES)
    refuse_errors(require_files, "--text", args.text, encoders.FILES)
    state = refuse_errors(load_checkpoint, args.output / "checkpoint.pt", recipe)
    refuse_errors(args.output.mkdir, parents=True, exist_ok=True)
    text = PromptReader.load(args.text, device)
    shared = args.output.parent  # pictures and latents are shared between runs
    pool = LatentPool.build(TIERS[args.tier], args.vae, args.pool_size, args.seed, shared, device)
    trainer = Trainer(recipe, pool, text, device, args.compile)
    if state:
        trainer.restore(state)
    train(trainer, args.output, args.save_every)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    default = TransformerRecipe()
    parser = Parser(prog="python -m training.train", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--tier", choices=sorted(TRANSFORMER), default=default.tier, help="how much of the world (default: %(default)s)"
    )
    parser.add_argument("--vae", type=Path, required=True, help="folder of the trained VAE")
    parser.add_argument("--text", type=Path, required=True, help="folder of the trained encoders and tokenizers")
    parser.add_argument("--output", type=Path, required=True, help="folder for checkpoint, log and transformer/")
    parser.add_argument("--pool_size", type=int, default=POOL_SIZE, help="number of pictures (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=default.steps, help="updates (default: %(default)s)")
    parser.add_argument(
        "--batch_size", type=int, default=default.batch_size, help="pictures a step (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=default.seed, help="of everything drawn (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="auto, cpu or cuda (default: %(default)s)")
    parser.add_argument("--compile", action="store_true", help="compile parts of the model, which pays on a CPU")
    parser.add_argument("--save_every", type=int, default=200, help="steps between checkpoints (default: %(default)s)")
    return run_script(run, parser, argv)


if __name__ == "__main__":
    ensure_allocator()
    raise SystemExit(main())
