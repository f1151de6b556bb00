"""API keys, and what each may ask for."""

import hashlib
import hmac
import threading
import time
from collections import deque
from dataclasses import dataclass, field, fields
from pathlib import Path

MAX_KEYS = 10_000
MINUTE = 60.0
MIN_LENGTH = 16  # characters of a key


class RateLimited(Exception):
    """A key asked for more than it may in a minute.

    Args:
        seconds: after which it may ask again.
    """

    def __init__(self, seconds: float):
        super().__init__(f"too many requests in a minute: try again in {seconds:.0f} s")
        self.seconds = seconds


@dataclass(frozen=True)
class KeyLimits:
    """What one key may ask for; None: whatever the server allows.

    Attributes:
        pixels: of one picture.
        steps: denoising steps of one picture.
        n: pictures of one request.
        per_minute: requests in any minute.
    """

    pixels: int | None = None
    steps: int | None = None
    n: int | None = None
    per_minute: int | None = None

    def check(self, width: int, height: int, steps: int, n: int) -> None:
        """Raise ValueError for a request that is beyond them."""
        for name, value, most in (
            ("size", width * height, self.pixels),
            ("steps", steps, self.steps),
            ("n", n, self.n),
        ):
            if most is not None and value > most:
                unit = " pixels" if name == "size" else ""
                raise ValueError(f"{name} may be at most {most}{unit} with this key, got {value}")


@dataclass(eq=False)
class Key:
    """A client.

    Attributes:
        name: its name, for logs and turns.
        limits: what it may ask for.
    """

    name: str
    limits: KeyLimits = field(default_factory=KeyLimits)
    _times: deque[float] = field(default_factory=deque)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def take_turn(self) -> None:
        """Count a request; raises RateLimited if there were too many in the last minute."""
        most, now = self.limits.per_minute, time.monotonic()
        if most is None:
            return
        with self._lock:
            while self._times and self._times[0] <= now - MINUTE:
                self._times.popleft()
            if len(self._times) >= most:
                raise RateLimited(max(1.0, self._times[0] + MINUTE - now))
            self._times.append(now)


class Keys:
    """The keys of a server.

    Args:
        path: file with a line `NAME KEY [pixels=N] [steps=N] [n=N] [per_minute=N]` for every client; lines that begin
            with # are comments. None: there are no keys, and everybody is a client.

    Raises:
        ValueError: naming the line, but not the key.
    """

    def __init__(self, path: Path | None = None):
        self._everybody = Key("everybody") if path is None else None
        self._by_digest: list[tuple[bytes, Key]] = []
        if path is None:
            return
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"api_key must be a text file, got {path}: {error}") from error
        for number, line in enumerate(lines, 1):
            if line.strip() and not line.startswith("#"):
                secret, key = _read(line, f"api_key {path}, line {number}")
                if key.name in {one.name for _, one in self._by_digest}:
                    raise ValueError(f"api_key {path}, line {number}: a second client of that name")
                self._by_digest.append((_digest(secret), key))
        if not 1 <= len(self._by_digest) <= MAX_KEYS:
            raise ValueError(f"api_key {path} must hold 1 to {MAX_KEYS} keys, got {len(self._by_digest)}")

    @property
    def are_needed(self) -> bool:
        """Whether a request must have a key."""
        return self._everybody is None

    def find(self, authorization: str | None) -> Key | None:
        """The client of an Authorization header `Bearer KEY`; None if there is none. It takes as long for any key."""
        if self._everybody is not None:
            return self._everybody
        kind, _, secret = (authorization or "").partition(" ")
        given, found = _digest(secret.strip()), None
        for digest, key in self._by_digest:
            if hmac.compare_digest(digest, given):
                found = key
        return found if kind.lower() == "bearer" else None


def _read(line: str, where: str) -> tuple[str, Key]:
    words = line.split()
    if len(words) < 2 or len(words[1]) < MIN_LENGTH:
        raise ValueError(f"{where} must be NAME KEY [limits], with a key of at least {MIN_LENGTH} characters")
    limits = {}
    for word in words[2:]:
        name, _, value = word.partition("=")
        if name not in {one.name for one in fields(KeyLimits)} or not (value.isascii() and value.isdigit()):
            known = ", ".join(f"{one.name}=N" for one in fields(KeyLimits))
            raise ValueError(f"{where}: a limit must be one of {known}")
        limits[name] = int(value)
    return words[1], Key(words[0], KeyLimits(**limits))


def _digest(secret: str) -> bytes:
    return hashlib.sha256(secret.encode()).digest()
