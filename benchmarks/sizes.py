"""What is measured: the transformer's sizes, and one of them with random weights and inputs.

Timing does not depend on the weights' values, with one exception: routing decides how many tokens each expert gets, and
random gates route nearly evenly. So every size can be measured without a download.

Shapes: B pictures, C latent channels, L Llama layers, T tokens of one text encoder.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor

from cache_functions import CacheConfig, CacheState, Current, cache_init, cal_type
from cache_functions.config import MAX_STEPS
from hi_diffusers.families.hidream.moe import MoEGate, Routing
from hi_diffusers.families.hidream.pipeline import HiDreamImagePipeline
from hi_diffusers.families.hidream.prompts import PromptEmbeds
from hi_diffusers.families.hidream.transformer import Conditioning, HiDreamImageTransformer2DModel
from hi_diffusers.families.table import PRESETS
from hi_diffusers.preset import ModelPreset


@dataclass(frozen=True)
class Size:
    """One size of the transformer, and how it is drawn with.

    Attributes:
        name: what --size takes.
        transformer: configuration of the transformer.
        num_text_tokens: tokens of each text encoder, T. A block sees three times as many: T5's, the last Llama
            layer's and its own Llama layer's.
        preset: the model that it is drawn like: steps, guidance, shift.
        num_steps: denoising steps; None is the preset's.
        repeats: rounds over single forwards and steps.
        loops: rounds over whole denoising loops.
        devices: where it can be measured.
        goals: name of a ratio -> what it should stay below on a CPU.
        source: where the configuration comes from.
    """

    name: str
    transformer: Mapping[str, Any]
    num_text_tokens: int
    preset: ModelPreset
    num_steps: int | None = None
    repeats: int = 60
    loops: int = 5
    devices: tuple[str, ...] = ("cpu", "cuda")
    goals: Mapping[str, float] = field(default_factory=dict)
    source: str = "benchmarks/sizes.py"

    @property
    def num_image_tokens(self) -> int:
        """Patches of a square picture of the largest size."""
        rows, columns = self.transformer["max_resolution"]
        return rows * columns // self.transformer["patch_size"] ** 2

    @property
    def steps(self) -> int:
        """Denoising steps."""
        return self.num_steps or self.preset.num_steps


@dataclass(frozen=True)
class Inputs:
    """What a guided evaluation takes.

    Attributes:
        latents: noise of one picture [1,C,H,W], fp32.
        branches: the same for both guidance branches [2,C,H,W], in the weights' dtype.
        timesteps: [2].
        embeds: random text, both branches.
    """

    latents: Tensor
    branches: Tensor
    timesteps: Tensor
    embeds: PromptEmbeds


@dataclass(frozen=True)
class Transformers:
    """Both classes over one set of weights: the parameters of `theirs` are the tensors of `ours`."""

    ours: HiDreamImageTransformer2DModel
    theirs: diffusers.HiDreamImageTransformer2DModel


NANO = {
    "patch_size": 2,
    "in_channels": 4,
    "num_layers": 2,
    "num_single_layers": 4,
    "attention_head_dim": 32,
    "num_attention_heads": 4,
    "caption_channels": (64, 64),
    "text_emb_dim": 128,
    "axes_dims_rope": (8, 12, 12),
    "max_resolution": (16, 16),
    "llama_layers": (0, 1, 2, 3, 3, 3),
}
SMALL = {
    "patch_size": 2,
    "in_channels": 16,
    "num_layers": 4,
    "num_single_layers": 8,
    "attention_head_dim": 64,
    "num_attention_heads": 8,
    "caption_channels": (1024, 1024),
    "text_emb_dim": 512,
    "axes_dims_rope": (32, 16, 16),
    "max_resolution": (32, 32),
    "llama_layers": tuple(range(12)),
}
REAL = {
    "patch_size": 2,
    "in_channels": 16,
    "num_layers": 16,
    "num_single_layers": 32,
    "attention_head_dim": 128,
    "num_attention_heads": 20,
    "caption_channels": (4096, 4096),
    "text_emb_dim": 2048,
    "axes_dims_rope": (64, 32, 32),
    "max_resolution": (128, 128),
    "llama_layers": (*range(32), *[31] * 16),
}
FORWARD_GOALS = {"forward": 1.0}
STEP_GOALS = {"cache_cost": 0.02, "forecast_module": 0.15, "forecast_x0": 0.01}
SIZES = ("nano", "small", "real")


def find_size(name: str) -> Size:
    """The size of that name; nano is the bundled model's if that is there."""
    if name == "nano":
        config, source = _bundled_config()
        return Size("nano", config, 32, PRESETS["nano"], repeats=300, loops=20, goals=FORWARD_GOALS, source=source)
    if name == "small":
        return Size("small", SMALL, 128, PRESETS["full"], goals={**FORWARD_GOALS, **STEP_GOALS})
    if name == "real":
        return Size("real", REAL, 128, PRESETS["full"], repeats=20, loops=3, devices=("cuda",))
    raise ValueError(f"size must be one of {', '.join(SIZES)}, got {name!r}")


def nano_folder() -> Path:
    """Where the bundled model lies."""
    folder = PRESETS["nano"].folder
    assert folder is not None
    return folder


def _bundled_config() -> tuple[Mapping[str, Any], str]:
    path = nano_folder() / "transformer" / "config.json"
    if not path.is_file():
        return NANO, Size.source
    config = json.loads(path.read_text(encoding="utf-8"))
    return {key: value for key, value in config.items() if not key.startswith("_")}, "the bundled model's config.json"


