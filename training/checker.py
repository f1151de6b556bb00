"""Reads a picture of the little world and says which claims of its prompt hold, by arithmetic a person can follow.

1. Each pixel gets the colour name whose shades (the renderer's own ramps) lie nearest in CIELAB.
2. The background is the name most border pixels carry. Its pixels lie on one line in RGB, since a ramp is a line; that
   line and its shadows towards black are all the background can show, and what departs from it is an object.
3. Connected pixels are one object; small pieces that lie next to a larger one belong to it.
4. Its shape is that of the nearest prototype: a mask of 24 x 24 pixels and how far the inside departs from the main
   colour, made by reading the renderer's pictures the same way. Ways in which drawings of one shape differ among
   themselves count less. What resembles no prototype has no shape.
5. Its colour is the name most of its pixels carry, weighted by how often drawings of that shape carry theirs there.

Finishes and kinds of background are not read: no claim is made about them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise, permutations

import numpy as np
from PIL import Image
from scipy import ndimage
from scipy.spatial import cKDTree
from scipy.spatial.distance import cdist
from skimage.color import rgb2lab

from training.palette import sample_ramp
from training.render import render
from training.scenes import BACKGROUND_KINDS, COLOURS, EXTENTS, Scene, SceneObject, Tier, parse_caption

CONTRAST = 14.0
"""CIELAB departure from all the background can show at which a pixel belongs to an object."""
NAMED = 12.0
"""CIELAB distance to the nearest shade up to which a pixel carries a colour name."""
LEAST_AREA = 0.006
"""Share of the picture below which connected pixels are no object; the smallest object drawn covers 0.012."""
PIECE_AREA = 0.0115
"""Share of the picture up to which connected pixels near a larger object are a piece of it (a trunk, a tail)."""
SPECK_AREA = 0.001
"""Share of the picture below which connected pixels are noise."""
MIXED = 30.0
"""RGB difference, of 255, up to which a pixel is a mixture of two colours."""
WIDEST_RIM = 0.03
"""Depth, share of the picture's side, to which a rim of another colour round an object is looked for."""
BLUR_STEP = 0.012
"""Prototypes are in turn sharp, and blurred by once and twice this standard deviation, share of the picture's side."""
EVENNESS = 10.0
"""Added to the variance, in mean variances, by whose inverse a way in which masks of one shape differ counts."""
RESEMBLANCE = 75.0
"""Squared distance to the nearest prototype, each value in 0..1, beyond which an object has no shape."""
MOST_OBJECTS = 5
"""No more objects than this, the largest ones, are matched with a prompt's."""

_CELL = 24
_INSIDE_WEIGHT = 0.7
_LEVELS = 32
_NAMELESS = len(COLOURS)


@dataclass(frozen=True)
class FoundObject:
    """One object as read; a name is None where it is like nothing known; `centre` (x, y) and `area` are shares."""

    shape: str | None
    colour: str | None
    size: str
    centre: tuple[float, float]
    area: float


@dataclass(frozen=True)
class Reading:
    """What a picture shows, the largest object first."""

    background_colour: str
    objects: tuple[FoundObject, ...]


@dataclass(frozen=True)
class Claims:
    """Which claims of a prompt hold; None where the prompt does not make that claim.

    `colour`, `shape`, `size` and `position` hold if they do for every object or relation that the prompt states.
    """

    background: bool
    count: bool
    colour: bool
    shape: bool
    size: bool | None
    position: bool | None

    @property
    def all(self) -> bool:
        """Whether every claim that is made holds."""
        return all(getattr(self, claim.name) is not False for claim in fields(self))


@dataclass(frozen=True)
class Rate:
    """How often a claim held among the pictures whose prompts make it."""

    held: int
    stated: int

    @property
    def share(self) -> float:
        """In 0..1; NaN where no prompt made the claim."""
        return self.held / self.stated if self.stated else float("nan")

    def __str__(self) -> str:
        return f"{100 * self.share:.1f} % ({self.held}/{self.stated})"


