"""The calls of a denoiser within a step, told apart: each branch has anchors of its own."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from cache_functions import CacheState, Current, FeatureName, cal_type, make_full
from cache_functions.feature import keep_feature
from cache_functions.state import StepKind
from forecasting.parts import Part

TEXTS = ("encoder", "prompt", "text", "pooled", "cap_")
"""Words in the names of a denoiser's inputs that hold what the text encoders made."""
Key = tuple[int, str | None, tuple[tuple[int, ...], ...], int]
"""(number of the denoiser, name of its cache context, shapes of its inputs, which such call of the step)."""


class Constants:
    """The inputs of a branch that stay the same from call to call: texts, positions, a picture to edit.

    Whoever changes one of them in a callback asks for another picture, which what was kept cannot forecast. Single
    numbers (timesteps, guidance) are not looked at. A branch's inputs have the same shapes at every call.

    Attributes:
        kept: the inputs at the last call and their versions; None for those that changed. None before the first call.
        is_known: whether two calls were compared, which tell which inputs stay the same.
    """

    def __init__(self) -> None:
        self.kept: list[tuple[Tensor, int] | None] | None = None
        self.is_known = False

    def changed(self, inputs: list[tuple[str, Tensor]]) -> bool:
        """Whether an input that never changed has another value now; of the second call, one that is a text by name."""
        inputs = [(name, one) for name, one in inputs if one.ndim > 1]
        fresh = [(one, version_of(one)) for _, one in inputs]
        if self.kept is None:
            self.kept = list(fresh)
            return False
        same = [old is None or _equal(old, new) for old, new in zip(self.kept, fresh, strict=True)]
        pairs = zip(self.kept, fresh, strict=True)
        if not self.is_known:
            self.is_known = True
            texts = [any(word in name for word in TEXTS) for name, _ in inputs]
            keep = [is_same or is_text for is_same, is_text in zip(same, texts, strict=True)]
            self.kept = [new if stays else None for new, stays in zip(fresh, keep, strict=True)]
            return any(is_text and not is_same for is_same, is_text in zip(same, texts, strict=True))
        self.kept = [None if old is None else new for old, new in pairs]
        return not all(same)


@dataclass
class Branch:
    """One call of every step.

    Attributes:
        target: see `CacheConfig.target`.
        cache_dic: its anchors; None if the cache is off, or the target is x0, which all branches share.
        current: the running step.
        kind: whether it is computed in the running step.
        leaves, spec: its last computed output, flattened; tensors are kept only where they are needed again.
        parts: shape of each part's first input, and shapes of its result, to stand in for what nobody reads.
        constants: inputs that never changed so far.
        reshaped: whether a part's result in the running call has another shape than before.
    """

    target: str
    cache_dic: CacheState | None
    current: Current
    kind: StepKind = "full"
    leaves: list[Any] = field(default_factory=list)
    spec: TreeSpec | None = None
    parts: dict[FeatureName, tuple[Any, Any]] = field(default_factory=dict)
    constants: Constants = field(default_factory=Constants)
    reshaped: bool = False

    def begin(self, step: int, shared: StepKind | None) -> None:
        """Decide whether it is computed in a step.

        Args:
            shared: the step's decision for target x0, which holds for all branches that have an output to go on with.
        """
        if shared is not None:
            self.kind = "full" if self.spec is None else shared
            return
        self.kind = cal_type(self.cache_dic, self.current, step)

    def forget(self) -> None:
        """Drop what was kept; its next call is computed."""
        self.spec = None
        if self.cache_dic is not None:
            self.cache_dic.free()

    def keep_output(self, output: Any) -> None:
        """Keep a computed output for the steps that follow."""
        leaves, self.spec = tree_flatten(output)
        self.leaves = leaves if self.target == "x0" else [None if isinstance(one, Tensor) else one for one in leaves]
        if self.cache_dic is None or self.target == "x0":
            return
        if self.target == "velocity":
            named = {
                FeatureName("velocity", place=place): one for place, one in enumerate(leaves) if isinstance(one, Tensor)
            }
            if any(self._differs(name, one) for name, one in named.items()):
                self.cache_dic.start_over(self.current.step)
            for name, one in named.items():
                keep_feature(self.cache_dic, self.current, name, one)
        elif self.reshaped:  # what was kept before the first part with another shape is lost
            self.forget()
            self.reshaped = False

    def answer(self) -> Any:
        """The output of a forecast step: the forecast; for x0 the last computed one, which nobody reads."""
        assert self.spec is not None
        leaves = list(self.leaves)
        if self.cache_dic is not None:
            for name in self.cache_dic.anchors:
                leaves[name.place] = self.cache_dic.forecast(name, self.current.weights)
        return tree_unflatten(leaves, self.spec)

    @torch.compiler.disable
    def keep_part(self, part: Part, inputs: Any, result: Any) -> None:
        """Keep a part's computed result."""
        assert self.cache_dic is not None
        self.parts[part.feature()] = (_first_shape(inputs), _shape_of(result))
        for place, feature in _features(result) if part.is_forecast else ():
            name = part.feature(place)
            if self._differs(name, feature):
                self.reshaped = True
            else:
                keep_feature(self.cache_dic, self.current, name, feature)

    @torch.compiler.disable
    def can_forecast(self, part: Part, inputs: Any) -> bool:
        """Whether a part was computed before, with inputs of the same shape."""
        kept = self.parts.get(part.feature())
        return kept is not None and kept[0] == _first_shape(inputs)

    def compute_after_all(self) -> None:
        """Make a forecast call a computed one, before anything of it was forecast."""
        assert self.cache_dic is not None
        make_full(self.cache_dic, self.current)
        self.kind = "full"

    @torch.compiler.disable
    def forecast_part(self, part: Part) -> Any:
        """A part's result on a forecast step: forecasts, and zeros for what nobody reads."""
        assert self.cache_dic is not None
        result = _stand_in(self.parts[part.feature()][1])
        if not part.is_forecast:
            return result
        leaves = list(result) if isinstance(result, tuple) else [result]
        for place, _ in _features(result):
            leaves[place] = self.cache_dic.forecast(part.feature(place), self.current.weights)
        return tuple(leaves) if isinstance(result, tuple) else leaves[0]

    def _differs(self, name: FeatureName, feature: Tensor) -> bool:
        """Whether a feature has another shape than its anchors."""
        kept = self.cache_dic.anchors.get(name, []) if self.cache_dic is not None else []
        return bool(kept) and kept[-1].shape != feature.shape


