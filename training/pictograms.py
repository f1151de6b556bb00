"""The outlines of shapes and pictograms, each a short list of polygons with its little variations.

Coordinates are about -1..1, x to the right and y down; who draws them scales by the true extent.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

Rng = np.random.Generator


@dataclass(frozen=True)
class Part:
    """One filled polygon: `points` [N, 2], and the `role` that colours it.

    Roles `body`, `deep` and `light` take shades of the object's named colour; the others are details in colours of
    their own. A `face` stays visible on a dark body, a `hole` shows the background.
    """

    role: str
    points: np.ndarray


def _polygon(role: str, *points: tuple[float, float]) -> Part:
    return Part(role, np.array(points, np.float32))


def _box(role: str, left: float, top: float, right: float, bottom: float) -> Part:
    return _polygon(role, (left, top), (right, top), (right, bottom), (left, bottom))


def _ellipse(role: str, x: float, y: float, rx: float, ry: float | None = None, count: int = 28) -> Part:
    angle = np.linspace(0, 2 * np.pi, count, endpoint=False)
    return Part(role, np.stack([x + rx * np.cos(angle), y + (ry or rx) * np.sin(angle)], 1).astype(np.float32))


def _arc(role: str, x: float, y: float, radius: float, start: float, stop: float, width: float) -> Part:
    """A bent stroke from angle `start` to `stop` in radians (0 is right, pi/2 is down)."""
    angle = np.linspace(start, stop, 10)
    ring = np.stack([np.cos(angle), np.sin(angle)], 1)
    points = np.concatenate([ring * (radius + width / 2), ring[::-1] * (radius - width / 2)])
    return Part(role, (points + np.array((x, y))).astype(np.float32))


def _points_around(count: int, outer: float, inner: float) -> np.ndarray:
    angle = np.arange(2 * count) * np.pi / count - np.pi / 2
    radius = np.where(np.arange(2 * count) % 2 == 0, outer, inner)
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1).astype(np.float32)


def _circle(rng: Rng) -> list[Part]:
    return [_ellipse("body", 0, 0, 1, count=40)]


def _square(rng: Rng) -> list[Part]:
    # a rounded square is a superellipse; high powers are nearly sharp
    power = 2 / rng.uniform(7, 30)
    angle = np.linspace(0, 2 * np.pi, 64, endpoint=False) + 0.05
    corner = np.stack([np.cos(angle), np.sin(angle)], 1)
    return [Part("body", (np.sign(corner) * np.abs(corner) ** power).astype(np.float32))]


def _triangle(rng: Rng) -> list[Part]:
    return [_polygon("body", (rng.uniform(-0.2, 0.2), -0.9), (1, 0.9), (-1, 0.9))]


def _star(rng: Rng) -> list[Part]:
    return [Part("body", _points_around(5, 1, rng.uniform(0.42, 0.52)))]


def _cross(rng: Rng) -> list[Part]:
    w = rng.uniform(0.28, 0.4)
    top = [(-1, -w), (-w, -w), (-w, -1), (w, -1), (w, -w), (1, -w)]
    return [_polygon("body", *top, *((-x, -y) for x, y in top))]


def _ring(rng: Rng) -> list[Part]:
    return [_ellipse("body", 0, 0, 1, count=40), _ellipse("hole", 0, 0, rng.uniform(0.5, 0.62), count=32)]


def _heart(rng: Rng) -> list[Part]:
    angle = np.linspace(0, 2 * np.pi, 48, endpoint=False)
    x = np.sin(angle) ** 3
    y = -(13 * np.cos(angle) - 5 * np.cos(2 * angle) - 2 * np.cos(3 * angle) - np.cos(4 * angle)) / 16
    return [Part("body", np.stack([x, y * rng.uniform(0.92, 1.05)], 1).astype(np.float32))]


def _diamond(rng: Rng) -> list[Part]:
    w = rng.uniform(0.6, 0.75)
    return [_polygon("body", (0, -1), (w, 0), (0, 1), (-w, 0))]


def _house(rng: Rng) -> list[Part]:
    parts = []
    if rng.random() < 0.75:
        x = rng.choice((-0.62, 0.38))
        parts.append(_box("deep", x, -0.9, x + 0.24, -0.2))
    eaves = rng.uniform(0.92, 1.0)
    parts += [_box("body", -0.78, -0.15, 0.78, 1), _polygon("deep", (-eaves, -0.08), (0, -1), (eaves, -0.08))]
    door = rng.uniform(-0.5, 0.1)
    parts.append(_box("dark", door, 0.38, door + 0.36, 1))
    if rng.random() < 0.5:
        parts.append(_ellipse("pale", 0, -0.42, 0.16))
    for left in (-0.6, 0.24):
        if abs(left - door) > 0.3:
            parts.append(_box("glow", left, 0.12, left + 0.34, 0.46))
    return parts


def _tree(rng: Rng) -> list[Part]:
    parts = [_box("wood", -0.14, 0.2, 0.14, 1)]
    if rng.random() < 0.5:
        tiers = int(rng.integers(2, 4))
        for i in range(tiers):
            top, half = -1 + i * 1.0 / tiers, 0.5 + 0.32 * (i + 1) / tiers
            parts.append(_polygon("body", (0, top), (half, top + 1.75 / tiers), (-half, top + 1.75 / tiers)))
        parts = [Part(p.role, p.points * [1, 0.96]) for p in parts]
        dots = [(-0.2, 0.15), (0.28, 0.3), (0.06, -0.35), (-0.4, 0.48)]
    else:
        crown = [(-0.4, 0.05, 0.46), (0.4, 0.05, 0.46), (0, -0.42, 0.56)]
        parts += [_ellipse("body", x, y, radius) for x, y, radius in crown]
        dots = [(-0.45, 0.1), (0.4, 0.15), (-0.1, -0.5), (0.15, -0.1)]
    if rng.random() < 0.6:
        role = str(rng.choice(("pale", "glow", "berry")))
        parts += [_ellipse(role, x, y, 0.1, count=12) for x, y in dots[: int(rng.integers(2, 5))]]
    return parts


def _sun(rng: Rng) -> list[Part]:
    count, face = int(rng.integers(8, 13)), rng.uniform(0.56, 0.64)
    turn = rng.uniform(0, 2 * np.pi)
    parts = []
    for angle in turn + np.arange(count) * 2 * np.pi / count:
        along = np.array([np.cos(angle), np.sin(angle)])
        across = np.array([-along[1], along[0]]) * face * 2.2 / count
        foot = along * face * 0.85
        parts.append(Part("body", np.array([along, foot + across, foot - across], np.float32)))
    parts.append(_ellipse("body", 0, 0, face))
    eye, height = rng.uniform(0.18, 0.26), rng.uniform(-0.2, -0.08)
    parts += [_ellipse("face", x, height, 0.085, 0.11, count=12) for x in (-eye, eye)]
    parts.append(_arc("face", 0, 0.02, rng.uniform(0.24, 0.32), 0.35, np.pi - 0.35, 0.11))
    return parts


def _fish(rng: Rng) -> list[Part]:
    height = rng.uniform(0.5, 0.62)
    parts = [
        _polygon("deep", (0.45, 0), (1, -0.55), (0.86, 0), (1, 0.55)),
        _polygon("deep", (-0.3, -height * 0.8), (0.15, -height - 0.22), (0.4, -height * 0.5)),
        _ellipse("body", -0.2, 0, 0.8, height, count=36),
    ]
    for i in range(int(rng.integers(0, 3))):
        parts.append(_arc("light", -1.0 + 0.33 * i, 0, 0.95, -0.4, 0.4, 0.13))
    parts.append(_polygon("deep", (-0.15, 0.08), (0.25, 0.3), (-0.05, 0.34)))
    parts += [_ellipse("pale", -0.62, -0.14, 0.17, count=16), _ellipse("dark", -0.65, -0.14, 0.09, count=12)]
    flip = rng.choice((-1, 1))
    return [Part(part.role, part.points * [flip, 1]) for part in parts]


def _flower(rng: Rng) -> list[Part]:
    count, turn = int(rng.integers(5, 9)), rng.uniform(0, 2 * np.pi)
    bend = rng.choice((-1, 1))
    parts = [_box("leaf", -0.06, 0.0, 0.06, 1), _ellipse("leaf", 0.26 * bend, 0.74, 0.24, 0.11)]
    for angle in turn + np.arange(count) * 2 * np.pi / count:
        x, y = 0.42 * np.cos(angle), 0.42 * np.sin(angle) - 0.32
        parts.append(_ellipse("body", x, y, 1.55 / (count + 1.2), count=20))
    return [*parts, _ellipse(str(rng.choice(("glow", "pale"))), 0, -0.32, rng.uniform(0.2, 0.26))]


def _car(rng: Rng) -> list[Part]:
    roof = rng.uniform(-0.62, -0.5)
    parts = [
        _polygon("body", (-0.6, -0.05), (-0.38, roof), (0.3, roof), (0.62, -0.05)),
        _polygon("body", (-1, 0), (-0.9, -0.1), (0.85, -0.1), (1, 0.06), (1, 0.45), (-1, 0.45)),
        _polygon("pale", (-0.42, -0.08), (-0.28, roof + 0.13), (-0.06, roof + 0.13), (-0.06, -0.08)),
        _polygon("pale", (0.08, -0.08), (0.08, roof + 0.13), (0.22, roof + 0.13), (0.42, -0.08)),
        _ellipse("glow", 0.88, 0.1, 0.09, count=12),
    ]
    for x in (-0.52, 0.52):
        parts += [_ellipse("wheel", x, 0.45, 0.25), _ellipse("pale", x, 0.45, 0.1, count=12)]
    flip = rng.choice((-1, 1))
    return [Part(part.role, part.points * [flip, 1]) for part in parts]


def _rocket(rng: Rng) -> list[Part]:
    flame, y = rng.uniform(0.85, 1.0), np.linspace(-1, 0.6, 14)
    half = 0.36 * np.sin(np.clip((y + 1) / 1.6, 0, 1) * 2.2) ** 0.7
    hull = np.concatenate([np.stack([half, y], 1), np.stack([-half, y], 1)[::-1]]).astype(np.float32)
    parts = [_polygon("flame", (-0.22, 0.55), (0.22, 0.55), (0, flame))]
    parts += [_polygon("deep", (s * 0.2, 0.05), (s * 0.66, 0.72), (s * 0.2, 0.58)) for s in (-1, 1)]
    parts.append(Part("body", hull))
    ports = [(-0.28,), (-0.4, 0.08)][int(rng.integers(2))]
    return parts + [_ellipse("pale", 0, at, 0.16, count=16) for at in ports]


def _cat(rng: Rng) -> list[Part]:
    parts = [_ellipse("body", 0, 0.15, 0.92, 0.78, count=36)]
    for side in (-1, 1):
        parts.append(_polygon("body", (side * 0.88, -0.95), (side * 0.9, 0.1), (side * 0.2, -0.5)))
        parts.append(_polygon("light", (side * 0.76, -0.7), (side * 0.76, -0.25), (side * 0.42, -0.48)))
    eye = rng.uniform(0.3, 0.4)
    for x in (-eye, eye):
        parts += [_ellipse("glow", x, 0.05, 0.18, 0.16, count=16), _ellipse("dark", x, 0.05, 0.07, 0.14, count=12)]
    parts.append(_polygon("berry", (-0.1, 0.3), (0.1, 0.3), (0, 0.42)))
    parts += [_arc("face", x, 0.42, 0.13, 0.1, np.pi - 0.1, 0.06) for x in (-0.13, 0.13)]
    return parts


_DRAWINGS: dict[str, tuple[Callable[[Rng], list[Part]], float]] = {
    "circle": (_circle, 0.0),
    "square": (_square, 10.0),
    "triangle": (_triangle, 10.0),
    "star": (_star, 18.0),
    "cross": (_cross, 12.0),
    "ring": (_ring, 0.0),
    "heart": (_heart, 14.0),
    "diamond": (_diamond, 10.0),
    "house": (_house, 4.0),
    "tree": (_tree, 5.0),
    "sun": (_sun, 8.0),
    "fish": (_fish, 16.0),
    "flower": (_flower, 12.0),
    "car": (_car, 6.0),
    "rocket": (_rocket, 20.0),
    "cat": (_cat, 8.0),
}


def sample_parts(shape: str, rng: Rng) -> list[Part]:
    """Draw one variation of a shape, bottom part first: turned a little, centred, its bounding box's longer side 2."""
    draw, degrees = _DRAWINGS[shape]
    parts = draw(rng)
    angle = np.deg2rad(rng.uniform(-degrees, degrees))
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]], np.float32)
    turned = [part.points @ turn for part in parts]
    everything = np.concatenate(turned)
    low, high = everything.min(0), everything.max(0)
    scale = 2 / (high - low).max()
    return [Part(part.role, (points - (low + high) / 2) * scale) for part, points in zip(parts, turned, strict=True)]