@dataclass(frozen=True)
class Accuracy:
    """The rate of each claim over many pictures, and of all claims of a picture together."""

    background: Rate
    count: Rate
    colour: Rate
    shape: Rate
    size: Rate
    position: Rate
    all: Rate

    def __str__(self) -> str:
        return ", ".join(f"{claim.name} {getattr(self, claim.name)}" for claim in fields(self))


def accuracy(results: Iterable[Claims]) -> Accuracy:
    """Count, claim by claim, how often it held."""
    results = list(results)
    rates = {}
    for claim in fields(Accuracy):
        verdicts = [held for held in (getattr(result, claim.name) for result in results) if held is not None]
        rates[claim.name] = Rate(sum(verdicts), len(verdicts))
    return Accuracy(**rates)


def chance_level(readings: Sequence[Reading], prompts: Sequence[str], num_shifts: int = 8) -> Accuracy:
    """What the claims score by accident: every picture judged by others' prompts, shifted by 1 to `num_shifts` places.

    Raises ValueError where there are no more pictures than shifts, since a picture would meet its own prompt.
    """
    if not 0 < num_shifts < len(readings):
        raise ValueError(
            f"num_shifts is {num_shifts}; allowed are 1 to {len(readings) - 1}, one less than the pictures"
        )
    stated = [parse_caption(prompt) for prompt in prompts]
    shifted = (stated[shift:] + stated[:shift] for shift in range(1, num_shifts + 1))
    return accuracy(judge(one, scene) for scenes in shifted for one, scene in zip(readings, scenes, strict=True))


def judge(reading: Reading, prompt: str | Scene) -> Claims:
    """Compare what was read with what `prompt` states.

    Found objects are assigned to the prompt's so that most claims hold. An object of the prompt that has no partner
    fails its claims; an object found beyond those asked for fails `count` alone.
    """
    stated = parse_caption(prompt) if isinstance(prompt, str) else prompt
    number = len(stated.objects)
    candidates = (*reading.objects[:MOST_OBJECTS], *(None,) * (number - len(reading.objects)))
    verdicts = (_verdicts(stated, chosen) for chosen in permutations(candidates, number))
    best = max(verdicts, key=lambda kinds: sum(sum(verdict) for verdict in kinds))
    colour, shape, size, position = (all(verdict) if verdict else None for verdict in best)
    return Claims(
        background=reading.background_colour == stated.background_colour,
        count=len(reading.objects) == number,
        colour=bool(colour),
        shape=bool(shape),
        size=size,
        position=position,
    )


def _verdicts(stated: Scene, found: Sequence[FoundObject | None]) -> tuple[list[bool], ...]:
    """One verdict for each stated colour, shape, size and relation under this assignment."""
    pairs = list(zip(stated.objects, found, strict=True))
    colour = [one is not None and one.colour == item.colour for item, one in pairs]
    shape = [one is not None and one.shape == item.shape for item, one in pairs]
    size = [one is not None and one.size == item.size for item, one in pairs if item.size is not None]
    position = [_related(found[i], found[i + 1], relation) for i, relation in enumerate(stated.relations)]
    return colour, shape, size, position


def _related(first: FoundObject | None, second: FoundObject | None, relation: str) -> bool:
    """Whether `first` stands so to `second`, by the longer part of the way between their centres."""
    if first is None or second is None:
        return False
    dx, dy = second.centre[0] - first.centre[0], second.centre[1] - first.centre[1]
    if abs(dx) > abs(dy):
        return relation == ("left of" if dx > 0 else "right of")
    return relation == ("above" if dy > 0 else "below")


@dataclass(frozen=True)
class _Cutout:
    """An object cut from a picture: soft mask and inside, flat [2 * 24 * 24]; colour name indices [24, 24]; shares."""

    features: np.ndarray
    names: np.ndarray
    extent: float
    centre: tuple[float, float]
    area: float


