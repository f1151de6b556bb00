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

NUM_RESAMPLES = 2000
MAX_PIXELS = 4096 * 4096


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

    def picture(self, key: tuple[int, int]) -> Image.Image:
        """A saved picture, RGB; raises ValueError if it cannot be read."""
        path = self.folder / self.lines[key]["file"]
        try:
            with Image.open(path, formats=("PNG", "JPEG", "WEBP")) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise ValueError(f"{image.width}x{image.height} pixels, {MAX_PIXELS} are allowed")
                return image.convert("RGB")
        except (
            OSError,
            SyntaxError,
            ValueError,
            Image.DecompressionBombError,
        ) as error:  # a broken PNG is a SyntaxError
            raise ValueError(f"{path} cannot be read: {error}") from error

    def seconds(self, key: tuple[int, int]) -> float:
        """Seconds that drawing the picture took; NaN if the manifest does not say."""
        found = self.lines[key].get("seconds")
        return float(found) if isinstance(found, int | float) and found > 0 else math.nan


@dataclass(frozen=True)
class Pair:
    """The same prompt and seed in both runs.

    Attributes:
        key: (index, image).
        psnr: PSNR of the saved pictures in dB; infinite if they are identical.
        ssim: SSIM of the saved pictures; 1 if they are identical, NaN if they are smaller than its window.
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
            one, other = a.picture(key), b.picture(key)
            far = psnr(one, other)
        except ValueError as error:
            yield Unpaired(key, str(error))
            continue
        yield Pair(
            key=key,
            prompt=a.lines[key]["prompt"],
            seed=a.lines[key]["seed"],
            psnr=far,
            ssim=ssim(one, other) if min(one.size) >= SSIM_WINDOW else math.nan,
            seconds=(a.seconds(key), b.seconds(key)),
        )


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
