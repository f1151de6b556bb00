"""What a forward, a step and a denoising loop cost, beside diffusers' class and beside each other.

    python -m benchmarks.speed --size nano

One process, one set of random weights. The contenders of a comparison take turns, so that whatever else the machine
does (its clock, other processes, its memory) meets all of them alike, and only samples from the same rounds are put in
relation. Nothing here passes or fails: the result files hold every ratio beside its goal.
"""

import argparse
import functools
import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.report import RESULTS, Hardware, Ratio, Result, Timing, today
from benchmarks.sizes import SIZES, Inputs, Size, Transformers, build_transformers, find_size, make_inputs
from cache_functions import CacheConfig, cache_init, cal_type
from hi_diffusers.console import Parser, Refusal, quiet_libraries, refuse_errors, run_script, say
from hi_diffusers.loading import resolve_device, resolve_dtype
from hi_diffusers.models.transformer import Conditioning
from hi_diffusers.pipelines.hidream_image import HiDreamImagePipeline, StepEnd
from hi_diffusers.schedulers import make_scheduler

NAME = "speed"
THRESHOLD = 4
MAX_STEPS = 1000  # that `cache_init` takes
MAX_REPEATS = 900  # so that a cache's repeats and warm-up fit into MAX_STEPS
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
        repeats: rounds over single forwards and steps, 1 to 900; None is the size's.
        loops: rounds over whole denoising loops, 1 to 900; None is the size's.
        warm_up: rounds before, whose samples are dropped.
    """

    device: torch.device
    dtype: torch.dtype
    seed: int = 0
    repeats: int | None = None
    loops: int | None = None
    warm_up: int = 2

    def __post_init__(self) -> None:
        for name, value in (("repeats", self.repeats), ("loops", self.loops)):
            if value is not None and not 1 <= value <= MAX_REPEATS:
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
class Subject:
    """What is measured: both transformers, their inputs, and the text prepared once as in the denoising loop."""

    size: Size
    settings: Settings
    transformers: Transformers
    inputs: Inputs
    conditioning: Conditioning

    @classmethod
    def build(cls, size: Size, settings: Settings) -> "Subject":
        """Draw weights and inputs."""
        transformers = build_transformers(size, settings.device, settings.dtype, settings.seed)
        inputs = make_inputs(size, settings.device, settings.dtype, settings.seed)
        grid = tuple(side // size.transformer["patch_size"] for side in inputs.branches.shape[-2:])
        embeds = inputs.embeds
        with torch.no_grad():
            conditioning = transformers.ours.prepare(embeds.t5, embeds.llama, embeds.pooled, grid)
        return cls(size, settings, transformers, inputs, conditioning)

    def call_theirs(self) -> Tensor:
        """diffusers' class, as its pipeline calls it."""
        return self._call_with_text(self.transformers.theirs)

    def call_ours_with_text(self) -> Tensor:
        """Ours, called in the same way."""
        return self._call_with_text(self.transformers.ours)

    def call_ours(self, **cache: Any) -> Tensor:
        """Ours, as the denoising loop calls it."""
        inputs, ours = self.inputs, self.transformers.ours
        return ours(inputs.branches, inputs.timesteps, conditioning=self.conditioning, return_dict=False, **cache)[0]

    def _call_with_text(self, transformer: Any) -> Tensor:
        embeds = self.inputs.embeds
        text = (embeds.t5, embeds.llama, embeds.pooled)
        return transformer(self.inputs.branches, self.inputs.timesteps, *text, return_dict=False)[0]

    def step_with(self, config: CacheConfig) -> Callable[[], Tensor]:
        """Our forward as one step after the other of a cached generation that does not end."""
        cache_dic, current = cache_init(config, MAX_STEPS)

        def step() -> Tensor:
            cal_type(cache_dic, current)
            return self.call_ours(cache_dic=cache_dic, current=current)

        return step


