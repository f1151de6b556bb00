"""What a forward, a step and a denoising loop cost, beside diffusers' class and beside each other.

    python -m benchmarks.speed --size nano

One process, one set of random weights. The contenders of a comparison take turns, so that whatever else the machine
does (its clock, other processes, its memory) meets all of them alike, and only samples from the same rounds are put in
relation. Nothing here passes or fails: the result files hold every ratio beside its goal.
"""

import argparse
import functools
import gc
import os
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.report import RESULTS, Hardware, Ratio, Result, Timing, today
from benchmarks.sizes import SIZES, Size, Subject, bare_pipeline, find_size
from cache_functions import CacheConfig, StepRecord
from cache_functions.config import MAX_STEPS
from hi_diffusers.console import Parser, Refusal, quiet_libraries, refuse_errors, run_script, say
from hi_diffusers.denoising.schedulers import make_scheduler
from hi_diffusers.engine.loading import resolve_device, resolve_dtype
from hi_diffusers.families.hidream.pipeline import HiDreamImagePipeline

NAME = "speed"
THRESHOLD = 4
MAX_REPEATS = 900  # so that a cache's warm-up and repeats fit into MAX_STEPS
WARM_UP, WARM_UP_LOOPS = 2, 1
NOTES = (
    "Weights and inputs are random: timing does not depend on their values, save that the experts' shares of the tokens"
    " do, which are listed.",
    "Both classes compute on the same tensors in one process, without gradients; contenders of one comparison take"
    " turns, and every other round in the opposite order.",
    "cache_cost_floor compares a contender with itself: what cache_cost reads where the cache costs nothing.",
    "Steps inside a loop are timed without the scheduler's part, which stands apart; each sample is the median of one"
    " loop's steps.",
)


@dataclass(frozen=True)
class Settings:
    """How it is measured.

    Attributes:
        device, dtype: of the weights.
        seed: of weights and inputs.
        repeats: rounds over single forwards and steps, 1 to 900.
        loops: rounds over whole denoising loops, 1 to 900.
    """

    device: torch.device
    dtype: torch.dtype
    seed: int
    repeats: int
    loops: int

    def __post_init__(self) -> None:
        for name, value in (("repeats", self.repeats), ("loops", self.loops)):
            if not 1 <= value <= MAX_REPEATS:
                raise ValueError(f"{name} must be a whole number from 1 to {MAX_REPEATS}, got {value!r}")


@dataclass(frozen=True)
class Contender:
    """One of several ways that take turns.

    Attributes:
        name: of its timing.
        what: it does, in a phrase.
        run: does it once.
    """

    name: str
    what: str
    run: Callable[[], object]


@dataclass(frozen=True)
class Compared:
    """What a comparison gives."""

    timings: list[Timing]
    ratios: list[Ratio]


@dataclass
class Loop:
    """A whole denoising loop, drawn like the size's preset.

    Attributes:
        seconds: part of a step -> for every run the median of its seconds. Parts are "full" and "forecast", what the
            loop does in a step of that kind beside the scheduler, and "scheduler".
        num_full: full steps of a run.
    """

    name: str
    subject: Subject
    cache: CacheConfig
    seconds: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    num_full: int = 0

    def run(self) -> None:
        """Draw once, from the same noise."""
        preset, inputs = self.subject.size.preset, self.subject.inputs
        scheduler = TimedScheduler(make_scheduler(preset.scheduler, preset.shift), self.subject.device)
        scheduler.set_timesteps(self.subject.size.steps)
        records: list[StepRecord] = []
        self._pipeline.denoise(
            inputs.latents,
            inputs.embeds,
            scheduler=scheduler,
            guidance=preset.guidance,
            cache=self.cache,
            on_step_end=lambda end: records.append(end.record),
        )
        parts = defaultdict(list, scheduler=scheduler.seconds)
        for record, seconds in zip(records, scheduler.seconds, strict=True):
            parts[record.kind].append(record.seconds - seconds)
        for part, samples in parts.items():
            self.seconds[part].append(statistics.median(samples))
        self.num_full = len(parts["full"])

    def timing(self, part: str, what: str, num_runs: int) -> Timing:
        """Of one part of a step, over the last runs."""
        return Timing(f"loop.{self.name}.{part}", what, tuple(self.seconds[part][-num_runs:]))

    @functools.cached_property
    def _pipeline(self) -> HiDreamImagePipeline:
        return bare_pipeline(self.subject.transformers.ours)


