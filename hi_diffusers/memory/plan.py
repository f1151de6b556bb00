"""Plans a drawing's memory: the bytes of every stage, from configurations alone, and a strategy that fits.

A drawing has three stages: prompts are encoded, latents denoised, pictures decoded; a picture to start from is encoded
after the prompts. Each needs its components' weights and its own tensors.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import psutil
import torch

from hi_diffusers.denoising.ranks import Split
from hi_diffusers.families.family import Shapes
from hi_diffusers.families.table import find_family
from hi_diffusers.memory.sizes import (
    LATENT_BYTES,
    anchor_bytes,
    conditioning_bytes,
    decode_bytes,
    embedded_numbers,
    encode_bytes,
    forward_bytes,
    image_tokens,
    largest_layer_bytes,
    latent_numbers,
    pinned_bytes,
    weight_bytes,
    written_out_bytes,
)
from hi_diffusers.request.drawing import Drawing
from hi_diffusers.request.placement import Offload
from hi_diffusers.weights.source import GIB, ModelSource

CUDA_RESERVE = 3 * GIB // 4  # context, kernels, workspaces, and what the allocator cannot use
LATENT_COPIES = 4  # latents, x0, velocity, and the solver's history


@dataclass(frozen=True)
class Strategy:
    """One way to keep a model.

    Attributes:
        sentence: description for the user.
        offload: see `Placement`.
        frees_encoders: whether prompts are encoded before the denoiser is loaded.
        tracked: whether the plan was held against the tensors that are alive at the real size, on shapes alone.
    """

    sentence: str
    offload: Offload = "none"
    frees_encoders: bool = False
    tracked: bool = True


STRATEGIES = {
    "resident": Strategy("everything stays on the card"),
    "free encoders": Strategy(
        "prompts are encoded before the transformer is loaded, and the encoders then dropped", frees_encoders=True
    ),
    "offload": Strategy(
        "each component is on the card while it works, and in the host's memory otherwise", offload="model"
    ),
    "group offload": Strategy(
        "each layer is on the card while it works, the next one coming in beside it", offload="group", tracked=False
    ),
}
"""The strategies, in the order in which they are tried."""


@dataclass(frozen=True)
class Demand:
    """A drawing and the settings that its memory depends on.

    Attributes:
        drawing: the drawing.
        source: the model's files, and so their quantization.
        dtype: dtype of the weights that are not quantized, and of the arithmetic.
        batch_size: pictures per batch.
        fp8: whether the transformer's blocks multiply in fp8.
        encoders_elsewhere: whether the text encoders are on another device.
        keeps_encoders: whether prompts are encoded at any time, not only before the first drawing.
        split: how a picture is split over GPUs; the memory is that of the first one, which also encodes and decodes.
    """

    drawing: Drawing
    source: ModelSource = field(default_factory=ModelSource)
    dtype: torch.dtype = torch.bfloat16
    batch_size: int = 1
    fp8: bool = False
    encoders_elsewhere: bool = False
    keeps_encoders: bool = False
    split: Split = field(default_factory=Split)

    @cached_property
    def shapes(self) -> Shapes:
        """The sizes of the model."""
        preset = self.drawing.preset
        return find_family(preset).shapes(preset, self.source, fp8=self.fp8)

    def check_split(self) -> None:
        """Raise ValueError if the drawing cannot be split so."""
        options = self.drawing.options
        self.split.check(
            options.guided,
            heads=self.shapes.num_heads,
            tokens_of_a_prompt=options.max_sequence_length,
            tokens_of_the_picture=image_tokens(self.shapes, options),
        )

    @property
    def is_packed(self) -> bool:
        """Whether weights are quantized, so that layers cannot be moved one by one."""
        return self.shapes.denoiser_bytes is not None or bool(set(self.shapes.packed) - {self._fp8_part})

    @property
    def _fp8_part(self) -> str:
        return self.shapes.denoiser if self.fp8 else ""


@dataclass(frozen=True)
class Stage:
    """One stage of a drawing.

    Attributes:
        name: "encode", "denoise" or "decode"; "begin", in which a picture to start from is encoded.
        components: the components whose weights it needs.
        tensors: name -> bytes of everything else that it holds at once.
        tiled: the same if pictures are decoded in tiles.
    """

    name: str
    components: tuple[str, ...]
    tensors: dict[str, int]
    tiled: dict[str, int]


@dataclass(frozen=True)
class MemoryPlan:
    """The memory that a drawing needs, and the strategy that fits it into a budget.

    Attributes:
        weights: component -> bytes.
        encoders: the components that encode prompts.
        stages: encode, begin with a picture to start from, denoise, decode.
        elsewhere: components that are on another device.
        keeps_encoders: whether prompts are encoded at any time, so that the encoders are never dropped.
        num_ranks: processes that draw together, each with its own GPU; nothing is moved to the host's memory then.
        largest_layer: bytes of the largest layer; None if layers cannot be moved one by one.
        pinned: bytes of pinned host memory for all layers; torch rounds each tensor up to a power of two there.
        host_anchors: bytes that the cache keeps in host memory.
        budget: bytes that may be used on the GPU; None is no limit.
        host_budget: bytes of host memory that offloaded components may take; None is no limit.
    """

    weights: dict[str, int]
    encoders: tuple[str, ...]
    stages: tuple[Stage, ...]
    elsewhere: tuple[str, ...] = ()
    keeps_encoders: bool = False
    num_ranks: int = 1
    largest_layer: int | None = None
    pinned: int = 0
    host_anchors: int = 0
    budget: int | None = None
    host_budget: int | None = None

    @property
    def strategies(self) -> tuple[str, ...]:
        """The names of the strategies that are possible for this drawing, in the order in which they are tried."""
        absent = set()
        if self.elsewhere or self.keeps_encoders:
            absent.add("free encoders")
        if self.largest_layer is None:
            absent.add("group offload")
        if self.num_ranks > 1:
            absent |= {name for name, strategy in STRATEGIES.items() if strategy.offload != "none"}
        return tuple(name for name in STRATEGIES if name not in absent)

    def peak(self, strategy: str, tiled: bool = False) -> int:
        """Peak bytes on the GPU."""
        return max(self.at(strategy, stage, tiled) for stage in self.stages)

    def host(self, strategy: str) -> int:
        """Bytes of host memory: kept anchors, and offloaded components or the largest one on its way to the GPU."""
        weights = [size for name, size in self.weights.items() if name not in self.elsewhere]
        away = self.host_anchors + sum(size for name, size in self.weights.items() if name in self.elsewhere)
        if strategy == "group offload":
            return away + self.pinned
        return away + (sum(weights) if strategy == "offload" else max(weights))

    @property
    def choice(self) -> tuple[str, bool] | None:
        """The first strategy that fits, and whether pictures are decoded in tiles; None if none does."""
        ways = ((name, tiled) for name in self.strategies if self.fits_host(name) for tiled in (False, True))
        return next((way for way in ways if self.budget is None or self.peak(*way) <= self.budget), None)

    def of_others(self) -> int:
        """Peak bytes on the other ranks' GPUs, which neither encode prompts nor decode pictures."""
        (denoise,) = (stage for stage in self.stages if stage.name == "denoise")
        weights = sum(size for name, size in self.weights.items() if name not in self.encoders)
        return weights + sum(denoise.tensors.values())

    def fits_host(self, strategy: str) -> bool:
        """Whether the host's memory holds what a strategy keeps there."""
        keeps = STRATEGIES[strategy].offload != "none" or self.host_anchors > 0
        return not keeps or self.host_budget is None or self.host(strategy) <= self.host_budget

    @property
    def strategy(self) -> str | None:
        """The first strategy that fits; None if none does."""
        return self.choice and self.choice[0]

    @property
    def tiled(self) -> bool:
        """Whether pictures are decoded in tiles."""
        return self.choice is not None and self.choice[1]

    def at(self, strategy: str, stage: Stage, tiled: bool = False) -> int:
        """Bytes on the GPU during a stage."""
        return self._on_card(strategy, stage) + sum((stage.tiled if tiled else stage.tensors).values())

    def _on_card(self, strategy: str, stage: Stage) -> int:
        here = {name: size for name, size in self.weights.items() if name not in self.elsewhere}
        if strategy == "resident":
            return sum(here.values())
        if strategy == "free encoders":
            encodes = stage.name == "encode"
            return sum(size for name, size in here.items() if (name in self.encoders) == encodes)
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
        memory = f"host: this machine has {host_memory() / GIB:.1f} GiB"
        files = f"files: about {sum(self.weights.values()) / 1e9:.1f} GB on the disk"
        lines += [f"weights: {details}", f"tensors: {parts}", f"{memory}; {files}", self.sentence()]
        return "\n".join(lines)

    def evidence(self) -> str:
        """What was done to check such a plan."""
        if self.num_ranks > 1:
            return "computed, not checked: the plan for one process, with what is split divided (docs/scaling.md)"
        checked = [name for name in self.strategies if STRATEGIES[name].tracked]
        others = [name for name in self.strategies if name not in checked]
        text = f"checked at the published sizes, on shapes alone: {', '.join(checked)} (docs/models.md)"
        return text + "".join(f"; not checked: {name}" for name in others) + "; on a GPU: nothing yet"

    def sentence(self) -> str:
        """The choice and its reason."""
        names = self.strategies
        if self.budget is None:
            return f"resident: {STRATEGIES['resident'].sentence}, {self.peak('resident') / GIB:.1f} GiB"
        limit = f"{self.budget / GIB:.1f} GiB"
        if self.choice is None:
            for name in names:
                if self.host_budget is not None and not self.fits_host(name) and self.peak(name, True) <= self.budget:
                    wanted = f"needs {self.host(name) / GIB:.1f} GiB of host memory"
                    return f"{name} {wanted}, and this machine has {self.host_budget / GIB:.1f}"
            least = f"{self.peak(names[-1], tiled=True) / GIB:.1f} GiB"
            return f"does not fit into {limit}: even with {names[-1]} it needs {least}"
        name, tiled = self.choice
        why = "".join(f"; {one} would need {self.peak(one) / GIB:.1f} GiB" for one in names[: names.index(name)])
        tiles = ", pictures are decoded in tiles" if tiled else ""
        return f"{name}: {STRATEGIES[name].sentence}{tiles}, {self.peak(name, tiled) / GIB:.1f} GiB of {limit}{why}"


