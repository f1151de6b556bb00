"""What fits where: the bytes of every stage of a drawing, told from configurations alone, and how it is kept.

A drawing has three stages: prompts are encoded, latents denoised, pictures decoded. Each needs its components' weights
and its own tensors.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import psutil
import torch
from torch import nn

from cache_functions import CacheConfig
from hi_diffusers.memory.architecture import ENCODERS, Architecture
from hi_diffusers.memory.sizes import (
    LATENT_BYTES,
    anchor_bytes,
    conditioning_bytes,
    decode_bytes,
    embedded_numbers,
    forward_bytes,
    gptq_bytes,
    largest_layer_bytes,
    latent_numbers,
    nf4_bytes,
    pinned_bytes,
    weight_bytes,
)
from hi_diffusers.models.fp8 import fp8_bytes
from hi_diffusers.models.fp8 import takes as takes_fp8
from hi_diffusers.models.nf4 import Nf4
from hi_diffusers.options import ResolvedOptions
from hi_diffusers.presets import ModelPreset

GIB = 2**30
CUDA_RESERVE = 3 * GIB // 4  # context, kernels, workspaces, and what the allocator cannot use
LATENT_COPIES = 4  # latents, x0, velocity, and the solver's history
T5_KEPT = ".wo"  # transformers quantizes all Linears of T5 but this one
STRATEGIES = {
    "resident": "everything stays on the card",
    "free encoders": "prompts are encoded before the transformer is loaded, and the encoders then dropped",
    "offload": "each component is on the card while it works, and in the host's memory otherwise",
    "group offload": "each layer is on the card while it works, the next one coming in beside it",
}


@dataclass(frozen=True)
class Drawing:
    """What is drawn, with what.

    Attributes:
        preset: the model.
        options: size, guidance and prompt length.
        cache: as resolved.
        dtype: of the weights that are not quantized, and of the arithmetic.
        quantization: of transformer and T5: "none" or "nf4".
        llama: how Llama is packed: "plain", "nf4" or "gptq".
        packed_bytes: of a transformer that stays packed as its own file has it; None where it does not.
        batch_size: pictures at once.
        fp8: the transformer's blocks multiply in fp8.
        encoders_elsewhere: the text encoders are on another device.
        keeps_encoders: prompts are encoded at any time, not only before the first drawing.
    """

    preset: ModelPreset
    options: ResolvedOptions
    cache: CacheConfig
    dtype: torch.dtype = torch.bfloat16
    quantization: str = "none"
    llama: str = "plain"
    packed_bytes: int | None = None
    batch_size: int = 1
    fp8: bool = False
    encoders_elsewhere: bool = False
    keeps_encoders: bool = False

    def packing(self) -> dict[str, Callable[[str, nn.Module], int | None]]:
        """Component -> a function of a layer's name and itself, which gives its weight's bytes where it is packed."""
        settings, packed = Nf4(), {}
        if self.quantization == "nf4":
            packed["transformer"] = lambda name, layer: nf4_bytes(layer) if settings.takes(name, layer) else None
            packed["text_encoder_3"] = lambda name, layer: None if name.endswith(T5_KEPT) else nf4_bytes(layer)
        if self.fp8:
            packed["transformer"] = lambda name, layer: fp8_bytes(layer) if takes_fp8(name, layer) else None
        if self.llama != "plain":
            of_layer = gptq_bytes if self.llama == "gptq" else nf4_bytes
            packed["text_encoder_4"] = lambda name, layer: of_layer(layer)
        return packed


@dataclass(frozen=True)
class Stage:
    """One stage of a drawing.

    Attributes:
        name: "encode", "denoise" or "decode".
        components: whose weights it needs.
        tensors: what else it holds at once -> bytes.
        tiled: the same where pictures are decoded in tiles.
    """

    name: str
    components: tuple[str, ...]
    tensors: dict[str, int]
    tiled: dict[str, int]


@dataclass(frozen=True)
class MemoryPlan:
    """What a drawing needs, and how it is fitted into a budget.

    Attributes:
        weights: component -> bytes.
        stages: encode, denoise, decode.
        elsewhere: components that are on another device.
        keeps_encoders: prompts are encoded at any time, so that the encoders are never dropped.
        largest_layer: bytes; None where layers cannot be moved one by one.
        pinned: bytes of the host's memory where layers are; torch rounds each tensor up to a power of two there.
        budget: bytes that may be used on the card; None is no limit.
    """

    weights: dict[str, int]
    stages: tuple[Stage, ...]
    elsewhere: tuple[str, ...] = ()
    keeps_encoders: bool = False
    largest_layer: int | None = None
    pinned: int = 0
    budget: int | None = None

    @property
    def strategies(self) -> tuple[str, ...]:
        """The names of those that this drawing admits, the mildest first."""
        absent = set()
        if self.elsewhere or self.keeps_encoders:
            absent.add("free encoders")
        if self.largest_layer is None:
            absent.add("group offload")
        return tuple(name for name in STRATEGIES if name not in absent)

    def peak(self, strategy: str, tiled: bool = False) -> int:
        """Bytes on the card at the worst moment."""
        return max(self.at(strategy, stage, tiled) for stage in self.stages)

    def host(self, strategy: str) -> int:
        """Bytes of the host's memory: what waits there, or the largest component on its way to the card."""
        weights = [size for name, size in self.weights.items() if name not in self.elsewhere]
        away = sum(size for name, size in self.weights.items() if name in self.elsewhere)
        if strategy == "group offload":
            return away + self.pinned
        return away + (sum(weights) if strategy == "offload" else max(weights))

    @property
    def choice(self) -> tuple[str, bool] | None:
        """The first strategy that fits, and whether pictures are decoded in tiles; None if none does."""
        ways = ((name, tiled) for name in self.strategies for tiled in (False, True))
        return next((way for way in ways if self.budget is None or self.peak(*way) <= self.budget), None)

    @property
    def strategy(self) -> str | None:
        """The first strategy that fits; None if none does."""
        return self.choice and self.choice[0]

    @property
    def tiled(self) -> bool:
        """Whether pictures are decoded in tiles."""
        return self.choice is not None and self.choice[1]

    def at(self, strategy: str, stage: Stage, tiled: bool = False) -> int:
        """Bytes on the card during a stage."""
        return self._on_card(strategy, stage) + sum((stage.tiled if tiled else stage.tensors).values())

    def _on_card(self, strategy: str, stage: Stage) -> int:
        here = {name: size for name, size in self.weights.items() if name not in self.elsewhere}
        if strategy == "resident":
            return sum(here.values())
        if strategy == "free encoders":
            encodes = stage.name == "encode"
            return sum(size for name, size in here.items() if (name in ENCODERS) == encodes)
        if strategy == "group offload":
            return 2 * (self.largest_layer or 0)
        return max((here[name] for name in stage.components if name in here), default=0)

    def to_text(self) -> str:
        """A table in GiB, and one line about the choice."""
        rows = [("", "weights", "tensors", *self.strategies)]
        for stage in self.stages:
            own, tensors = sum(self.weights[name] for name in stage.components), sum(stage.tensors.values())
            rows.append((stage.name, *_gib(own, tensors, *(self.at(name, stage) for name in self.strategies))))
        rows.append(("at once", "", "", *_gib(*(self.peak(name) for name in self.strategies))))
        rows.append(("in tiles", "", "", *_gib(*(self.peak(name, tiled=True) for name in self.strategies))))
        rows.append(("host", "", "", *_gib(*(self.host(name) for name in self.strategies))))
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
        details = ", ".join(f"{name} {size / GIB:.2f}" for name, size in self.weights.items())
        parts = ", ".join(f"{name} {size / GIB:.2f}" for stage in self.stages for name, size in stage.tensors.items())
        memory = f"host: this machine has {psutil.virtual_memory().total / GIB:.1f} GiB"
        files = f"files: about {sum(self.weights.values()) / 1e9:.1f} GB on the disk"
        return "\n".join([*lines, f"weights: {details}", f"tensors: {parts}", f"{memory}; {files}", self.sentence()])

    def sentence(self) -> str:
        """What was chosen and why."""
        names = self.strategies
        if self.budget is None:
            return f"resident: {STRATEGIES['resident']}, {self.peak('resident') / GIB:.1f} GiB"
        limit = f"{self.budget / GIB:.1f} GiB"
        if self.choice is None:
            least = f"{self.peak(names[-1], tiled=True) / GIB:.1f} GiB"
            return f"does not fit into {limit}: even with {names[-1]} it needs {least}"
        name, tiled = self.choice
        why = "".join(f"; {one} would need {self.peak(one) / GIB:.1f} GiB" for one in names[: names.index(name)])
        tiles = ", pictures are decoded in tiles" if tiled else ""
        return f"{name}: {STRATEGIES[name]}{tiles}, {self.peak(name, tiled) / GIB:.1f} GiB of {limit}{why}"