def build_ours(size: Size, device: torch.device, dtype: torch.dtype, seed: int) -> HiDreamImageTransformer2DModel:
    """Our transformer with random weights."""
    torch.manual_seed(seed)
    with torch.device(device), _default_dtype(dtype):
        ours = HiDreamImageTransformer2DModel(**size.transformer).eval()
    ours.stack_experts()  # before anybody refers to the experts' parameters, which get other memory
    return ours


def build_transformers(size: Size, device: torch.device, dtype: torch.dtype, seed: int) -> Transformers:
    """Ours with random weights, and diffusers' class over the very same tensors."""
    ours = build_ours(size, device, dtype, seed)
    with torch.device("meta"):
        theirs = diffusers.HiDreamImageTransformer2DModel(**size.transformer).eval()
    theirs.load_state_dict(ours.state_dict(), assign=True)
    return Transformers(ours, theirs)


def make_inputs(size: Size, device: torch.device, dtype: torch.dtype, seed: int) -> Inputs:
    """Random latents and text for one guided picture."""
    generator = torch.Generator("cpu").manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    config = size.transformer
    t5_channels, llama_channels = config["caption_channels"]
    num_llama_layers = max(config["llama_layers"]) + 1
    latents = draw(1, config["in_channels"], *config["max_resolution"])
    return Inputs(
        latents=latents,
        branches=torch.cat((latents, latents)).to(dtype),
        timesteps=torch.full((2,), 500, device=device),
        embeds=PromptEmbeds(
            t5=draw(2, size.num_text_tokens, t5_channels).to(dtype),
            llama=draw(num_llama_layers, 2, size.num_text_tokens, llama_channels).to(dtype),
            pooled=draw(2, config["text_emb_dim"]).to(dtype),
        ),
    )


def bare_pipeline(transformer: HiDreamImageTransformer2DModel) -> HiDreamImagePipeline:
    """Our pipeline with a transformer and nothing else."""
    components = dict.fromkeys(HiDreamImagePipeline._optional_components)
    return HiDreamImagePipeline(None, **{**components, "transformer": transformer})


@dataclass(frozen=True)
class Subject:
    """Both transformers with their inputs, and the calls that are timed.

    Attributes:
        conditioning: the text prepared once, as in the denoising loop.
    """

    size: Size
    device: torch.device
    dtype: torch.dtype
    transformers: Transformers
    inputs: Inputs
    conditioning: Conditioning

    @classmethod
    def build(cls, size: Size, device: torch.device, dtype: torch.dtype, seed: int) -> "Subject":
        """Draw weights and inputs."""
        transformers = build_transformers(size, device, dtype, seed)
        inputs = make_inputs(size, device, dtype, seed)
        rows, columns = (side // size.transformer["patch_size"] for side in inputs.branches.shape[-2:])
        embeds = inputs.embeds
        with torch.no_grad():
            conditioning = transformers.ours.prepare(embeds.t5, embeds.llama, embeds.pooled, (rows, columns))
        return cls(size, device, dtype, transformers, inputs, conditioning)

    def call_theirs(self) -> Tensor:
        """diffusers' class, as its pipeline calls it."""
        return self._call_with_text(self.transformers.theirs)

    def call_ours_with_text(self) -> Tensor:
        """Ours, called in the same way."""
        return self._call_with_text(self.transformers.ours)

    def call_ours(self, cache_dic: CacheState | None = None, current: Current | None = None) -> Tensor:
        """Ours, as the denoising loop calls it."""
        (output,) = self.transformers.ours(
            self.inputs.branches,
            self.inputs.timesteps,
            return_dict=False,
            conditioning=self.conditioning,
            cache_dic=cache_dic,
            current=current,
        )
        return output

    def step_with(self, cache: CacheConfig) -> Callable[[], Tensor]:
        """Our forward as one step after the other, up to MAX_STEPS of them, of one cached generation."""
        cache_dic, current = cache_init(cache, MAX_STEPS)

        def step() -> Tensor:
            cal_type(cache_dic, current)
            return self.call_ours(cache_dic, current)

        return step

    @torch.no_grad()
    def facts(self) -> dict[str, Any]:
        """What a reader of the timings must know of the weights: that both classes compute the same, for one."""
        ours, theirs = self.call_ours().float(), self.call_theirs().float()
        shares = self._expert_shares()
        return {
            "parameters": sum(parameter.numel() for parameter in self.transformers.ours.parameters()),
            "largest difference of the outputs over the largest output": _largest(ours - theirs) / _largest(theirs),
            "share of the tokens of any block's least and most loaded expert": [min(shares), max(shares)],
        }

    def _expert_shares(self) -> list[float]:
        shares: list[float] = []

        def count(gate: MoEGate, inputs: tuple[Tensor], routing: Routing) -> None:
            counts = routing.expert.flatten().bincount(minlength=len(gate.weight))
            shares.extend((counts / counts.sum()).tolist())

        gates = [module for module in self.transformers.ours.modules() if isinstance(module, MoEGate)]
        hooks = [gate.register_forward_hook(count) for gate in gates]
        self.call_ours()
        for hook in hooks:
            hook.remove()
        return shares

    def _call_with_text(self, transformer: Any) -> Tensor:
        embeds = self.inputs.embeds
        text = (embeds.t5, embeds.llama, embeds.pooled)
        return transformer(self.inputs.branches, self.inputs.timesteps, *text, return_dict=False)[0]


def _largest(tensor: Tensor) -> float:
    return tensor.abs().max().item()


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