def plan_memory(demand: Demand, budget: int | None = None, host_budget: int | None = None) -> MemoryPlan:
    """Plan the memory of a drawing.

    Args:
        budget: bytes that may be used on the GPU; None is no limit.
        host_budget: bytes of host memory that offloaded components may take; None is no limit.
    """
    shapes, dtype = demand.shapes, demand.dtype
    weights = {name: weight_bytes(layers, dtype, shapes.packed.get(name)) for name, layers in shapes.components.items()}
    if shapes.denoiser_bytes is not None:
        weights[shapes.denoiser] = shapes.denoiser_bytes
    weights[shapes.denoiser] += shapes.added_bytes
    drawing = demand.drawing
    anchors = anchor_bytes(shapes, drawing.options, drawing.cache, demand.batch_size, dtype, demand.split.size)
    layers = shapes.components.values()
    return MemoryPlan(
        weights,
        shapes.encoders,
        _stages(demand),
        elsewhere=shapes.encoders if demand.encoders_elsewhere else (),
        keeps_encoders=demand.keeps_encoders,
        num_ranks=demand.split.size,
        largest_layer=None if demand.is_packed else max(largest_layer_bytes(one, dtype) for one in layers),
        pinned=sum(pinned_bytes(one, dtype) for one in layers),
        host_anchors=anchors if drawing.cache.anchor_device else 0,
        budget=budget,
        host_budget=host_budget,
    )


