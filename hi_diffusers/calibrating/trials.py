"""Ways to forecast, each judged by drawing with it."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from cache_functions import CacheConfig, Calibration
from hi_diffusers.calibrating.drawings import Drawings
from hi_diffusers.generation import generate_batch
from hi_diffusers.metrics import Score, psnr
from hi_diffusers.options import SamplingOptions

NUM_ANCHORS = 3


@dataclass(frozen=True)
class Candidate:
    """One way to forecast within a budget.

    Attributes:
        full_steps: the schedule.
        prior, ridge: of the learned weights.
        corrector, corrector_from: see `CacheConfig`.
    """

    full_steps: tuple[int, ...]
    prior: str
    ridge: float
    corrector: bool = False
    corrector_from: int = 0

    def config(self, calibration: Calibration) -> CacheConfig:
        """As a configuration of the cache."""
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
    """The cached pictures: every candidate's score, kept in a file so that none is drawn twice."""

    def __init__(self, drawings: Drawings, path: Path):
        self.drawings, self.path = drawings, path
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        self.known = {json.dumps(line["candidate"]): line["psnr"] for line in map(json.loads, lines)}

    def score(self, candidate: Candidate, calibration: Calibration) -> Score:
        """Draw the prompts that choose with this candidate, unless that was done before."""
        name = json.dumps([calibration.key.target, *asdict(candidate).values()])
        if name not in self.known:
            self.known[name] = list(self._draw(candidate.config(calibration)))
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"candidate": json.loads(name), "psnr": self.known[name]}) + "\n")
        return Score.of(self.known[name])

    def _draw(self, cache: CacheConfig) -> Iterator[float]:
        plan = self.drawings.plan
        indices = range(plan.num_fitted, len(plan.options))
        for start in range(0, len(indices), plan.batch_size):
            batch = indices[start : start + plan.batch_size]
            options = [SamplingOptions(**plan.options[i].settings()) for i in batch]
            drawn = generate_batch(self.drawings.pipe, options, cache)
            for index, picture in zip(batch, drawn, strict=True):
                yield psnr(picture.pixels, self.drawings.pixels(index))
