"""Draws a scene: what the scene fixes is drawn so, everything else is left to the generator of random numbers.

Lengths are shares of the picture's side unless they say pixels; masks are drawn four times too large and averaged down.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from training.palette import Ramp, sample_ramp
from training.pictograms import Part, sample_parts
from training.scenes import BACKGROUND_KINDS, EXTENTS, RELATIONS, Scene, SceneObject

OVERSAMPLING = 4
MARGIN = 0.025
"""Between objects and the picture's edge."""
GAP = 0.045
"""At least this much lies between the bounding boxes of two related objects."""
SLANT = 0.5
"""Centres of related objects differ across the relation's axis by at most this share of what they differ along it."""
LONE_LARGE = 0.56
"""The largest extent of a large object that has the picture to itself."""

_DETAILS = {
    "dark": (44, 34, 48),
    "face": (44, 34, 48),
    "pale": (250, 246, 232),
    "glow": (255, 214, 92),
    "berry": (214, 60, 78),
    "wood": (126, 84, 52),
    "leaf": (62, 138, 66),
    "wheel": (50, 44, 54),
    "flame": (255, 150, 40),
}


@dataclass(frozen=True)
class _Placed:
    """An object with its parts (unit box), half extents (x, y) and centre (x, y), both shares of the picture."""

    item: SceneObject
    parts: list[Part]
    half: np.ndarray
    centre: np.ndarray


def render(scene: Scene, rng: np.random.Generator, image_size: int, roam: float = 1.0) -> np.ndarray:
    """Draw `scene` as uint8 RGB [image_size, image_size, 3].

    `roam` is how far objects may lie from an even layout: 1 is anywhere within their relation, 0 the layout itself.
    What the scene leaves open (place, size within its name, shade, texture, pattern, details, and every attribute
    that is None) is drawn from `rng`: the same generator state gives the same picture. Raises ValueError where the
    objects do not fit beside each other.
    """
    canvas = _background(scene, rng, image_size)
    placed = _place(scene, rng, roam)
    shadow = _sample_shadow(rng)
    for one in placed:
        _paint(canvas, one, rng, image_size, shadow)
    return np.clip(canvas + 0.5, 0, 255).astype(np.uint8)


def _place(scene: Scene, rng: np.random.Generator, roam: float) -> list[_Placed]:
    """Decide every object's variation, extent and centre."""
    num_objects = len(scene.objects)
    relations = scene.relations
    for _ in range(60):
        if not scene.relations:
            relations = (str(rng.choice(RELATIONS)),) * (num_objects - 1)
        parts = [sample_parts(item.shape, rng) for item in scene.objects]
        pairs = zip(scene.objects, parts, strict=True)
        half = np.stack([_half_extent(item, one, rng, num_objects) for item, one in pairs])
        centres = _candidates(half, relations, rng, roam)
        fits = _holds(centres, half, relations)
        if fits.any():
            chosen = centres[int(fits.argmax())]
            return [_Placed(*one) for one in zip(scene.objects, parts, half, chosen, strict=True)]
    sizes = ", ".join(f"{item.size or 'any'} {item.shape}" for item in scene.objects)
    raise ValueError(f"objects {sizes} with relations {relations} do not fit one picture")


def _half_extent(item: SceneObject, parts: list[Part], rng: np.random.Generator, num_objects: int) -> np.ndarray:
    low, high = EXTENTS[item.size or str(rng.choice(("small", "large")))]
    if num_objects == 1 and low == EXTENTS["large"][0]:
        high = LONE_LARGE
    points = np.concatenate([part.points for part in parts])
    return rng.uniform(low, high) / 2 * (points.max(0) - points.min(0)) / 2


