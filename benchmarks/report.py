"""Results: samples, the ratios between them, and the files they are written to.

Every number in a result file follows from the samples that stand beside it.
"""

import datetime
import importlib.metadata
import json
import os
import platform
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from hi_diffusers.console import say

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "diffusers", "transformers")
# Variables that change what a CPU step costs: threads, and how the C library gives memory back.
ENVIRONMENT = re.compile(r"^(OMP|MKL|KMP|ONEDNN|DNNL|MALLOC|GOMP|CUDA|PYTORCH|TORCH)_|^LD_PRELOAD$")


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of samples."""

    median: float
    lower_quartile: float
    upper_quartile: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> "Spread":
        """Of at least one sample; of a single one all three are that sample."""
        if len(samples) == 1:
            return cls(samples[0], samples[0], samples[0])
        lower, median, upper = statistics.quantiles(samples, n=4, method="inclusive")
        return cls(median, lower, upper)


@dataclass(frozen=True)
class Timing:
    """What one contender took.

    Attributes:
        name: of the contender.
        what: what was timed, in a phrase.
        seconds: one sample per round. Samples of equal index were taken in one round, side by side.
    """

    name: str
    what: str
    seconds: tuple[float, ...]

    @property
    def spread(self) -> Spread:
        """Of the samples, in seconds."""
        return Spread.of(self.seconds)


@dataclass(frozen=True)
class Ratio:
    """One timing relative to another from the same rounds.

    Attributes:
        name: of the ratio.
        what: what it says, in a phrase.
        formula: how the value follows from the timings.
        value: of the medians.
        spread: of the same figure taken round by round.
        goal: what the value should be at most; None where there is none.
        bound: what the value would be if everything but full steps cost nothing; None where that says nothing.
    """

    name: str
    what: str
    formula: str
    value: float
    spread: Spread
    goal: float | None = None
    bound: float | None = None

    @property
    def met(self) -> bool | None:
        """Whether the value keeps the goal; None without one."""
        return None if self.goal is None else self.value <= self.goal

    @classmethod
    def quotient(
        cls,
        name: str,
        what: str,
        top: Timing,
        bottom: Timing,
        goal: float | None = None,
        bound: float | None = None,
    ) -> "Ratio":
        """Median of `top` over median of `bottom`."""
        value = top.spread.median / bottom.spread.median
        rounds = [a / b for a, b in zip(top.seconds, bottom.seconds, strict=True)]
        formula = f"median({top.name}) / median({bottom.name})"
        return cls(name, what, formula, value, Spread.of(rounds), goal, bound)

    @classmethod
    def overhead(cls, name: str, what: str, with_it: Timing, without: Timing, goal: float | None = None) -> "Ratio":
        """Median of the paired differences over the median without.

        For costs far below the drift of a machine: a difference within a round does not see what changes between
        rounds, and the median of many does not see the rounds that were disturbed.
        """
        base = without.spread.median
        rounds = [(a - b) / base for a, b in zip(with_it.seconds, without.seconds, strict=True)]
        spread = Spread.of(rounds)
        formula = f"median({with_it.name} - {without.name}, round by round) / median({without.name})"
        return cls(name, what, formula, spread.median, spread, goal)


@dataclass(frozen=True)
class Hardware:
    """Where it was measured.

    Attributes:
        name: of what computed, the GPU or the CPU.
        slug: the same as a part of a file name; a CPU's says with how many threads.
        cores: that this process may use.
        threads: that torch computes with.
    """

    name: str
    slug: str
    cpu: str
    cores: int
    threads: int
    gpu: str | None
    platform: str

    @classmethod
    def of(cls, device: torch.device) -> "Hardware":
        """This machine, as torch uses it for the device."""
        cpu, threads = _cpu_name(), torch.get_num_threads()
        gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
        slug = _slug(gpu) if gpu else f"{_slug(cpu)}-{threads}-thread{'s' if threads > 1 else ''}"
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return cls(gpu or cpu, slug, cpu, cores, threads, gpu, platform.platform())


@dataclass(frozen=True)
class Result:
    """One run of a benchmark.

    Attributes:
        benchmark: its name, the first part of the files' names.
        size: name of the size.
        date: ISO date.
        hardware: where.
        settings: what was asked for: configuration, dtype, seed, repeats.
        facts: what else was found out beside timings.
        timings, ratios: what was measured.
        notes: sentences that a reader of the numbers must know.
    """

    benchmark: str
    size: str
    date: str
    hardware: Hardware
    settings: Mapping[str, Any]
    facts: Mapping[str, Any]
    timings: tuple[Timing, ...]
    ratios: tuple[Ratio, ...]
    notes: tuple[str, ...]

    @property
    def stem(self) -> str:
        """Name of the result files; a second run of the same day takes the place of the first."""
        return f"{self.benchmark}_{self.size}_{self.hardware.slug}_{self.date}"

    def to_json(self) -> dict[str, Any]:
        """Everything, JSON-able."""
        return {
            "benchmark": self.benchmark,
            "size": self.size,
            "date": self.date,
            "hardware": asdict(self.hardware),
            "versions": versions(),
            "environment": environment(),
            "settings": dict(self.settings),
            "facts": dict(self.facts),
            "timings": [{**asdict(timing), **asdict(timing.spread)} for timing in self.timings],
            "ratios": [{**asdict(ratio), "met": ratio.met} for ratio in self.ratios],
            "notes": list(self.notes),
        }

    def to_markdown(self) -> str:
        """The same without the samples."""
        machine = self.hardware
        lines = [
            f"# {self.benchmark}, size {self.size}",
            "",
            f"{machine.name}; cores {machine.cores}, torch threads {machine.threads}; {machine.platform}; {self.date}.",
            "",
            ", ".join(f"{name} {version}" for name, version in versions().items()) + ".",
            "",
            "; ".join(f"{name} {value}" for name, value in environment().items()) or "No variable set that matters.",
            "",
            "| setting | value |",
            "|---|---|",
            *(f"| {name} | {_show(value)} |" for name, value in [*self.settings.items(), *self.facts.items()]),
            "",
            "| ratio | value | quartiles, by round | goal | bound |",
            "|---|---|---|---|---|",
            *(_ratio_row(ratio) for ratio in self.ratios),
            "",
            "| timing | median, ms | quartiles, ms | rounds |",
            "|---|---|---|---|",
            *(_timing_row(timing) for timing in self.timings),
            "",
            *(f"- {note}" for note in self.notes),
        ]
        return "\n".join(lines) + "\n"

    def write(self, folder: Path) -> list[Path]:
        """Write both files and return their paths."""
        folder.mkdir(exist_ok=True)
        files = {".json": json.dumps(self.to_json(), indent=1) + "\n", ".md": self.to_markdown()}
        paths = [folder / (self.stem + suffix) for suffix in files]
        for path, text in zip(paths, files.values(), strict=True):
            path.write_text(text, encoding="utf-8")
        return paths

    def publish(self, folder: Path) -> None:
        """Print the Markdown, write both files, and say where."""
        print(self.to_markdown())
        for path in self.write(folder):
            say(f"written: {path}")


def write_json(folder: Path, name: str, device: torch.device, content: Mapping[str, Any]) -> Path:
    """Write one benchmark's figures with date, hardware and versions, and return the file's path.

    Args:
        name: of the benchmark, the first part of the file's name.
        device: what computed.
    """
    hardware = Hardware.of(device)
    where = {"date": today(), "hardware": f"{hardware.name}, {hardware.threads} threads", "versions": versions()}
    path = folder / f"{name}_{hardware.slug}_{today()}.json"
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(where | dict(content), indent=1) + "\n", encoding="utf-8")
    return path


def today() -> str:
    """ISO date."""
    return datetime.date.today().isoformat()


def versions() -> dict[str, str]:
    """Of Python and the libraries that do the work."""
    installed = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {"python": platform.python_version(), **installed, "cuda": str(torch.version.cuda)}


def environment() -> dict[str, str]:
    """The variables that change timings, if set."""
    return {name: value for name, value in sorted(os.environ.items()) if ENVIRONMENT.search(name)}


def _show(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_show(part)}" for name, part in value.items())
    if isinstance(value, list | tuple):
        return " ".join(_show(part) for part in value)
    return str(value)


def _ratio_row(ratio: Ratio) -> str:
    goal = "" if ratio.met is None else f"<= {ratio.goal:g}: {'met' if ratio.met else 'missed'}"
    quartiles = f"{ratio.spread.lower_quartile:.4f} .. {ratio.spread.upper_quartile:.4f}"
    bound = "" if ratio.bound is None else f"{ratio.bound:.4f}"
    return f"| {ratio.name}: {ratio.what} | {ratio.value:.4f} | {quartiles} | {goal} | {bound} |"


def _timing_row(timing: Timing) -> str:
    milliseconds = [f"{1000 * value:.4g}" for value in asdict(timing.spread).values()]
    median, lower, upper = milliseconds
    return f"| {timing.name}: {timing.what} | {median} | {lower} .. {upper} | {len(timing.seconds)} |"


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _slug(name: str) -> str:
    name = re.sub(r"\((R|TM|C)\)|\bCPU\b|\bprocessor\b|@.*$", " ", name, flags=re.IGNORECASE)
    return "-".join(re.findall(r"[a-z0-9]+", name.lower()))
