"""Two runs, picture by picture: which pictures belong together, and how far they are from each other."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from hi_diffusers.metrics import psnr, ssim
from hi_diffusers.runs.manifest import read_manifests, read_run

NUM_RESAMPLES = 2000
CAP_DB = 100.0  # of identical pictures, whose PSNR is infinite, in means and intervals


@dataclass(frozen=True)
class Run:
    """A run's folder, read.

    Attributes:
        folder: of the run.
        configuration: what its run.json says.
        lines: of the manifests, by (index, image); of several about one picture the last.
    """

    folder: Path
    configuration: dict[str, Any]
    lines: dict[tuple[int, int], dict[str, Any]]

    @classmethod
    def read(cls, folder: Path) -> "Run":
        """Raises ValueError if there is no run, or its files cannot be read."""
        configuration = read_run(folder)
        return cls(folder, configuration, {(line["index"], line["image"]): line for line in read_manifests(folder)})

    def picture(self, key: tuple[int, int]) -> Image.Image:
        """A saved picture, RGB; raises ValueError if it cannot be read."""
        path = self.folder / self.lines[key]["file"]
        try:
            with Image.open(path, formats=("PNG", "JPEG", "WEBP")) as image:
                return image.convert("RGB")
        except OSError as error:
            raise ValueError(f"{path} cannot be read: {error}") from error


@dataclass(frozen=True)
class Pair:
    """The same prompt and seed in both runs.

    Attributes:
        key: (index, image).
        psnr: in dB, of the saved pictures; infinite if they are identical.
        ssim: 1 if they are identical; NaN if they are smaller than its window.
        seconds: that drawing took, in a and in b.
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


def compare_pairs(a: Run, b: Run, keys: Sequence[tuple[int, int]]) -> Iterator[Pair]:
    """Measure pair after pair.

    Raises:
        ValueError: if a picture cannot be read, or the two have different sizes.
    """
    for key in keys:
        one, other = a.picture(key), b.picture(key)
        if one.size != other.size:
            raise ValueError(
                f"pictures must have one size: {key} has {one.size} in {a.folder}, {other.size} in {b.folder}"
            )
        line = a.lines[key]
        yield Pair(
            key=key,
            prompt=line["prompt"],
            seed=line["seed"],
            psnr=psnr(one, other),
            ssim=ssim(one, other) if min(one.size) >= 11 else math.nan,
            seconds=(float(line.get("seconds", math.nan)), float(b.lines[key].get("seconds", math.nan))),
        )


@dataclass(frozen=True)
class Summary:
    """Many values in a few: mean, median and 10th percentile, the first two with their 95 % bootstrap intervals."""

    count: int
    mean: float
    mean_interval: tuple[float, float]
    median: float
    median_interval: tuple[float, float]
    p10: float

    @classmethod
    def of(cls, values: Sequence[float], seed: int = 0) -> "Summary":
        """Of at least one value; infinite ones count as `CAP_DB`."""
        capped = np.where(np.isposinf(values), CAP_DB, np.asarray(values, np.float64))
        rows = np.random.default_rng(seed).integers(len(capped), size=(NUM_RESAMPLES, len(capped)))

        def interval(statistic: Callable[..., np.ndarray]) -> tuple[float, float]:
            low, high = np.percentile(statistic(capped[rows], axis=1), [2.5, 97.5])
            return float(low), float(high)

        return cls(
            count=len(capped),
            mean=float(capped.mean()),
            mean_interval=interval(np.mean),
            median=float(np.median(capped)),
            median_interval=interval(np.median),
            p10=float(np.percentile(capped, 10)),
        )