class Checker:
    """Reads the pictures of one tier.

    Building it draws and reads `num_prototypes` pictures of every shape, some seconds; then nothing in it changes.
    """

    def __init__(self, tier: Tier, num_prototypes: int = 50) -> None:
        self.tier = tier
        self._nearest_name, self._name_distance = _name_tables()
        self._shapes = tier.shapes + tier.pictograms
        self._build_prototypes(num_prototypes)

    def check(self, picture: np.ndarray, prompt: str) -> Claims:
        """Which claims of `prompt` hold in `picture`; see `read` and `judge`."""
        return judge(self.read(picture), prompt)

    def read(self, picture: np.ndarray) -> Reading:
        """What `picture` shows, [H, W, 3] with H = W, uint8 or float in 0..1; raises ValueError for anything else."""
        background, cutouts = self._cut(_as_rgb(picture))
        return Reading(COLOURS[background], tuple(self._recognise(one) for one in cutouts))

    def _recognise(self, one: _Cutout) -> FoundObject:
        features = one.features[None]
        label = self._labels[cdist(features @ self._projection, self._projected, "sqeuclidean").argmin()]
        known = cdist(features, self._prototypes, "sqeuclidean").min() <= RESEMBLANCE
        weights = self._carried[label] if known else np.ones_like(self._carried[label])
        votes = np.bincount(one.names.ravel(), weights.ravel(), minlength=_NAMELESS + 1)[:_NAMELESS]
        sizes = self.tier.sizes
        edges = [(EXTENTS[smaller][1] + EXTENTS[larger][0]) / 2 for smaller, larger in pairwise(sizes)]
        return FoundObject(
            shape=self._shapes[label] if known else None,
            colour=COLOURS[int(votes.argmax())] if votes.any() else None,
            size=sizes[int(np.searchsorted(edges, one.extent))],
            centre=one.centre,
            area=one.area,
        )

    def _build_prototypes(self, number: int) -> None:
        """Read lone objects; what tells drawings of one shape apart is to count less than what tells shapes apart."""
        rng = np.random.default_rng(0)
        features, labels, carried = [], [], []
        for label, shape in enumerate(self._shapes):
            own_colour = []
            for i in range(number):
                scene = _lone(shape, i, self.tier, rng)
                picture = render(scene, rng, self.tier.image_size, self.tier.roam).astype(np.float32)
                blur = (i % 3) * BLUR_STEP * len(picture)
                _, cutouts = self._cut(ndimage.gaussian_filter(picture, (blur, blur, 0)))
                if cutouts:
                    mirrored = cutouts[0].features.reshape(2, _CELL, _CELL)[:, :, ::-1].ravel()
                    features += [cutouts[0].features, mirrored]
                    labels += [label, label]
                    own_colour.append(cutouts[0].names == COLOURS.index(scene.objects[0].colour))
            carried.append(np.mean(own_colour, 0))
        points, self._labels, self._carried = np.array(features), np.array(labels), np.array(carried)
        means = np.array([points[self._labels == label].mean(0) for label in range(len(self._shapes))])
        _, spread, ways = np.linalg.svd(points - means[self._labels], full_matrices=False)
        variance = spread**2 / len(points)
        self._projection = ways.T / np.sqrt(variance + EVENNESS * variance.mean())
        # float64, as cdist would convert float32 anew for every object
        self._prototypes, self._projected = points.astype(np.float64), (points @ self._projection).astype(np.float64)

    def _cut(self, rgb: np.ndarray) -> tuple[int, list[_Cutout]]:
        """The background's name and the objects, largest first, of a picture in 0..255, float32 [H, W, 3]."""
        lab = rgb2lab(rgb / 255).astype(np.float32)
        level = (rgb * (_LEVELS / 256)).astype(np.int32)
        cell = (level[..., 0] * _LEVELS + level[..., 1]) * _LEVELS + level[..., 2]
        names, named = self._nearest_name[cell], self._name_distance[cell] < NAMED
        edge = max(1, round(0.025 * len(rgb)))
        inner = np.bincount(names[edge:-edge, edge:-edge].ravel(), minlength=_NAMELESS)
        background = int((np.bincount(names.ravel(), minlength=_NAMELESS) - inner).argmax())
        departure = _departure(rgb, lab, (names == background) & named)
        departure[named & (names != background)] *= 2  # another name is evidence of its own
        carried = np.where(named, names, _NAMELESS)
        objects = _components(departure > CONTRAST, named)
        return background, [_cut_out(one, departure, rgb, lab, carried) for one in objects]