def _candidates(half: np.ndarray, relations: tuple[str, ...], rng: np.random.Generator, roam: float) -> np.ndarray:
    """Centres to choose from, [K, objects, 2]: uniform, but along a shared axis in the right order and apart.

    Objects in one row are drawn towards an even layout by 1 - roam; a mean of two layouts that hold holds, too.
    """
    count = 64 if len(set(relations)) < 2 else 1024
    low, high = MARGIN + half, 1 - MARGIN - half
    centres = low + rng.random((count, *half.shape)) * (high - low)
    if len(set(relations)) == 1:
        axis = 0 if relations[0] in ("left of", "right of") else 1
        order = np.arange(len(half)) if relations[0] in ("left of", "above") else np.arange(len(half))[::-1]
        widths = 2 * half[order, axis]
        free = 1 - 2 * MARGIN - widths.sum() - GAP * (len(half) - 1)
        centres += (1 - roam) * (0.5 - centres)
        shares = rng.dirichlet(np.ones(len(half) + 1), count)[:, :-1]
        shares += (1 - roam) * (1 / (len(half) + 1) - shares)
        spaces = shares * max(free, 0.0)
        starts = MARGIN + np.cumsum(spaces, 1) + np.concatenate([[0], np.cumsum(widths[:-1] + GAP)])
        centres[:, order, axis] = starts + widths / 2
    elif not relations:
        centres += (1 - roam) * (0.5 - centres)
    return centres


def _holds(centres: np.ndarray, half: np.ndarray, relations: tuple[str, ...]) -> np.ndarray:
    """Which candidates, [K], stay in the picture, apart from each other and clearly within their relations."""
    good = ((centres >= half + MARGIN - 1e-6) & (centres <= 1 - MARGIN - half + 1e-6)).all((1, 2))
    for i, relation in enumerate(relations):
        step = centres[:, i + 1] - centres[:, i]
        along, across = (step[:, 0], step[:, 1]) if relation in ("left of", "right of") else (step[:, 1], step[:, 0])
        sign = 1 if relation in ("left of", "above") else -1
        good &= (sign * along > 0) & (np.abs(across) <= SLANT * np.abs(along))
    for i in range(len(half)):
        for j in range(i):
            apart = np.abs(centres[:, i] - centres[:, j]) - half[i] - half[j]
            good &= apart.max(1) >= GAP - 1e-6
    return good


