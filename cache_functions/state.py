"""The cache's state during one generation. Other modules decide which steps are full, and with which weights."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from cache_functions.anchors import PackedAnchor
from cache_functions.config import CacheConfig
from cache_functions.solver import SOLVER
from taylor_utils import weighted_sum

StepKind = Literal["full", "forecast"]


class FeatureName(NamedTuple):
    """The name of one feature that can be forecast.

    Attributes:
        target: the target that it belongs to, see `CacheConfig.target`.
        layer: index of the block over all stacks, double-stream blocks first; 0 outside the network.
        part: name of a part of a block, such as "attention"; "" outside the network.
        place: number of the tensor among several results.
    """

    target: str
    layer: int = 0
    part: str = ""
    place: int = 0


@dataclass
class Current:
    """The position of the denoising loop; only `cal_type` and `make_full` change it.

    Attributes:
        num_steps: steps of this generation.
        step: index of the running step, -1 before the first.
        kind: "full" or "forecast".
        weights: weights of the step's forecast, one per anchor, oldest first. Empty on a full step, unless the
            schedule uses the error that a forecast of it would have had.
    """

    num_steps: int
    step: int = -1
    kind: StepKind = "full"
    weights: tuple[float, ...] = ()


@dataclass
class CacheState:
    """The anchors of one generation: for every feature its tensors at the last full steps, oldest first.

    Attributes:
        config: the resolved configuration.
        plan: the full steps; None if the schedule decides during the generation.
        sigmas: noise level of every step, if they are known.
        full_steps: indices of all full steps so far, in order.
        anchors: the kept tensors, each owning its memory; packed if the configuration asks.
        errors: if the schedule decides during the generation, the relative error that a forecast of each full step
            but the first would have had, averaged over the features.
        sum_over_ranks: sums what several processes measured, each on its share of the features, so that all decide
            alike; None: there is one process.
    """

    config: CacheConfig
    plan: frozenset[int] | None = None
    sigmas: tuple[float, ...] = ()
    full_steps: list[int] = field(default_factory=list)
    anchors: dict[FeatureName, list[Tensor | PackedAnchor]] = field(default_factory=dict)
    errors: list[float] = field(default_factory=list)
    sum_over_ranks: Callable[[Tensor], Tensor] | None = None
    _observed: list[Tensor] = field(default_factory=list)

    @property
    def max_anchors(self) -> int:
        """The number of full steps whose features are kept."""
        return len(self.plan) if self.config.target == SOLVER and self.plan else self.config.max_order + 1

    @property
    def anchor_steps(self) -> list[int]:
        """Indices of the full steps whose features are kept, oldest first."""
        return self.full_steps[-self.max_anchors :]

    def keep(self, name: FeatureName, feature: Tensor) -> None:
        """Keep a feature of the running full step and drop the oldest beyond `max_anchors`.

        A view is copied: it would keep its whole base tensor (the text tokens behind a single-stream block's
        image tokens are 9 % of its output at 1024x1024).
        """
        kept = self.anchors.setdefault(name, [])
        if len(kept) == self.max_anchors:
            del kept[0]
        feature = feature.detach()
        if self.config.anchor_dtype is not None or self.config.anchor_device is not None:
            kept.append(PackedAnchor.of(feature, self.config.anchor_dtype, self.config.anchor_device))
            return
        if feature.untyped_storage().nbytes() != feature.nbytes:
            feature = feature.clone(memory_format=torch.contiguous_format)
        kept.append(feature)

    def forecast(self, name: FeatureName, weights: Sequence[float]) -> Tensor:
        """The weighted sum of a feature's anchors, in the feature's dtype and on its device."""
        kept = self.anchors[name]
        newest, plain = kept[-1], [one for one in kept if isinstance(one, Tensor)]
        if not isinstance(newest, PackedAnchor):
            return weighted_sum(weights, plain)
        packed = [one for one in kept if isinstance(one, PackedAnchor)]
        read = [(w, one) for w, one in zip(weights, packed, strict=True) if w != 0.0] or [(0.0, newest)]
        return weighted_sum([w for w, _ in read], [one.unpack() for _, one in read], newest.dtype)

    @property
    def watches_errors(self) -> bool:
        """Whether the schedule uses the errors of forecasts."""
        return self.plan is None

    def observe(self, feature: Tensor, forecast: Tensor) -> None:
        """Record the relative error of a forecast of a feature that was just computed."""
        norms = torch.stack(((forecast - feature).float().norm(), feature.float().norm()))
        if self.sum_over_ranks is not None:
            norms = self.sum_over_ranks(norms**2).sqrt()
        self._observed.append(norms[0] / norms[1].clamp(min=1e-12))

    def close_step(self) -> None:
        """Append the mean of the last step's errors to `errors`; this waits for the device once per full step."""
        if self._observed:
            self.errors.append(float(torch.stack(self._observed).mean()))
            self._observed.clear()

    def start_over(self, step: int) -> None:
        """Drop what was kept before the running full step, which cannot forecast what follows."""
        self.free()
        self.full_steps.append(step)

    def num_bytes(self) -> int:
        """Bytes of all kept tensors."""
        return sum(anchor.nbytes for kept in self.anchors.values() for anchor in kept)

    def free(self) -> None:
        """Drop everything that was kept."""
        self.anchors.clear()
        self.full_steps.clear()
        self.errors.clear()
        self._observed.clear()
