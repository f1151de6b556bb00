"""The little world of hidream-nano and its caption grammar: what a picture may hold, and how it is said.

A scene is one to three coloured objects on a coloured background. What a caption leaves out is None in the
parsed scene: it is open. Nothing is drawn here.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

COLOURS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink", "white", "black")
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "heart", "diamond")
PICTOGRAMS = ("house", "tree", "sun", "fish", "flower", "car", "rocket", "cat")
SIZES = ("small", "medium", "large")
EXTENTS = {"small": (0.25, 0.29), "medium": (0.31, 0.35), "large": (0.4, 0.47)}
"""The longer side of an object's bounding box as a share of the picture's side; the ranges never meet."""
FINISHES = ("outlined", "striped")
BACKGROUND_KINDS = ("plain", "gradient", "striped", "dotted", "checked")
RELATIONS = ("above", "below", "left of", "right of")
OPPOSITE = {"above": "below", "below": "above", "left of": "right of", "right of": "left of"}

HELD_OUT_SHARE = 16
"""One in this many combinations of objects and background colour is kept out of training."""

MAX_ROW, MAX_CORNER = 0.8, 1.0
"""Three objects are sampled only if their least extents add up to no more than this, in one row or round a corner."""

_SYNONYMS = {
    "above": ("above", "over"),
    "below": ("below", "under"),
    "left of": ("left of", "to the left of"),
    "right of": ("right of", "to the right of"),
}
_COUNTS = ("one object", "two objects", "three objects")
_FILLERS = (
    "a",
    "an",
    "and",
    "background",
    "is",
    "object",
    "objects",
    "of",
    "on",
    "picture",
    "the",
    "there",
    "to",
    "with",
    ",",
    ".",
    ":",
)


@dataclass(frozen=True)
class Tier:
    """How much of the world one model is trained on.

    `image_size` is the side in pixels; `shapes`, `pictograms`, `sizes`, `background_kinds` and `finishes` are the
    names in use; `object_shares[n - 1]` is the share of scenes with n objects; `roam` is how far objects may lie from
    an even layout, 0 to 1, see `render`.
    """

    name: str
    image_size: int
    shapes: tuple[str, ...]
    pictograms: tuple[str, ...]
    sizes: tuple[str, ...]
    background_kinds: tuple[str, ...]
    finishes: tuple[str, ...]
    object_shares: tuple[float, ...]
    roam: float = 1.0

    @property
    def max_objects(self) -> int:
        """The largest number of objects in a scene."""
        return len(self.object_shares)


CPU_TIER = Tier("cpu", 64, SHAPES[:6], PICTOGRAMS[:4], ("small", "large"), BACKGROUND_KINDS, (), (0.4, 0.6), 0.3)
GPU_TIER = Tier("gpu", 128, SHAPES, PICTOGRAMS, SIZES, BACKGROUND_KINDS, FINISHES, (0.3, 0.4, 0.3))
TIERS = {tier.name: tier for tier in (CPU_TIER, GPU_TIER)}


def _require(name: str, value: str | None, allowed: tuple[str, ...], optional: bool = False) -> None:
    if not (value in allowed or (optional and value is None)):
        raise ValueError(f"{name} is {value!r}; allowed are {', '.join(allowed)}")


@dataclass(frozen=True)
class SceneObject:
    """One object: a name from SHAPES or PICTOGRAMS, its colour, and its size and finish, None where these are open."""

    shape: str
    colour: str
    size: str | None = None
    finish: str | None = None

    def __post_init__(self) -> None:
        _require("shape", self.shape, SHAPES + PICTOGRAMS)
        _require("colour", self.colour, COLOURS)
        _require("size", self.size, SIZES, optional=True)
        _require("finish", self.finish, FINISHES, optional=True)


@dataclass(frozen=True)
class Scene:
    """Objects on a background.

    `relations[i]` says where `objects[i]` is, seen from `objects[i + 1]`; the tuple is empty where positions are open.
    `background_kind` is None where it is open. Raises ValueError for a scene that cannot be drawn.
    """

    objects: tuple[SceneObject, ...]
    relations: tuple[str, ...]
    background_colour: str
    background_kind: str | None = None

    def __post_init__(self) -> None:
        _require("background colour", self.background_colour, COLOURS)
        _require("background kind", self.background_kind, BACKGROUND_KINDS, optional=True)
        for relation in self.relations:
            _require("relation", relation, RELATIONS)
        if not 1 <= len(self.objects) <= len(_COUNTS):
            raise ValueError(f"a scene has one to {len(_COUNTS)} objects, not {len(self.objects)}")
        if self.relations and len(self.relations) != len(self.objects) - 1:
            raise ValueError(
                f"{len(self.objects)} objects need {len(self.objects) - 1} relations, not {len(self.relations)}"
            )
        if any(a == OPPOSITE[b] for a, b in pairwise(self.relations)):
            raise ValueError(f"neighbouring relations {self.relations} are opposite; that layout is not drawn")
        nouns = [(item.shape, item.colour) for item in self.objects]
        if len(set(nouns)) != len(nouns):
            raise ValueError("the objects of a scene differ in shape or colour; two are the same")
        for shape, colour in nouns:
            if colour == self.background_colour:
                raise ValueError(f"the {colour} {shape} would not be seen on a {colour} background")


def mirrored(scene: Scene) -> Scene:
    """The same scene told from its other end: objects reversed, relations reversed and turned into their opposites."""
    relations = tuple(OPPOSITE[relation] for relation in reversed(scene.relations))
    return replace(scene, objects=tuple(reversed(scene.objects)), relations=relations)


def agrees(stated: Scene, scene: Scene) -> bool:
    """Whether `scene` is all that `stated` says: equal up to what that leaves open (None) and the order of telling."""
    if stated.background_colour != scene.background_colour or stated.background_kind not in (
        None,
        scene.background_kind,
    ):
        return False
    if len(stated.objects) != len(scene.objects):
        return False
    if not stated.relations:
        nouns = {(item.shape, item.colour): item for item in scene.objects}
        pairs = [(item, nouns.get((item.shape, item.colour))) for item in stated.objects]
        return all(full is not None and _object_agrees(item, full) for item, full in pairs)
    return any(
        stated.relations == told.relations and all(map(_object_agrees, stated.objects, told.objects))
        for told in (scene, mirrored(scene))
    )


def _object_agrees(stated: SceneObject, full: SceneObject) -> bool:
    same_noun = (stated.shape, stated.colour) == (full.shape, full.colour)
    return same_noun and stated.size in (None, full.size) and stated.finish in (None, full.finish)


def is_held_out(scene: Scene) -> bool:
    """Whether these coloured objects on this background colour are never trained on: a stable hash, about 1 in 16.

    Only what every caption states enters the hash, so no phrasing of a held-out scene is ever seen in training.
    """
    key = "|".join(sorted(f"{item.colour} {item.shape}" for item in scene.objects)) + "|" + scene.background_colour
    return hashlib.blake2b(key.encode(), digest_size=4).digest()[0] % HELD_OUT_SHARE == 0


def sample_scene(rng: np.random.Generator, tier: Tier, *, held_out: bool = False) -> Scene:
    """Draw a scene of `tier` with every attribute decided; `held_out` picks the side of the split it comes from."""
    while True:
        scene = _sample_any(rng, tier)
        if scene is not None and is_held_out(scene) == held_out:
            return scene


def _pick(rng: np.random.Generator, values: tuple[str, ...]) -> str:
    return values[int(rng.integers(len(values)))]


def _sample_any(rng: np.random.Generator, tier: Tier) -> Scene | None:
    """A scene, or None where the draw cannot be drawn (equal objects, or three that do not fit)."""
    num_objects = 1 + int(rng.choice(tier.max_objects, p=tier.object_shares))
    background = _pick(rng, COLOURS)
    others = tuple(colour for colour in COLOURS if colour != background)
    objects = []
    for _ in range(num_objects):
        finish = _pick(rng, tier.finishes) if tier.finishes and rng.random() < 0.4 else None
        objects.append(
            SceneObject(_pick(rng, tier.shapes + tier.pictograms), _pick(rng, others), _pick(rng, tier.sizes), finish)
        )
    relations = tuple(_pick(rng, RELATIONS) for _ in range(num_objects - 1))
    limit = MAX_ROW if len(set(relations)) == 1 else MAX_CORNER
    crowded = num_objects == 3 and sum(EXTENTS[item.size][0] for item in objects) > limit
    opposite = any(a == OPPOSITE[b] for a, b in pairwise(relations))
    if crowded or opposite or len({(item.shape, item.colour) for item in objects}) != num_objects:
        return None
    # patterned backgrounds are three of the five kinds, yet three in four pictures are plain or gradient
    shares = np.array([4.5 if kind in ("plain", "gradient") else 1.0 for kind in tier.background_kinds])
    kind = tier.background_kinds[int(rng.choice(len(shares), p=shares / shares.sum()))]
    return Scene(tuple(objects), relations, background, kind)


def caption(scene: Scene, rng: np.random.Generator | None = None) -> str:
    """Say a scene in words: the canonical form, or with `rng` one of many phrasings, which may leave things open."""
    if rng is None:
        return f"{_chain(scene)} on {_background(scene)}"
    scene = _leave_out(scene, rng)
    if rng.random() < 0.5:
        scene = mirrored(scene)
    text = _phrase(scene, rng)
    if rng.random() < 0.3:
        text += "."
    dice = rng.random()
    return text.upper() if dice < 0.1 else text[0].upper() + text[1:] if dice < 0.4 else text


def _leave_out(scene: Scene, rng: np.random.Generator) -> Scene:
    objects = tuple(
        replace(
            item,
            size=None if rng.random() < 0.4 else item.size,
            finish=None if rng.random() < 0.25 else item.finish,
        )
        for item in scene.objects
    )
    relations = () if rng.random() < 0.12 else scene.relations
    return replace(
        scene,
        objects=objects,
        relations=relations,
        background_kind=None if rng.random() < 0.4 else scene.background_kind,
    )


def _with_article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _noun(item: SceneObject, article: bool = True) -> str:
    words = " ".join(word for word in (item.size, item.finish, item.colour, item.shape) if word)
    return _with_article(words) if article else words


def _chain(scene: Scene, rng: np.random.Generator | None = None, article: bool = True) -> str:
    nouns = [_noun(item, article) for item in scene.objects]
    if not scene.relations:
        return " and ".join(filter(None, [", ".join(nouns[:-1]), nouns[-1]]))
    text = nouns[0]
    for relation, noun in zip(scene.relations, nouns[1:], strict=True):
        # the long forms would take a caption of three objects past thirty words
        words = _pick(rng, _SYNONYMS[relation]) if rng is not None and len(nouns) < 3 else relation
        text += f" {words} {noun}"
    return text


def _background(scene: Scene, rng: np.random.Generator | None = None, article: bool = True) -> str:
    colour, kind = scene.background_colour, scene.background_kind
    swap = rng is not None and rng.random() < 0.3
    if kind is None:
        words = f"{colour} background"
    elif kind == "gradient":
        words = f"{colour} gradient background" if swap else f"{colour} gradient"
    else:
        words = f"{colour} {kind} background" if swap else f"{kind} {colour} background"
    return _with_article(words) if article else words


def _phrase(scene: Scene, rng: np.random.Generator) -> str:
    chain, background = _chain(scene, rng), _background(scene, rng)
    on = ", on" if rng.random() < 0.15 else " on"
    phrasings = [f"{chain}{on} {background}"] * 4
    phrasings += [
        f"there is {chain}{on} {background}",
        f"{_pick(rng, ('picture of', 'a picture of'))} {chain}{on} {background}",
        f"{background} with {chain}",
        f"{_background(scene, rng, article=False)} with {chain}",
        f"on {background}{_pick(rng, (',', ' there is'))} {chain}",
        f"{_COUNTS[len(scene.objects) - 1]}: {chain}{on} {background}",
        f"{_chain(scene, rng, article=False)}, {_background(scene, rng, article=False)}",
    ]
    if len(scene.relations) == 1:
        first, second = (_noun(item) for item in scene.objects)
        relation = _pick(rng, _SYNONYMS[scene.relations[0]])
        phrasings += [f"{first} is {relation} {second}{on} {background}"]
        phrasings += [f"{relation} {second} {_pick(rng, ('is', 'there is'))} {first}{on} {background}"]
    return _pick(rng, tuple(phrasings))


def _one_of(words: tuple[str, ...]) -> str:
    return "(" + "|".join(words) + ")"


_PATTERNS = tuple(kind for kind in BACKGROUND_KINDS if kind != "gradient")
_NOUN = re.compile(
    f"(?:an? )?(?:{_one_of(SIZES)} )?(?:{_one_of(FINISHES)} )?{_one_of(COLOURS)} {_one_of(SHAPES + PICTOGRAMS)}(?: |$)"
)
_RELATION = re.compile("(?:is )?(?:to the )?(above|over|below|under|left of|right of) ")
_PATTERN = _one_of(_PATTERNS)
_BACKGROUND = f"(?:an? )?(?:{_PATTERN} )?{_one_of(COLOURS)} (?:(?:{_PATTERN} )?background|(gradient)(?: background)?)"
_ENDING = re.compile(f"^(.*?)(?: , on | on | , ){_BACKGROUND}$")
_OPENING = re.compile(f"^(?:on )?{_BACKGROUND}(?: with| , with| ,| there is) (.*)$")
_LEAD = re.compile("^(?:(?:a )?picture of |there is |(?:one object|two objects|three objects) : )")


def parse_caption(text: str) -> Scene:
    """The scene a caption states, None or () where it leaves something open.

    Raises ValueError with the reason for a caption outside the grammar.
    """
    words = re.findall(r"[^\W_]+|[^\w\s]", text.lower())
    unknown = sorted(set(words) - set(vocabulary()))
    if unknown:
        raise ValueError(f"caption {text!r} has words outside the grammar: {', '.join(unknown)}")
    line = " ".join(words).removesuffix(" .")
    if ending := _ENDING.match(line):
        body, *background = ending.groups()
    elif opening := _OPENING.match(line):
        *background, body = opening.groups()
    else:
        raise ValueError(f"caption {text!r} names no background; end it like '... on a blue background'")
    kind, colour, late_kind, gradient = background
    kinds = [name for name in (kind, late_kind, gradient) if name]
    if len(kinds) > 1:
        raise ValueError(f"caption {text!r} names two kinds of background: {' and '.join(kinds)}")
    objects, relations = _parse_chain(_LEAD.sub("", body), text)
    return Scene(objects, relations, colour, kinds[0] if kinds else None)


def _parse_chain(body: str, text: str) -> tuple[tuple[SceneObject, ...], tuple[str, ...]]:
    """Objects and relations of `NOUN (RELATION NOUN)*`, `NOUN, NOUN and NOUN` or `RELATION NOUN [there] is NOUN`."""
    names = {word: name for name, forms in _SYNONYMS.items() for word in forms}
    objects: list[SceneObject] = []
    relations: list[str] = []
    fronted = _RELATION.match(body)
    rest = body[fronted.end() :] if fronted else body
    while True:
        noun = _NOUN.match(rest)
        if noun is None:
            raise ValueError(f"caption {text!r}: expected an object like 'a small red circle' at {rest!r}")
        size, finish, colour, shape = noun.groups()
        objects.append(SceneObject(shape, colour, size, finish))
        rest = rest[noun.end() :]
        if not rest:
            break
        joint = re.match("(?:there )?is ", rest) if fronted and len(objects) == 1 else _RELATION.match(rest)
        if joint and not fronted:
            relations.append(names[joint.group(1)])
        joint = joint or re.match("(?:, and|and|,) ", rest)
        if joint is None:
            raise ValueError(f"caption {text!r}: expected a relation (above, below, left of, right of) at {rest!r}")
        rest = rest[joint.end() :]
    if fronted:
        if len(objects) != 2:
            raise ValueError(
                f"caption {text!r}: a caption that begins with a relation has two objects, not {len(objects)}"
            )
        return tuple(reversed(objects)), (names[fronted.group(1)],)
    if relations and len(relations) != len(objects) - 1:
        raise ValueError(f"caption {text!r}: state a relation between all neighbouring objects or between none")
    return tuple(objects), tuple(relations)


def vocabulary() -> list[str]:
    """Every lower-case word and punctuation mark of the grammar, both tiers, sorted."""
    phrases = COLOURS + SHAPES + PICTOGRAMS + SIZES + FINISHES + BACKGROUND_KINDS + _FILLERS + _COUNTS
    phrases += tuple(form for forms in _SYNONYMS.values() for form in forms)
    return sorted({word for phrase in phrases for word in phrase.split()})