def _as_rgb(picture: np.ndarray) -> np.ndarray:
    picture = np.asarray(picture)
    if picture.ndim != 3 or picture.shape[2] != 3 or picture.shape[0] != picture.shape[1]:
        raise ValueError(f"picture has shape {picture.shape}; allowed is [H, W, 3] with H = W")
    if picture.dtype == np.uint8:
        return picture.astype(np.float32)
    if not np.issubdtype(picture.dtype, np.floating):
        raise ValueError(f"picture has dtype {picture.dtype}; allowed are uint8 and floating point")
    if not (picture.min() >= 0 and picture.max() <= 1):
        raise ValueError(f"picture ranges from {picture.min()} to {picture.max()}; floats are 0..1")
    return picture.astype(np.float32) * 255


def _name_tables() -> tuple[np.ndarray, np.ndarray]:
    """Nearest colour name (index) and its CIELAB distance for each cell of a 32 x 32 x 32 RGB grid, each [32768]."""
    rng, shades = np.random.default_rng(0), np.linspace(0, 1, 9)
    axis = (np.arange(_LEVELS) + 0.5) / _LEVELS
    grid = rgb2lab(np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), -1).reshape(-1, 3))
    distance = []
    for name in COLOURS:
        drawn = np.concatenate([sample_ramp(name, rng).at(shades) for _ in range(60)])
        distance.append(cKDTree(rgb2lab(drawn / 255)).query(grid)[0])
    return np.argmin(distance, 0).astype(np.int8), np.min(distance, 0)


def _departure(rgb: np.ndarray, lab: np.ndarray, ground: np.ndarray) -> np.ndarray:
    """CIELAB distance of each pixel, [H, W], from the ramp of the `ground` pixels (a mask, [H, W]) and its shadows."""
    shades = rgb[ground] if ground.sum() > 9 else rgb[0]
    middle = shades.mean(0)
    direction = np.linalg.eigh(np.cov((shades - middle).T))[1][:, -1]
    ends = np.percentile((shades - middle) @ direction, (1, 99))
    ramp = middle + np.linspace(*ends, 8)[:, None] * direction
    shown = np.concatenate([ramp * light for light in np.linspace(1, 0.6, 7)])
    shown = rgb2lab(shown.clip(0, 255) / 255).astype(np.float32)
    pixels = lab.reshape(-1, 3)
    squared = ((shown**2).sum(1)[:, None] - 2 * shown @ pixels.T).min(0) + (pixels**2).sum(1)
    return np.sqrt(np.maximum(squared, 0)).reshape(ground.shape)


def _components(mask: np.ndarray, named: np.ndarray) -> list[np.ndarray]:
    """Masks of the objects, largest first: connected pixels, small pieces joined to the object they nearly touch.

    What carries no colour name (a brown trunk) is more likely a piece than an object, and is joined over a wider gap.
    """
    labels, _ = ndimage.label(mask, np.ones((3, 3)))
    share = np.bincount(labels.ravel()) / mask.size
    share[0] = 0
    objects: list[np.ndarray] = []
    for label in np.argsort(share)[::-1]:
        if share[label] < SPECK_AREA:
            break
        piece = labels == label
        nameless = share[label] < 2 * PIECE_AREA and named[piece].mean() < 0.35
        if share[label] < PIECE_AREA or nameless:
            near = ndimage.binary_dilation(piece, np.ones((3, 3)), round((0.06 if nameless else 0.03) * len(mask)))
            touching = [one for one in objects if (one & near).any()]
            if touching:
                touching[0] |= piece
                continue
        if share[label] >= LEAST_AREA:
            objects.append(piece)
    return objects


