"""The ten colour names as ramps from a deep to a light shade; no two names meet, so a picture can be read back."""

from __future__ import annotations

import colorsys
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class ColourRange:
    """The shades of a name: hue in degrees (may pass 360), and (saturation, value) at the deep and the light end."""

    hue: tuple[float, float]
    deep: tuple[float, float]
    light: tuple[float, float]


COLOUR_RANGES = {
    "red": ColourRange((350, 364), (0.96, 0.66), (0.76, 0.98)),
    "orange": ColourRange((23, 32), (1.00, 0.88), (0.72, 1.00)),
    "yellow": ColourRange((48, 56), (0.95, 0.85), (0.50, 1.00)),
    "green": ColourRange((100, 145), (0.85, 0.42), (0.55, 0.85)),
    "cyan": ColourRange((174, 188), (0.95, 0.70), (0.40, 1.00)),
    "blue": ColourRange((214, 234), (0.92, 0.52), (0.60, 0.98)),
    "purple": ColourRange((268, 286), (0.80, 0.44), (0.48, 0.85)),
    "pink": ColourRange((322, 342), (0.55, 0.92), (0.24, 1.00)),
    "white": ColourRange((0, 360), (0.06, 0.83), (0.00, 1.00)),
    "black": ColourRange((0, 360), (0.30, 0.04), (0.25, 0.25)),
}


@dataclass(frozen=True)
class Ramp:
    """A colour name as drawn once: RGB in 0..255, float32 [3], at the deep end (t = 0) and at the light end (t = 1)."""

    deep: np.ndarray
    light: np.ndarray

    def at(self, t: np.ndarray | float) -> np.ndarray:
        """The shade at t in 0..1, [..., 3] for t [...]."""
        return self.deep + np.asarray(t, np.float32)[..., None] * (self.light - self.deep)


def sample_ramp(name: str, rng: np.random.Generator) -> Ramp:
    """Draw a ramp for a colour name; each end has its own hue within the name, at most a third of the range apart."""
    spread = COLOUR_RANGES[name]
    low, high = spread.hue
    middle = rng.uniform(low, high)
    ends = [float(np.clip(middle + rng.uniform(-1, 1) * (high - low) / 6, low, high)) for _ in range(2)]
    return Ramp(_rgb(ends[0], *spread.deep), _rgb(ends[1], *spread.light))


def _rgb(hue: float, saturation: float, value: float) -> np.ndarray:
    return np.array(colorsys.hsv_to_rgb(hue / 360 % 1, saturation, value), np.float32) * 255