@dataclass
class Loop:
    """A whole denoising loop, drawn like the size's preset.

    Attributes:
        steps: kind of a step -> for every run the median seconds of such steps, the scheduler's part left out.
        scheduler: for every run the median seconds of the scheduler's part of a step.
        num_full: full steps of a run.
    """

    subject: Subject
    cache: CacheConfig
    steps: dict[str, list[float]] = field(default_factory=lambda: {"full": [], "forecast": []})
    scheduler: list[float] = field(default_factory=list)
    num_full: int = 0

    def run(self) -> None:
        """Draw once, from the same noise."""
        preset, inputs = self.subject.size.preset, self.subject.inputs
        scheduler = TimedScheduler(make_scheduler(preset.scheduler, preset.shift), self.subject.settings.device)
        scheduler.set_timesteps(self.subject.size.steps)
        ends: list[StepEnd] = []
        self._pipeline.denoise(
            inputs.latents,
            inputs.embeds,
            scheduler=scheduler,
            guidance=preset.guidance,
            cache=self.cache,
            on_step_end=ends.append,
        )
        for kind, medians in self.steps.items():
            pairs = zip(ends, scheduler.seconds, strict=True)
            seconds = [end.record.seconds - part for end, part in pairs if end.record.kind == kind]
            medians.append(statistics.median(seconds) if seconds else 0.0)
        self.scheduler.append(statistics.median(scheduler.seconds))
        self.num_full = sum(end.record.kind == "full" for end in ends)

    @functools.cached_property
    def _pipeline(self) -> HiDreamImagePipeline:
        return HiDreamImagePipeline(None, *[None] * 9, transformer=self.subject.transformers.ours)


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
    say(f"{size.name}: drawing random weights")
    subject = Subject.build(size, settings)
    facts = {"parameters": _count_parameters(subject), **_compare_outputs(subject), **_find_expert_shares(subject)}
    timings, ratios = [], []
    for compare in (compare_forwards, compare_steps, compare_loops):
        say(f"{size.name}: {compare.__doc__.splitlines()[0]}")
        more_timings, more_ratios = compare(subject)
        timings += more_timings
        ratios += more_ratios
    return Result(
        benchmark=NAME,
        size=size.name,
        date=today(),
        hardware=Hardware.of(settings.device),
        settings=_describe(size, settings),
        facts=facts,
        timings=tuple(timings),
        ratios=tuple(ratios),
        notes=NOTES,
    )


def compare_forwards(subject: Subject) -> tuple[list[Timing], list[Ratio]]:
    """An uncached forward of ours beside diffusers'."""
    theirs, with_text, ours = timings = take_turns(
        [
            Contender("forward.diffusers", "diffusers' class", subject.call_theirs),
            Contender("forward.ours_with_text", "ours, called like diffusers'", subject.call_ours_with_text),
            Contender("forward.ours", "ours, as the loop calls it, its text prepared once", subject.call_ours),
        ],
        subject.settings.repeats or subject.size.repeats,
        subject.settings,
    )
    goal = _goals(subject)
    return timings, [
        Ratio.quotient("forward", "ours, prepared, over diffusers'", ours, theirs, goal=goal("forward")),
        Ratio.quotient("forward_with_text", "ours, with text, over diffusers'", with_text, theirs),
    ]


def compare_steps(subject: Subject) -> tuple[list[Timing], list[Ratio]]:
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
        subject.settings.repeats or subject.size.repeats,
        subject.settings,
    )
    goal = _goals(subject)
    return timings, [
        Ratio.overhead("cache_cost", "what the cache adds to a step", cached, uncached, goal=goal("cache_cost")),
        Ratio.overhead("cache_cost_floor", "the same, of no cache at all", again, uncached),
        Ratio.quotient(
            "forecast_module", "a forecast step over a full one", forecasting, cached, goal=goal("forecast_module")
        ),
    ]


def compare_loops(subject: Subject) -> tuple[list[Timing], list[Ratio]]:
    """Whole denoising loops, uncached and cached."""
    loops = {
        "uncached": Loop(subject, CacheConfig.off()),
        "module": Loop(subject, CacheConfig(target="module", fresh_threshold=THRESHOLD)),
        "x0": Loop(subject, CacheConfig(target="x0", fresh_threshold=THRESHOLD)),
    }
    rounds = subject.settings.loops or subject.size.loops
    phrase = f"{subject.size.steps} guided steps"
    contenders = [Contender(f"loop.{name}", f"{phrase}, {name}", loop.run) for name, loop in loops.items()]
    timings = take_turns(contenders, rounds, subject.settings, warm_up=1)
    whole = dict(zip(loops, timings, strict=True))
    ratios, goal = [], _goals(subject)
    for name in ("module", "x0"):
        loop = loops[name]
        full, forecast = (
            Timing(f"loop.{name}.{kind}", f"a {kind} step in it, without the scheduler", tuple(seconds[-rounds:]))
            for kind, seconds in loop.steps.items()
        )
        in_loop = name if name == "x0" else f"{name}_in_loop"
        ratios += [
            Ratio.quotient(
                f"forecast_{in_loop}",
                "a forecast step of the loop over a full one",
                forecast,
                full,
                goal=goal(f"forecast_{in_loop}"),
            ),
            Ratio.quotient(
                f"speedup_{name}",
                f"the uncached loop over threshold {THRESHOLD}, {loop.num_full} full steps",
                whole["uncached"],
                whole[name],
                bound=subject.size.steps / loop.num_full,
            ),
        ]
        timings += [full, forecast]
    scheduler = loops["uncached"].scheduler[-rounds:]
    return [*timings, Timing("loop.scheduler", "the scheduler's part of a step", tuple(scheduler))], ratios


