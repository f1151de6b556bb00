"""The modules that hold a component's parameters, as names and shapes alone."""

import math
from dataclasses import dataclass

PARAMETERS = ("weight", "bias")


@dataclass(frozen=True)
class Layer:
    """One module that holds parameters itself.

    Attributes:
        name: dotted name within its component.
        parameters: shapes of its own parameters, in the module's order.
        is_linear: whether it is an nn.Linear; its first shape is then (out_features, in_features).
    """

    name: str
    parameters: tuple[tuple[int, ...], ...]
    is_linear: bool = False

    @property
    def num_parameters(self) -> int:
        """Number of elements in all parameters."""
        return sum(math.prod(shape) for shape in self.parameters)

    def named(self) -> list[tuple[str, tuple[int, ...]]]:
        """Full names and shapes of the parameters: the weight, and the bias if there is one."""
        return [(f"{self.name}.{name}", shape) for name, shape in zip(PARAMETERS, self.parameters, strict=False)]

    @property
    def in_features(self) -> int:
        """Input width of a linear layer."""
        return self.parameters[0][1]

    @property
    def out_features(self) -> int:
        """Output width of a linear layer."""
        return self.parameters[0][0]
