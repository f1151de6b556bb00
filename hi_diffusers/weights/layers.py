"""The modules that hold a component's parameters, as names and shapes alone."""

import math
from dataclasses import dataclass

PARAMETERS = ("weight", "bias")


@dataclass(frozen=True)
class Layer:
    """One module that holds parameters itself.

    Attributes:
        name: dotted, within its component.
        parameters: shapes of its own parameters, in the module's order.
        is_linear: whether it is an nn.Linear; its first shape is then (out_features, in_features).
    """

    name: str
    parameters: tuple[tuple[int, ...], ...]
    is_linear: bool = False

    @property
    def num_parameters(self) -> int:
        """Numbers in all of its parameters."""
        return sum(math.prod(shape) for shape in self.parameters)

    def named(self) -> list[tuple[str, tuple[int, ...]]]:
        """Its parameters' full names and shapes: a weight, and a bias where there are two."""
        return [(f"{self.name}.{name}", shape) for name, shape in zip(PARAMETERS, self.parameters, strict=False)]

    @property
    def in_features(self) -> int:
        """Of a linear, the width of what it reads."""
        return self.parameters[0][1]

    @property
    def out_features(self) -> int:
        """Of a linear, the width of what it makes."""
        return self.parameters[0][0]