def _stages(demand: Demand) -> tuple[Stage, ...]:
    shapes, dtype, num_pictures = demand.shapes, demand.dtype, demand.batch_size
    options, cache = demand.drawing.options, demand.drawing.cache
    split = demand.split
    branches = num_pictures * (2 if options.guided else 1)
    embeds = branches * embedded_numbers(shapes, options.max_sequence_length) * dtype.itemsize
    unpacked = {
        name: written_out_bytes(shapes.components[name], per_number) for name, per_number in shapes.unpacking.items()
    }
    # the encoders' states, and the embeddings that they are joined to
    encoding = {
        "embeddings": embeds,
        "encoders at work": max(embeds, *(unpacked.get(name, 0) for name in shapes.encoders)),
    }
    copies = LATENT_COPIES + (0 if options.image is None else 2)  # the picture's, and where the mask holds them
    one_by_one = demand.fp8 or shapes.denoiser in unpacked or shapes.denoiser_bytes is not None
    here = branches // 2 if split.guidance else branches
    forward = forward_bytes(shapes, options, here, dtype, one_by_one=one_by_one, fp8=demand.fp8, ulysses=split.ulysses)
    anchors = anchor_bytes(shapes, options, cache, num_pictures, dtype, split.size)
    denoising = {
        "embeddings and their projections": embeds + conditioning_bytes(shapes, options, cache, branches, dtype),
        "latents": copies * num_pictures * latent_numbers(shapes, options) * LATENT_BYTES,
        "anchors": 0 if cache.anchor_device else anchors,
        "a forward": max(forward, unpacked.get(shapes.denoiser, 0)),
    }
    tile = find_family(demand.drawing.preset).tile
    decoding, in_tiles = (
        {"a decoding": decode_bytes(shapes, options, num_pictures, dtype, size)} for size in (None, tile)
    )
    stages = [
        Stage("encode", shapes.encoders, encoding, encoding),
        Stage("denoise", (shapes.denoiser,), denoising, denoising),
        Stage("decode", (shapes.decoder,), decoding, in_tiles),
    ]
    if options.image is not None:
        whole, by_tiles = (
            {"embeddings of the prompt": embeds, "a picture": encode_bytes(shapes, options, num_pictures, dtype, size)}
            for size in (None, tile)
        )
        stages.insert(1, Stage("begin", (shapes.decoder,), whole, by_tiles))
    return tuple(stages)