def _cut_out(one: np.ndarray, departure: np.ndarray, rgb: np.ndarray, lab: np.ndarray, carried: np.ndarray) -> _Cutout:
    """The object under the mask `one`; the planes are as long and wide as the picture."""
    rows, columns = ndimage.find_objects(one.astype(np.int8))[0]
    side, height = max(rows.stop - rows.start, columns.stop - columns.start), len(one)
    x, y = (columns.start + columns.stop) / 2, (rows.start + rows.stop) / 2
    box = (x - side / 2, y - side / 2, side)
    main = np.bincount(carried[one], minlength=_NAMELESS + 1)[:_NAMELESS].argmax()
    body = one & (carried == main)
    if not body.any():
        body = one
    mask = np.where(one, departure / (2 * CONTRAST), 0).clip(0, 1)
    inside = (np.abs(lab - np.median(lab[body], 0)) @ np.float32([1, 0.5, 0.5]) / 50).clip(0, 1) * one
    soft = [_resized(plane, box, 0, Image.Resampling.BILINEAR).ravel() for plane in (mask, inside * _INSIDE_WEIGHT)]
    names = _resized(np.where(one, carried, _NAMELESS), box, _NAMELESS, Image.Resampling.NEAREST)
    return _Cutout(
        features=np.concatenate(soft),
        names=names.astype(np.int64),
        extent=_extent(one, body, rgb) / height,
        centre=(x / height, y / height),
        area=float(one.mean()),
    )


def _extent(one: np.ndarray, body: np.ndarray, rgb: np.ndarray) -> float:
    """The longer side in pixels of an object's bounding box, without a rim of another colour round its body.

    A pixel that mixes body and ground belongs to whichever has the larger part in it, so blur moves no edge.
    """
    near, far = (ndimage.binary_dilation(one, np.ones((3, 3)), steps) for steps in (1, 3))
    ground = np.median(rgb[far & ~near], 0) if (far & ~near).any() else rgb[0, 0]
    way = np.median(rgb[body], 0) - ground
    part = (rgb - ground) @ way / max(way @ way, 1.0)
    mixed = np.abs(rgb - ground - part[..., None] * way).max(-1) < MIXED
    solid = one & ~(mixed & (part < 0.5))
    if not solid.any():
        solid = one
    longer = max(side.stop - side.start for side in ndimage.find_objects(solid.astype(np.int8))[0])
    return longer - 2 * _rim(solid, body | (mixed & (part >= 0.5)))


def _rim(one: np.ndarray, body: np.ndarray) -> float:
    """Width in pixels of a rim: the share of pixels not of the body, added up over depths until the body prevails."""
    depth = ndimage.distance_transform_cdt(np.pad(one, 1), "chessboard")[1:-1, 1:-1][one]
    other = 1 - np.bincount(depth, body[one])[1:] / np.bincount(depth)[1:]
    deepest = min(len(other), round(WIDEST_RIM * len(one)))
    inner = next((i for i in range(deepest) if other[i] < 0.5), deepest)
    return float(other[: inner + 1].sum())


def _resized(values: np.ndarray, box: tuple[float, float, int], fill: float, how: Image.Resampling) -> np.ndarray:
    """A square window (left, top, side in pixels) of a plane, resampled to [24, 24]; outside lies `fill`."""
    left, top, side = box
    padded = np.pad(values.astype(np.float32), side, constant_values=fill)
    window = (left + side, top + side, left + 2 * side, top + 2 * side)
    return np.asarray(Image.fromarray(padded).resize((_CELL, _CELL), how, box=window))


def _lone(shape: str, index: int, tier: Tier, rng: np.random.Generator) -> Scene:
    """One object for a shape's `index`-th prototype: sizes and backgrounds in turn, colours and finishes by chance."""
    colour, background = rng.choice(COLOURS, 2, replace=False)
    finish = str(rng.choice(tier.finishes)) if tier.finishes and rng.random() < 0.5 else None
    item = SceneObject(shape, str(colour), tier.sizes[index % len(tier.sizes)], finish)
    return Scene((item,), (), str(background), BACKGROUND_KINDS[index % len(BACKGROUND_KINDS)])