def plan_memory(drawing: Drawing, budget: int | None = None) -> MemoryPlan:
    """What a drawing needs.

    Args:
        budget: bytes that may be used on the card; None is no limit.
    """
    architecture, options, dtype = Architecture.of(drawing.preset), drawing.options, drawing.dtype
    packing = drawing.packing()
    weights = {name: weight_bytes(module, dtype, packing.get(name)) for name, module in architecture.components.items()}
    if drawing.packed_bytes is not None:
        weights["transformer"] = drawing.packed_bytes
    branches = drawing.batch_size * (2 if options.guided else 1)
    embeds = branches * embedded_numbers(architecture, options) * dtype.itemsize
    latents = LATENT_COPIES * drawing.batch_size * latent_numbers(architecture, options) * LATENT_BYTES
    denoising = {
        "embeddings and their projections": embeds
        + conditioning_bytes(architecture, options, drawing.cache, branches, dtype),
        "latents": latents,
        "anchors": anchor_bytes(architecture, options, drawing.cache, drawing.batch_size, dtype),
        "a forward": forward_bytes(architecture, options, branches, dtype),
    }
    decoding, in_tiles = (
        {"a decoding": decode_bytes(architecture, options, drawing.batch_size, dtype, tiled)} for tiled in (False, True)
    )
    movable = drawing.quantization == "none" and drawing.llama == "plain" and drawing.packed_bytes is None
    layers = (largest_layer_bytes(module, dtype) for module in architecture.components.values())
    return MemoryPlan(
        weights,
        (
            Stage("encode", ENCODERS, {"embeddings": embeds}, {"embeddings": embeds}),
            Stage("denoise", ("transformer",), denoising, denoising),
            Stage("decode", ("vae",), decoding, in_tiles),
        ),
        elsewhere=ENCODERS if drawing.encoders_elsewhere else (),
        keeps_encoders=drawing.keeps_encoders,
        largest_layer=max(layers) if movable else None,
        pinned=sum(pinned_bytes(module, dtype) for module in architecture.components.values()),
        budget=budget,
    )