def version_of(tensor: Tensor) -> int:
    """Changes whenever a tensor is written to; in inference mode nobody counts that."""
    return 0 if tensor.is_inference() else tensor._version


def named_tensors(inputs: Any) -> list[tuple[str, Tensor]]:
    """All tensors in a call's inputs, each with the name of its argument; "" for positional ones."""
    args, kwargs = inputs
    named = [("", args), *kwargs.items()]
    return [(name, one) for name, value in named for one in tensors_of(value)]


def tensors_of(inputs: Any) -> list[Tensor]:
    """All tensors in a call's inputs."""
    return [one for one in tree_flatten(inputs)[0] if isinstance(one, Tensor)]


def num_outputs(output: Any) -> int:
    """The number of tensors that a denoiser's output itself consists of."""
    if isinstance(output, Tensor):
        return 1
    parts = output.values() if isinstance(output, dict) else output if isinstance(output, tuple) else ()
    return sum(isinstance(one, Tensor) for one in parts)


def _equal(old: tuple[Tensor, int], new: tuple[Tensor, int]) -> bool:
    """Whether an input has the same values as before. One that was written to in place counts as changed."""
    (before, version), (now, _) = old, new
    if before is now:
        return version == new[1]
    if version != version_of(before) or before.dtype != now.dtype or before.device != now.device:
        return False
    return torch.equal(before, now)


def _features(result: Any) -> list[tuple[int, Tensor]]:
    """The results of a part that are forecast: the image's, and whatever follows the text's, which is the second."""
    several = result if isinstance(result, tuple) else (result,)
    return [(place, one) for place, one in enumerate(several) if place != 1 and isinstance(one, Tensor)]


def _first_shape(inputs: Any) -> torch.Size | None:
    args, kwargs = inputs
    return next((one.shape for one in (*args, *kwargs.values()) if isinstance(one, Tensor)), None)


def _shape_of(result: Any) -> Any:
    """What `_stand_in` needs to replace a part's result."""
    if isinstance(result, tuple):
        return tuple(_shape_of(one) for one in result)
    return (result.shape, result.dtype, result.device) if isinstance(result, Tensor) else None


def _stand_in(shape: Any) -> Any:
    """Zeros in the shape of a part's result; they take no memory."""
    if shape is None:
        return None
    if isinstance(shape[0], torch.Size):
        size, dtype, device = shape
        return torch.zeros((), dtype=dtype, device=device).expand(size)
    return tuple(_stand_in(one) for one in shape)