def take_turns(
    contenders: Sequence[Contender], repeats: int, settings: Settings, warm_up: int | None = None
) -> list[Timing]:
    """Run all contenders once a round; every other round backwards, so that none always follows the same one.

    Args:
        contenders: in the order of the returned timings.
        repeats: rounds that count.
        settings: `device` and `warm_up`.
        warm_up: rounds before that do not count; None is the settings'.
    """
    warm_up = settings.warm_up if warm_up is None else warm_up
    samples: list[list[float]] = [[] for _ in contenders]
    order = list(zip(contenders, samples, strict=True))
    with torch.no_grad(), _no_collection():
        for _ in range(warm_up + repeats):
            for contender, seconds in order:
                seconds.append(take_seconds(contender.run, settings.device))
            order.reverse()
            gc.collect()
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
    """Python's collector waits for the end of a round."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _goals(subject: Subject) -> Callable[[str], float | None]:
    """The size's goals, which are set for a CPU."""
    goals: Mapping[str, float] = subject.size.goals if subject.settings.device.type == "cpu" else {}
    return goals.get


def _count_parameters(subject: Subject) -> int:
    return sum(parameter.numel() for parameter in subject.transformers.ours.parameters())


@torch.no_grad()
def _compare_outputs(subject: Subject) -> dict[str, float]:
    """Whether both compute the same."""
    ours, theirs = subject.call_ours().float(), subject.call_theirs().float()
    difference = (ours - theirs).abs().max() / theirs.abs().max()
    return {"largest difference of the outputs, over the largest output": difference.item()}


@torch.no_grad()
def _find_expert_shares(subject: Subject) -> dict[str, str]:
    """Which share of its tokens the least and the most loaded expert of any block gets."""
    shares: list[Tensor] = []
    gates = [module for name, module in subject.transformers.ours.named_modules() if name.endswith("ff_i.gate")]

    def count(gate: torch.nn.Module, inputs: Any, routing: Any) -> None:
        shares.append(routing.expert.flatten().bincount(minlength=len(gate.weight)) / routing.expert.numel())

    hooks = [gate.register_forward_hook(count) for gate in gates]
    subject.call_ours()
    for hook in hooks:
        hook.remove()
    if not shares:
        return {}
    low, high = torch.stack(shares).aminmax()
    return {"experts' shares of the tokens, least and most of any block": f"{low:.3f} .. {high:.3f}"}


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
        "repeats": settings.repeats or size.repeats,
        "loops": settings.loops or size.loops,
        "warm-up rounds": settings.warm_up,
    }


def make_parser() -> Parser:
    """The flags."""
    parser = Parser("benchmarks.speed", description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--size", choices=SIZES, default="nano", help="default: nano; real is the 17.1 B model, CUDA only"
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: auto")
    parser.add_argument("--dtype", choices=("auto", "fp32", "bf16", "fp16"), default="auto", help="default: auto")
    parser.add_argument("--repeats", type=int, help="rounds over forwards and steps (default: the size's)")
    parser.add_argument("--loops", type=int, help="rounds over denoising loops (default: the size's)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and inputs (default: 0)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the two files (default: %(default)s)")
    return parser


def run(args: argparse.Namespace) -> None:
    """Measure, write the files, print the Markdown."""
    size = find_size(args.size)
    device = refuse_errors(resolve_device, args.device)
    if device.type not in size.devices:
        raise Refusal(f"size {size.name} must be measured on {' or '.join(size.devices)}, got device {device.type}")
    if not args.output.parent.is_dir():
        raise Refusal(f"output must be a folder in an existing one, got {args.output}: there is no such parent folder")
    dtype = refuse_errors(resolve_dtype, args.dtype, device)
    settings = refuse_errors(Settings, device, dtype, args.seed, args.repeats, args.loops)
    quiet_libraries()
    result = measure(size, settings)
    print(result.to_markdown())
    for path in result.write(args.output):
        say(f"written: {path}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; exit codes as every script's."""
    return run_script(run, make_parser(), argv)


if __name__ == "__main__":
    raise SystemExit(main())
