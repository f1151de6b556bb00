"""Draws with candidate ways to forecast, and scores them."""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from cache_functions import CacheConfig, Calibration
from hi_diffusers.calibrating.plan import NUM_ANCHORS
from hi_diffusers.calibrating.uncached import Uncached
from hi_diffusers.pictures.metrics import Score, psnr

Found = TypeVar("Found")


@dataclass(frozen=True)
class Candidate:
    """One way to forecast within a budget.

    Attributes:
        full_steps: the schedule.
        prior, ridge: settings of the learned weights.
        corrector, corrector_from: see `CacheConfig`.
    """

    full_steps: tuple[int, ...]
    prior: str
    ridge: float
    corrector: bool = False
    corrector_from: int = 0

    def config(self, calibration: Calibration) -> CacheConfig:
        """The candidate as a configuration of the cache."""
        return CacheConfig(
            target=calibration.key.target,
            basis="learned",
            schedule="mask",
            mask=self.full_steps,
            max_order=NUM_ANCHORS - 1,
            prior=self.prior,
            ridge=self.ridge,
            corrector=self.corrector,
            corrector_from=self.corrector_from,
            calibration=calibration,
        )


class Trials:
    """Scores of the cached pictures of every candidate, kept in a file so that nothing is drawn twice."""

    def __init__(self, uncached: Uncached, path: Path):
        self.uncached, self.path = uncached, path
        self.num_pictures = uncached.plan.num_pictures - uncached.plan.num_fitted
        self.known = read_lines(path, psnr_of)

    def score(self, candidate: Candidate, calibration: Calibration, num_pictures: int | None = None) -> Score:
        """Score a candidate on the first `num_pictures` (None: all) choosing prompts; draws what is not known yet."""
        num_pictures = num_pictures or self.num_pictures
        name = json.dumps([calibration.key.target, *asdict(candidate).values()])
        known = self.known.get(name, [])
        if len(known) < num_pictures:
            cache = candidate.config(calibration)
            self.known[name] = known = known + list(self._draw(cache, len(known), num_pictures))
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"candidate": json.loads(name), "psnr": known}) + "\n")
        return Score.of(known[:num_pictures])

    def _draw(self, cache: CacheConfig, start: int, end: int) -> Iterator[float]:
        """PSNR of the choosing prompts from `start` to `end`."""
        plan = self.uncached.plan
        indices = range(plan.num_fitted + start, plan.num_fitted + end)
        for first in range(0, len(indices), plan.batch_size):
            batch = indices[first : first + plan.batch_size]
            for index, pixels in zip(batch, self.uncached.draw_cached(batch, cache), strict=True):
                yield psnr(pixels, self.uncached.pixels(index))


def psnr_of(content: dict[str, Any]) -> list[float]:
    """The figures of a line."""
    return [float(value) for value in content["psnr"]]


def read_lines(path: Path, parse: Callable[[dict[str, Any]], Found]) -> dict[str, Found]:
    """Read what a file knows of each candidate; an incomplete end, left by a killed run, is cut off.

    Args:
        parse: takes a line's content; raises ValueError, LookupError or TypeError if it is damaged.
    """
    known: dict[str, Found] = {}
    whole = 0
    for line in path.read_bytes().splitlines(keepends=True) if path.is_file() else ():
        try:
            content = json.loads(line)
            known[json.dumps(content["candidate"])] = parse(content)
        except (ValueError, LookupError, TypeError):
            break
        if not line.endswith(b"\n"):
            break
        whole += len(line)
    if path.is_file() and whole < path.stat().st_size:
        with path.open("r+b") as file:
            file.truncate(whole)
    return known
