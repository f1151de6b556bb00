"""A naive TaylorSeer for any denoiser, written from the paper (arXiv 2503.06923): the reference for target module.

Every attention and feed-forward is a wrapped forward that keeps derivatives by the paper's recursion and evaluates the
Taylor formula; nothing is shared with the cache. The text's results are forecast, too.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten


class Taylor:
    """Derivatives of one tensor at the last full step."""

    def __init__(self, max_order: int):
        self.max_order = max_order
        self.derivatives: list[Tensor] = []
        self.step = 0

    def update(self, feature: Tensor, step: int) -> None:
        fresh = [feature]
        for order, old in enumerate(self.derivatives[: self.max_order]):
            fresh.append((fresh[order] - old) / (step - self.step))
        self.derivatives, self.step = fresh, step

    def formula(self, step: int) -> Tensor:
        ahead = step - self.step
        return sum(d * ahead**order / math.factorial(order) for order, d in enumerate(self.derivatives))


class Naive:
    """Counts steps by calls of the scheduler, and branches by the order of calls within a step."""

    def __init__(self, full_steps: set[int], max_order: int):
        self.full_steps, self.max_order = full_steps, max_order
        self.step, self.call = 0, -1
        self.kept: dict[Any, Taylor] = {}
        self.specs: dict[Any, Any] = {}

    def around(self, name: str, forward: Any) -> Any:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            key = (self.call, name)
            if self.step in self.full_steps:
                result = forward(*args, **kwargs)
                leaves, self.specs[key] = tree_flatten(result)
                for place, leaf in enumerate(leaves):
                    self.kept.setdefault((key, place), Taylor(self.max_order)).update(leaf, self.step)
                return result
            places = range(len([1 for one in self.kept if one[0] == key]))
            return tree_unflatten([self.kept[key, place].formula(self.step) for place in places], self.specs[key])

        return wrapped


@contextmanager
def naive_taylorseer(pipe: Any, names: dict[str, tuple[str, ...]], full_steps: set[int], max_order: int) -> Iterator:
    """Forecast the named modules of a pipeline's blocks.

    Args:
        names: name of a list of blocks -> the modules of each block that are forecast.
    """
    naive = Naive(full_steps, max_order)
    changed: list[tuple[Any, str]] = []

    def replace(thing: Any, name: str, value: Any) -> None:
        thing.__dict__[name] = value
        changed.append((thing, name))

    def counted(forward: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            naive.call += 1
            return forward(*args, **kwargs)

        return call

    transformer: nn.Module = pipe.transformer
    for stack, parts in names.items():
        for number, block in enumerate(getattr(transformer, stack)):
            block = getattr(block, "block", block)
            for part in parts:
                module = getattr(block, part)
                if module is None:  # the last block may have no text
                    continue
                replace(module, "forward", naive.around(f"{stack}.{number}.{part}", module.forward))
    replace(transformer, "forward", counted(transformer.forward))
    step = pipe.scheduler.step

    def stepped(*args: Any, **kwargs: Any) -> Any:
        naive.step, naive.call = naive.step + 1, -1
        return step(*args, **kwargs)

    replace(pipe.scheduler, "step", stepped)
    try:
        yield naive
    finally:
        for thing, name in changed:
            del thing.__dict__[name]