class TimedScheduler:
    """A scheduler that keeps the seconds of its steps."""

    def __init__(self, scheduler: Any, device: torch.device):
        self._scheduler, self._device = scheduler, device
        self.seconds: list[float] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._scheduler, name)

    def set_timesteps(self, num_steps: int) -> None:
        """As the scheduler's own."""
        self._scheduler.set_timesteps(num_steps, device=self._device)

    def step(self, velocity: Tensor, timestep: Tensor, latents: Tensor, return_dict: bool = True) -> Any:
        """As the scheduler's own; on CUDA the device is waited for before and after."""
        self._wait()
        started = time.perf_counter()
        result = self._scheduler.step(velocity, timestep, latents, return_dict=return_dict)
        self._wait()
        self.seconds.append(time.perf_counter() - started)
        return result

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def measure(size: Size, settings: Settings) -> Result:
    """All comparisons at one size."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    say(f"{size.name}: drawing random weights")
    subject = Subject.build(size, settings.device, settings.dtype, settings.seed)
    timings: list[Timing] = []
    ratios: list[Ratio] = []
    for name, compare in (("forwards", compare_forwards), ("steps", compare_steps), ("loops", compare_loops)):
        say(f"{size.name}: timing {name}")
        compared = compare(subject, settings)
        timings += compared.timings
        ratios += compared.ratios
    return Result(
        benchmark=NAME,
        size=size.name,
        date=today(),
        hardware=Hardware.of(settings.device),
        settings=_describe(size, settings),
        facts={"load average before": load, **subject.facts()},
        timings=tuple(timings),
        ratios=tuple(ratios),
        notes=NOTES,
    )


def compare_forwards(subject: Subject, settings: Settings) -> Compared:
    """An uncached forward of ours beside diffusers'."""
    theirs, with_text, ours = timings = take_turns(
        [
            Contender("forward.diffusers", "diffusers' class", subject.call_theirs),
            Contender("forward.ours_with_text", "ours, called like diffusers'", subject.call_ours_with_text),
            Contender("forward.ours", "ours, as the loop calls it, its text prepared once", subject.call_ours),
        ],
        settings.repeats,
        settings.device,
    )
    goal = _goals(subject)
    ratios = [
        Ratio.quotient("forward", "ours, prepared, over diffusers'", ours, theirs, goal=goal("forward")),
        Ratio.quotient("forward_with_text", "ours, with text, over diffusers'", with_text, theirs),
    ]
    return Compared(timings, ratios)


def compare_steps(subject: Subject, settings: Settings) -> Compared:
    """A step without a cache, a full step with it, a forecast step; target module.

    What the cache adds to a full step (the decision, 2 tensors a block kept and 2 dropped) is far below the noise of a
    single step. Three things bring it out: samples of one round are taken side by side and subtracted there, so that
    drift drops out; the order is turned round, so that what one contender leaves behind in memory meets each of the
    others alike; and the median of many differences is taken. `again` is the check: the same contender a second time,
    whose difference shows what is left of the noise.
    """
    full = subject.step_with(CacheConfig(target="module", fresh_threshold=1))
    forecast = subject.step_with(CacheConfig(target="module", fresh_threshold=MAX_STEPS, first_enhance=2))
    with torch.no_grad():
        for _ in range(2):  # all anchors are there before anything is timed
            full()
            forecast()
    uncached, cached, again, forecasting = timings = take_turns(
        [
            Contender("step.uncached", "a forward without a cache", subject.call_ours),
            Contender("step.full", "a full step with the cache", full),
            Contender("step.uncached_again", "a forward without a cache, a second time", subject.call_ours),
            Contender("step.forecast", "a forecast step", forecast),
        ],
        settings.repeats,
        settings.device,
    )
    goal = _goals(subject)
    ratios = [
        Ratio.overhead("cache_cost", "what the cache adds to a step", cached, uncached, goal=goal("cache_cost")),
        Ratio.overhead("cache_cost_floor", "the same, of no cache at all", again, uncached),
        Ratio.quotient(
            "forecast_module", "a forecast step over a full one", forecasting, cached, goal=goal("forecast_module")
        ),
    ]
    return Compared(timings, ratios)


def compare_loops(subject: Subject, settings: Settings) -> Compared:
    """Whole denoising loops, uncached and cached."""
    num_steps, goal = subject.size.steps, _goals(subject)
    uncached = Loop("uncached", subject, CacheConfig.off())
    cached = [Loop(name, subject, CacheConfig(target=name, fresh_threshold=THRESHOLD)) for name in ("module", "x0")]
    contenders = [
        Contender(f"loop.{loop.name}", f"{num_steps} guided steps, {loop.name}", loop.run)
        for loop in (uncached, *cached)
    ]
    whole, *whole_cached = timings = take_turns(contenders, settings.loops, settings.device, WARM_UP_LOOPS)
    timings.append(uncached.timing("scheduler", "the scheduler's part of a step", settings.loops))
    ratios = []
    for loop, whole_loop in zip(cached, whole_cached, strict=True):
        what = "of the loop, without the scheduler's part"
        full = loop.timing("full", f"a full step {what}", settings.loops)
        forecast = loop.timing("forecast", f"a forecast step {what}", settings.loops)
        timings += [full, forecast]
        # The module target's goal is set for the forward alone, see `compare_steps`.
        name = "forecast_x0" if loop.name == "x0" else f"forecast_{loop.name}_in_loop"
        step_what = "a forecast step of the loop over a full one"
        what = f"the uncached loop over threshold {THRESHOLD}, {loop.num_full} of {num_steps} steps full"
        ratios += [
            Ratio.quotient(name, step_what, forecast, full, goal=goal(name)),
            Ratio.quotient(f"speedup_{loop.name}", what, whole, whole_loop, bound=num_steps / loop.num_full),
        ]
    return Compared(timings, ratios)