def memory_budget(device: torch.device, vram: float | None) -> int | None:
    """Bytes that weights and tensors may take on the device; None where nothing limits them, as on the CPU.

    Args:
        vram: GiB of the card that may be used; None is what is free.
    """
    if device.type != "cuda":
        return None
    free = torch.cuda.mem_get_info(device)[0] if vram is None else int(vram * GIB)
    return max(0, free - CUDA_RESERVE)


def ways_out(drawing: Drawing, budget: int) -> list[str]:
    """Up to three ways to make a drawing fit that does not, the mildest first.

    Args:
        budget: bytes that it does not fit into.
    """
    found = [way for way, other in _lighter(drawing) if plan_memory(other, budget).choice is not None]
    return [*found[:2], "--device cpu"]


def _lighter(drawing: Drawing) -> Iterator[tuple[str, Drawing]]:
    """Drawings that need less, and the flags that ask for them."""
    packed = replace(
        drawing, quantization="nf4", packed_bytes=None, llama="plain" if drawing.preset.is_bundled else "gptq"
    )
    if drawing.batch_size > 1:
        yield "--batch_size 1", replace(drawing, batch_size=1)
    keeps_features = drawing.cache.target in ("module", "residual")
    light = replace(drawing.cache, target="x0") if keeps_features else drawing.cache
    if keeps_features:
        yield "--cache best, which keeps a few latents", replace(drawing, cache=light)
        yield "--anchor_dtype fp8", replace(drawing, cache=replace(drawing.cache, anchor_dtype="fp8"))
        yield "--anchor_device cpu", replace(drawing, cache=replace(drawing.cache, anchor_device="cpu"))
    if drawing.quantization != "nf4":
        yield "--quantization nf4", packed
    if not drawing.encoders_elsewhere:
        yield "--encoder_device cpu", replace(drawing, encoders_elsewhere=True)
    if drawing.quantization == "nf4":
        yield (
            "no --quantization, so that layers come to the card one by one",
            replace(drawing, quantization="none", llama="plain"),
        )
    if keeps_features and drawing.quantization != "nf4":
        yield "--quantization nf4 with --cache best", replace(packed, cache=light)


def _gib(*sizes: int) -> tuple[str, ...]:
    return tuple(f"{size / GIB:.2f}" for size in sizes)
