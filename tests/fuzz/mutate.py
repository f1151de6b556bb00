"""Changes files as accidents and strangers do: bits and bytes, and the values of JSON."""

import copy
import json
from random import Random
from typing import Any

DEEP = "@deep@"  # written as a list within 100 000 lists
HOSTILE: tuple[Any, ...] = (
    None,
    True,
    0,
    -1,
    1.5,
    2**31,
    2**63,
    2**64,
    10**40,
    float("nan"),
    float("inf"),
    1e300,
    "",
    " ",
    "\0",
    "\x1b[2J\n",
    "\ud800",
    "x" * 100_000,
    "9" * 5000,
    "nan",
    "../../../etc/passwd",
    "/dev/zero",
    "https://example.org/a",
    "__class__",
    [],
    {},
    [[]],
    [None],
    [0] * 100_000,
    {"": {}},
    {"path": "/dev/zero"},
    DEEP,
)
LENGTHS = (0, 1, 7, 8, 2**16, 2**31 - 1, 2**31, 2**32, 2**63 - 1, 2**63, 2**64 - 1)


def dumped(value: Any) -> bytes:
    """JSON, also of what `mutate_json` puts in."""
    text = json.dumps(value)
    return text.replace(json.dumps(DEEP), "[" * 100_000 + "]" * 100_000).encode()


def mutate_json(value: Any, rng: Random) -> Any:
    """A copy with one to three places changed: replaced, removed, renamed, doubled, or exchanged."""
    changed = copy.deepcopy(value)
    for _ in range(rng.randint(1, 3)):
        places = list(_places(changed))
        if not places:
            return rng.choice(HOSTILE)
        parent, key = rng.choice(places)
        what = rng.random()
        if what < 0.6:
            parent[key] = copy.deepcopy(rng.choice(HOSTILE))
        elif what < 0.75:
            del parent[key]
        elif what < 0.85 and isinstance(parent, dict):
            parent[rng.choice(("", "x" * 1000, "__proto__", f"{key}2", str(key).upper()))] = parent.pop(key)
        elif what < 0.95:
            other, other_key = rng.choice(places)
            if other is not parent or isinstance(parent, dict):
                parent[key] = copy.deepcopy(other.get(other_key) if isinstance(other, dict) else other[:1])
        elif isinstance(parent, list):
            parent.extend(copy.deepcopy(parent[:8]) * 2)
        else:
            parent[key] = [copy.deepcopy(parent[key])]
    return changed


def mutate_bytes(data: bytes, rng: Random) -> bytes:
    """A copy with one to four changes."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at, what = rng.randrange(len(changed) + 1), rng.randrange(8)
        near = min(at, rng.randrange(1, 200))  # headers lie in front
        if what == 0 and at < len(changed):
            changed[at] ^= 1 << rng.randrange(8)
        elif what == 1 and near < len(changed):
            changed[near] = rng.randrange(256)
        elif what == 2:
            del changed[at:]
        elif what == 3:
            del changed[near : near + rng.randrange(1, 64)]
        elif what == 4:
            changed[at:at] = rng.randbytes(rng.randrange(1, 64))
        elif what == 5:
            changed[near : near + 8] = rng.choice(LENGTHS).to_bytes(8, "little")
        elif what == 6:
            changed[near:near] = changed[at : at + 256]
        else:
            changed[near:near] = rng.choice((b"\0" * 64, b"\xff" * 64, b"[" * 5000, b"\r\n\x1a", b'"' * 9, b"\xf0\x9f"))
    return bytes(changed)


def _places(value: Any) -> Any:
    """Every (container, key) in a JSON value."""
    items = (
        list(value.items()) if isinstance(value, dict) else list(enumerate(value)) if isinstance(value, list) else []
    )
    for key, inner in items:
        yield value, key
        yield from _places(inner)