def _grid(height: int, width: int, x0: int, y0: int, image_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Pixel centres as shares of the picture: x [1, width], y [height, 1]."""
    x = (np.arange(x0, x0 + width, dtype=np.float32) + 0.5) / image_size
    y = (np.arange(y0, y0 + height, dtype=np.float32) + 0.5) / image_size
    return x[None, :], y[:, None]


def _background(scene: Scene, rng: np.random.Generator, image_size: int) -> np.ndarray:
    """The ground as float32 [H, W, 3]."""
    ramp = sample_ramp(scene.background_colour, rng)
    kind = scene.background_kind or str(rng.choice(BACKGROUND_KINDS))
    x, y = _grid(image_size, image_size, 0, 0, image_size)
    angle, sign = rng.uniform(0, 2 * np.pi), rng.choice((-1.0, 1.0))
    along = (x - 0.5) * np.float32(np.cos(angle)) + (y - 0.5) * np.float32(np.sin(angle))
    across = (y - 0.5) * np.float32(np.cos(angle)) - (x - 0.5) * np.float32(np.sin(angle))
    if kind == "plain":
        shade = np.full((image_size, image_size), rng.uniform(0.15, 0.85), np.float32)
    elif kind == "gradient":
        if rng.random() < 0.35:
            far = np.hypot(x - rng.uniform(0.2, 0.8), y - rng.uniform(0.2, 0.8)) * 1.6 - 0.6
            shade = 0.5 + sign * 0.5 * np.clip(far, -1, 1)
        else:
            shade = 0.5 + 0.5 * np.clip(along * rng.uniform(1.5, 2.0), -1, 1)
    else:
        shade = 0.5 + sign * rng.uniform(0.22, 0.42) * _pattern(kind, along, across, rng)
    return ramp.at(shade)


def _pattern(kind: str, along: np.ndarray, across: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A soft-edged pattern in -1..1 over coordinates measured along and across its direction."""
    phase, other_phase = rng.uniform(0, 2 * np.pi, 2)
    if kind == "striped":
        return np.tanh(2.2 * np.sin(2 * np.pi * rng.uniform(2.5, 5.5) * along + phase))
    scale = 2 * np.pi * rng.uniform(1.8, 3.2)
    if kind == "checked":
        return np.tanh(3.5 * np.sin(scale * along + phase) * np.sin(scale * across + other_phase))
    scale *= 1.5
    bumps = np.cos(scale * along + phase) * 0.5 + np.cos(scale * across + other_phase) * 0.5
    return np.tanh(6.0 * (bumps - rng.uniform(0.4, 0.6)))


@dataclass(frozen=True)
class _Shadow:
    strength: float
    offset: tuple[float, float]
    blur: float


def _sample_shadow(rng: np.random.Generator) -> _Shadow:
    """One light for the whole picture; a third of the pictures has none."""
    strength = rng.uniform(0.2, 0.45) if rng.random() < 0.67 else 0.0
    angle = rng.uniform(0.15, 0.85) * np.pi
    reach = rng.uniform(0.02, 0.045)
    return _Shadow(strength, (reach * float(np.cos(angle)), reach * float(np.sin(angle))), rng.uniform(0.008, 0.02))


def _paint(canvas: np.ndarray, one: _Placed, rng: np.random.Generator, image_size: int, shadow: _Shadow) -> None:
    """Draw an object on the canvas, in place."""
    reach = one.half.max() * image_size
    pad = 0.05 * image_size + 2
    centre = one.centre * image_size
    x0, y0 = (int(v) for v in np.floor(centre - one.half * image_size - pad))
    x1, y1 = (int(v) for v in np.ceil(centre + one.half * image_size + pad))
    width, height = x1 - x0, y1 - y0
    ramp = sample_ramp(one.item.colour, rng)
    scaled = [(part.role, ((part.points * reach + centre - (x0, y0)) * OVERSAMPLING)) for part in one.parts]
    masks = [_mask([points], width, height) for _, points in scaled]
    silhouette = _silhouette(scaled, masks)
    window = np.zeros((height, width, 3), np.float32)
    left, top, right, bottom = max(x0, 0), max(y0, 0), min(x1, image_size), min(y1, image_size)
    inner = np.s_[top - y0 : bottom - y0, left - x0 : right - x0]
    ground = canvas[top:bottom, left:right].copy()
    window[inner] = ground
    if shadow.strength:
        _cast(window, silhouette, shadow, image_size)
        ground = window[inner].copy()
    window = _edge(window, one, scaled, ramp, rng, image_size)
    if one.item.colour == "black":
        scaled = [("pale" if role == "face" else role, points) for role, points in scaled]
    body = _texture(one, ramp, rng, *_grid(height, width, x0, y0, image_size))
    backdrop = np.zeros_like(window)
    backdrop[inner] = ground
    for (role, _), mask in zip(scaled, masks, strict=True):
        window += mask[..., None] * (_colour(role, body, ramp, backdrop) - window)
    canvas[top:bottom, left:right] = window[inner]


def _mask(polygons: list[np.ndarray], width: int, height: int) -> np.ndarray:
    """Coverage 0..1, float32 [height, width], of polygons given in oversampled pixels."""
    image = Image.new("L", (width * OVERSAMPLING, height * OVERSAMPLING))
    draw = ImageDraw.Draw(image)
    for points in polygons:
        draw.polygon(points.ravel().tolist(), fill=255)
    return np.asarray(image.reduce(OVERSAMPLING), np.float32) / 255


def _silhouette(scaled: list[tuple[str, np.ndarray]], masks: list[np.ndarray]) -> np.ndarray:
    shape = masks[0].copy()
    for (role, _), mask in zip(scaled[1:], masks[1:], strict=True):
        shape = shape * (1 - mask) if role == "hole" else np.maximum(shape, mask)
    return shape


def _cast(window: np.ndarray, silhouette: np.ndarray, shadow: _Shadow, image_size: int) -> None:
    """Darken the ground, in place, where the object's shadow falls."""
    dx, dy = (round(v * image_size) for v in shadow.offset)
    fallen = np.roll(silhouette, (dy, dx), (0, 1))
    image = Image.fromarray((fallen * 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(shadow.blur * image_size))
    window *= 1 - shadow.strength * np.asarray(image, np.float32)[..., None] / 255


def _edge(
    window: np.ndarray,
    one: _Placed,
    scaled: list[tuple[str, np.ndarray]],
    ramp: Ramp,
    rng: np.random.Generator,
    image_size: int,
) -> np.ndarray:
    """A rim outside the silhouette: bold where the scene says outlined, else now and then a thin one."""
    bold = one.item.finish == "outlined"
    if not bold and (one.item.finish is not None or rng.random() > 0.3):
        return window
    reach = (0.026 if bold else rng.uniform(0.01, 0.016)) * image_size
    height, width = window.shape[:2]
    image = Image.new("L", (width * OVERSAMPLING, height * OVERSAMPLING))
    draw = ImageDraw.Draw(image)
    for role, points in scaled:
        if role in ("body", "deep", "wood", "leaf", "wheel", "flame", "hole"):
            loop = points.ravel().tolist()
            draw.line(loop + loop[:4], fill=255, width=max(1, round(2 * reach * OVERSAMPLING)), joint="curve")
    mask = np.asarray(image.reduce(OVERSAMPLING), np.float32)[..., None] / 255
    colour = np.float32((250, 246, 232)) if one.item.colour == "black" else ramp.deep * 0.4
    return window + mask * (0.95 if bold else 0.75) * (colour - window)


def _texture(one: _Placed, ramp: Ramp, rng: np.random.Generator, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The colour of the object's body over its window, [height, width, 3]."""
    size = one.half.max()
    x, y = (x - one.centre[0]) / size, (y - one.centre[1]) / size
    angle, phase = rng.uniform(0, 2 * np.pi, 2)
    along = x * np.float32(np.cos(angle)) + y * np.float32(np.sin(angle))
    base, kind = rng.uniform(0.3, 0.75), rng.integers(5)
    if one.item.finish == "striped":
        shade = 0.5 + 0.5 * np.tanh(4 * np.sin(np.pi * rng.uniform(2.2, 3.2) * along + phase))
    elif kind == 0:
        shade = base + 0 * along
    elif kind == 1:
        shade = base + rng.uniform(0.2, 0.4) * along
    elif kind == 2:
        shade = base + 0.45 - rng.uniform(0.5, 0.7) * np.hypot(x + 0.45 * np.cos(angle), y + 0.45 * np.sin(angle))
    elif kind == 3:
        shade = base + rng.uniform(0.12, 0.25) * np.sin(np.pi * rng.uniform(1.5, 2.5) * along + phase)
    else:
        speckle = Image.fromarray(rng.random((5, 5), np.float32)).resize(along.shape[::-1], Image.BICUBIC)
        shade = base + rng.uniform(0.4, 0.6) * (np.asarray(speckle) - 0.5)
    return ramp.at(np.clip(shade, 0, 1))


def _colour(role: str, body: np.ndarray, ramp: Ramp, backdrop: np.ndarray) -> np.ndarray:
    if role == "body":
        return body
    if role == "deep":
        return body * 0.35 + ramp.deep * 0.65
    if role == "light":
        return body * 0.4 + ramp.light * 0.6
    if role == "hole":
        return backdrop
    return np.float32(_DETAILS[role])