def take_turns(
    contenders: Sequence[Contender], repeats: int, device: torch.device, warm_up: int = WARM_UP
) -> list[Timing]:
    """Run all contenders once a round; every other round backwards, so that none always follows the same one.

    Args:
        contenders: in the order of the returned timings.
        repeats: rounds that count.
        device: where they run.
        warm_up: rounds before that do not count.
    """
    samples: list[list[float]] = [[] for _ in contenders]
    order = list(zip(contenders, samples, strict=True))
    with torch.no_grad(), _no_collection():
        for _ in range(warm_up + repeats):
            for contender, seconds in order:
                seconds.append(take_seconds(contender.run, device))
            order.reverse()
            gc.collect(0)  # the youngest generation: what this round left behind, and no more of the memory touched
    return [
        Timing(each.name, each.what, tuple(seconds[-repeats:]))
        for each, seconds in zip(contenders, samples, strict=True)
    ]


def take_seconds(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of one run: between two events on CUDA, of the wall clock elsewhere."""
    if device.type != "cuda":
        started = time.perf_counter()
        run()
        return time.perf_counter() - started
    torch.cuda.synchronize(device)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000


@contextmanager
def _no_collection() -> Iterator[None]:
    """Python's collector does not start by itself, in the middle of somebody's sample."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _goals(subject: Subject) -> Callable[[str], float | None]:
    """The size's goals, which are set for a CPU."""
    goals: Mapping[str, float] = subject.size.goals if subject.device.type == "cpu" else {}
    return goals.get


def _describe(size: Size, settings: Settings) -> dict[str, Any]:
    return {
        "transformer": dict(size.transformer),
        "configuration from": size.source,
        "image tokens": size.num_image_tokens,
        "text tokens": f"3 x {size.num_text_tokens}",
        "batch": "2, both guidance branches",
        "scheduler": size.preset.scheduler,
        "steps": size.steps,
        "guidance": size.preset.guidance,
        "cache": f"taylor, max_order 1; loops at fresh_threshold {THRESHOLD}",
        "weights": "random",
        "device": str(settings.device),
        "dtype": str(settings.dtype).removeprefix("torch."),
        "seed": settings.seed,
        "repeats": settings.repeats,
        "loops": settings.loops,
        "warm-up rounds": f"{WARM_UP} over steps, {WARM_UP_LOOPS} over loops",
    }


def make_parser() -> Parser:
    """The flags."""
    parser = Parser("benchmarks.speed", description=(__doc__ or "").splitlines()[0])
    add_subject_arguments(parser)
    parser.add_argument("--repeats", type=int, help="rounds over forwards and steps (default: the size's)")
    parser.add_argument("--loops", type=int, help="rounds over denoising loops (default: the size's)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and inputs (default: 0)")
    return parser


def add_subject_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of every benchmark that times the transformer: what is timed, and where the result goes."""
    parser.add_argument(
        "--size", choices=SIZES, default="nano", help="default: nano; real is the 17.1 B model, CUDA only"
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: auto")
    parser.add_argument("--dtype", choices=("auto", "fp32", "bf16", "fp16"), default="auto", help="default: auto")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the result (default: %(default)s)")


def subject_of(args: argparse.Namespace) -> tuple[Size, torch.device, torch.dtype]:
    """What those flags say.

    Raises:
        Refusal: if it cannot be had here.
    """
    size = find_size(args.size)
    device, dtype = place_of(args)
    if device.type not in size.devices:
        raise Refusal(f"size {size.name} must be measured on {' or '.join(size.devices)}, got device {device.type}")
    return size, device, dtype


def place_of(args: argparse.Namespace) -> tuple[torch.device, torch.dtype]:
    """What the flags say of where and in what it is computed.

    Raises:
        Refusal: if it cannot be had here, or the result has no place.
    """
    device = refuse_errors(resolve_device, args.device)
    if not args.output.parent.is_dir():
        raise Refusal(f"output must be a folder in an existing one, got {args.output}: there is no such parent folder")
    return device, refuse_errors(resolve_dtype, args.dtype, device)


def run(args: argparse.Namespace) -> None:
    """Measure, write the files, print the Markdown."""
    size, device, dtype = subject_of(args)
    repeats = size.repeats if args.repeats is None else args.repeats
    loops = size.loops if args.loops is None else args.loops
    settings = refuse_errors(Settings, device, dtype, args.seed, repeats, loops)
    quiet_libraries()
    measure(size, settings).publish(args.output)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; exit codes as every script's."""
    return run_script(run, make_parser(), argv)


if __name__ == "__main__":
    raise SystemExit(main())
