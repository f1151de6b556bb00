"""Two runs, picture by picture: which pictures belong together, and how much they differ."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from hi_diffusers.pictures.metrics import SSIM_WINDOW, psnr, ssim
from hi_diffusers.runs.manifest import read_manifests, read_run
from hi_diffusers.stock.frames import read_frames

NUM_RESAMPLES = 2000


@dataclass(frozen=True)
class Run:
    """A run that was read from its folder.

    Attributes:
        folder: the run's folder.
        configuration: content of its run.json.
        lines: manifest lines by (index, image); the latest one where a picture has several.
    """

    folder: Path
    configuration: dict[str, Any]
    lines: dict[tuple[int, int], dict[str, Any]]

    @classmethod
    def read(cls, folder: Path) -> "Run":
        """Read a run's folder; raises ValueError if it holds no run, or its files cannot be read."""
        configuration, lines = read_run(folder), sorted(read_manifests(folder), key=lambda line: line["time"])
        return cls(folder, configuration, {(line["index"], line["image"]): line for line in lines})

    def frames(self, key: tuple[int, int]) -> list[Image.Image]:
        """The frames of a saved video, or the one of a picture, RGB; raises ValueError if they cannot be read."""
        count = self.lines[key].get("frames", 0)
        return read_frames(self.folder / self.lines[key]["file"], count if isinstance(count, int) else 0)

    def picture(self, key: tuple[int, int]) -> Image.Image:
        """A saved picture, or the middle frame of a video, RGB; raises ValueError if it cannot be read."""
        frames = self.frames(key)
        return frames[len(frames) // 2]

    def seconds(self, key: tuple[int, int]) -> float:
        """Seconds that drawing the picture took; NaN if the manifest does not say."""
        found = self.lines[key].get("seconds")
        return float(found) if isinstance(found, int | float) and found > 0 else math.nan


@dataclass(frozen=True)
class Pair:
    """The same prompt and seed in both runs.

    Attributes:
        key: (index, image).
        psnr: PSNR of the saved pictures in dB, of a video over all frames; infinite if they are identical.
        ssim: SSIM of the saved pictures, of a video the mean over its frames; 1 if they are identical, NaN if they are
            smaller than its window.
        seconds: drawing time in a and in b.
    """

    key: tuple[int, int]
    prompt: str
    seed: int
    psnr: float
    ssim: float
    seconds: tuple[float, float]


@dataclass(frozen=True)
class Unpaired:
    """A picture that is not compared, and why."""

    key: tuple[int, int]
    reason: str


def match(a: Run, b: Run) -> tuple[list[tuple[int, int]], list[Unpaired]]:
    """The pictures of both runs that belong together, by index, image and seed, and those that do not."""
    keys, unpaired = [], []
    for key in sorted({*a.lines, *b.lines}):
        reason = _unpaired_because(a, b, key)
        if reason is None:
            keys.append(key)
        else:
            unpaired.append(Unpaired(key, reason))
    return keys, unpaired


def _unpaired_because(a: Run, b: Run, key: tuple[int, int]) -> str | None:
    for run, other in ((a, b), (b, a)):
        if key not in run.lines:
            return f"only in {other.folder}"
        if not run.lines[key]["file"]:
            return f"withheld in {run.folder}"
        if not (run.folder / run.lines[key]["file"]).is_file():
            return f"its file is missing in {run.folder}"
    for name in ("seed", "prompt"):
        if a.lines[key][name] != b.lines[key][name]:
            return f"another {name}: {a.lines[key][name]!r} and {b.lines[key][name]!r}"
    return None


def compare_pairs(a: Run, b: Run, keys: Sequence[tuple[int, int]]) -> Iterator[Pair | Unpaired]:
    """Measure the pairs one by one; an Unpaired says why a pair cannot be measured (unreadable, different sizes)."""
    for key in keys:
        try:
            frames = a.frames(key), b.frames(key)
            if len(frames[0]) != len(frames[1]):
                raise ValueError(f"{len(frames[0])} frames and {len(frames[1])}")
            far = psnr(*(np.stack([np.asarray(one) for one in some]) for some in frames))
        except ValueError as error:
            yield Unpaired(key, str(error))
            continue
        yield Pair(
            key=key,
            prompt=a.lines[key]["prompt"],
            seed=a.lines[key]["seed"],
            psnr=far,
            ssim=_similarity(*frames),
            seconds=(a.seconds(key), b.seconds(key)),
        )


def _similarity(some: Sequence[Image.Image], others: Sequence[Image.Image]) -> float:
    """Mean SSIM of the frames; NaN if they are smaller than its window."""
    if min(some[0].size) < SSIM_WINDOW:
        return math.nan
    return float(np.mean([ssim(one, other) for one, other in zip(some, others, strict=True)]))


@dataclass(frozen=True)
class Summary:
    """Mean, median and 10th percentile of many values, the first two with their 95 % bootstrap intervals."""

    count: int
    mean: float
    mean_interval: tuple[float, float]
    median: float
    median_interval: tuple[float, float]
    p10: float

    @classmethod
    def of(cls, values: Sequence[float], seed: int = 0) -> "Summary":
        """Summarize at least one value; resamples are drawn one by one, so that a long run fits into memory."""
        numbers, random = np.asarray(values, np.float64), np.random.default_rng(seed)
        resamples = (random.choice(numbers, len(numbers)) for _ in range(NUM_RESAMPLES))
        found = np.array([(resample.mean(), np.median(resample)) for resample in resamples])
        low, high = np.percentile(found, [2.5, 97.5], axis=0)
        return cls(
            count=len(numbers),
            mean=float(numbers.mean()),
            mean_interval=(float(low[0]), float(high[0])),
            median=float(np.median(numbers)),
            median_interval=(float(low[1]), float(high[1])),
            p10=float(np.percentile(numbers, 10)),
        )