def memory_budget(device: torch.device, vram: float | None) -> int | None:
    """Bytes that weights and tensors may take on the device; None where nothing limits them, as on the CPU.

    Args:
        vram: GiB of the card that may be used; None is what is free.
    """
    if device.type != "cuda":
        return None
    free = torch.cuda.mem_get_info(device)[0] if vram is None else int(vram * GIB)
    return max(0, free - CUDA_RESERVE)


def host_memory() -> int:
    """Bytes of this machine's memory."""
    return int(psutil.virtual_memory().total)


def ways_out(demand: Demand, budget: int, host_budget: int | None = None) -> list[str]:
    """Up to three changes that make a drawing fit, with the strategy that each makes possible; smallest change first.

    Args:
        budget, host_budget: as in `plan_memory`; the drawing does not fit into them as it is.
    """
    plans = ((way, plan_memory(other, budget, host_budget).strategy) for way, other in _lighter(demand))
    found = [f"{way} ({strategy})" for way, strategy in plans if strategy is not None]
    return [*found[:2], "--device cpu"]


def _lighter(demand: Demand) -> Iterator[tuple[str, Demand]]:
    """Drawings that need less, and the flags that ask for them."""
    drawing, cache = demand.drawing, demand.drawing.cache

    def cached(**settings: Any) -> Drawing:
        return replace(drawing, cache=replace(cache, **settings))

    quantization = demand.source.quantization
    packed = replace(demand, source=demand.source.repacked("nf4"))
    if demand.batch_size > 1:
        yield "--batch_size 1", replace(demand, batch_size=1)
    keeps_features = cache.target in ("module", "residual")
    light = cached(target="x0") if keeps_features else drawing
    if keeps_features:
        yield "--cache best, which keeps a few latents", replace(demand, drawing=light)
        yield "--anchor_dtype fp8", replace(demand, drawing=cached(anchor_dtype="fp8"))
        yield "--anchor_device cpu", replace(demand, drawing=cached(anchor_device="cpu"))
    if quantization != "nf4":
        yield "--quantization nf4", packed
    if not demand.encoders_elsewhere:
        yield "--encoder_device cpu", replace(demand, encoders_elsewhere=True)
    if quantization == "nf4":
        plain = replace(demand, source=demand.source.repacked("none"))
        yield "no --quantization, so that layers are copied to the card one by one", plain
    if keeps_features and quantization != "nf4":
        yield "--quantization nf4 with --cache best", replace(packed, drawing=light)


def _gib(*sizes: int) -> tuple[str, ...]:
    return tuple(f"{size / GIB:.2f}" for size in sizes)
