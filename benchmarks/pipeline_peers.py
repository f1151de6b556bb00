"""The cache from outside beside everybody else who draws with a stock pipeline of diffusers; see benchmarks.peers.

Two pipelines are measured: one of few, wide blocks, over whole drawings; and one as deep as the real model and narrow,
whose steps show what a cache itself takes.
"""

import gc
import importlib.metadata
import os
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.pipeline_racers import THRESHOLD, Drawing, PipelineCourse, Way, counted
from benchmarks.pipelines import Stock
from benchmarks.racers import Settings
from benchmarks.report import Hardware, Ratio, Result, Spread, Timing, today
from cache_functions.state import StepKind
from forecasting.parts import parts
from hi_diffusers.console import say

NAME = "peers"
NOTES = (
    "Weights are random, so this is about speed and calls. The distance to the uncached latents (norm of the difference"
    " over theirs) only shows that the same thing is drawn; it says nothing about quality.",
    "All compute with the very same weights, noise and embeddings, in rounds, every other one backwards. Before them"
    " everybody draws once, which warms up, and calls are counted there.",
    "loop: from the first step to the end of the last; whole: the pipeline's call, with texts given as embeddings and"
    " with a VAE of few channels.",
    "Full steps: ours and cache-dit 0, 4, 8, ..., diffusers' hook 0, 2, 6, ...; as many of each. cache-dit computes the"
    " first block at every other step besides.",
    "By default diffusers' hook forecasts attention alone. Here it forecasts and leaves out the same modules as our"
    " target module, named in the settings; of joint attention it forecasts the text's half, too, which ours leaves"
    " out. lite is its own setting for the last layer's output, the peer of our velocity.",
    "calls: of the transformer, those not answered from outside; evaluations: those in which the last block's attention"
    " computed.",
    "deep: steps of the narrow pipeline; a sample is the median of one drawing's. idle is the same pipeline with a"
    " transformer that answers at once, so a forecast step less an idle one is what the cache takes; for module and the"
    " hook that includes norms and modulations, which the blocks still compute.",
)


@dataclass(frozen=True)
class Race:
    """What was measured of one pipeline.

    Attributes:
        name: what its steps are called in the results.
        ways: everybody who drew; the first is uncached.
        drawings: of every way, by name, one per round.
        first: of every way, by name: the latents that were drawn before the rounds.
        counts: of every way, by name: its calls and evaluations then.
    """

    name: str
    ways: Sequence[Way]
    drawings: dict[str, list[Drawing]]
    first: dict[str, torch.Tensor]
    counts: dict[str, Counter[str]]

    def loop(self, way: Way) -> Timing:
        """Seconds of the denoising loop."""
        return Timing(f"loop.{way.name}", way.what, tuple(one.loop for one in self.drawings[way.name]))

    def whole(self, way: Way) -> Timing:
        """Seconds of the pipeline's call."""
        return Timing(f"whole.{way.name}", way.what, tuple(one.whole for one in self.drawings[way.name]))

    def step(self, way: Way, kind: StepKind) -> Timing:
        """Seconds of a full or forecast step; a sample is the median of one drawing's."""
        chosen = [step for step in range(way.num_steps) if (step in way.full_steps) == (kind == "full")]
        samples = [statistics.median(one.steps[step] for step in chosen) for one in self.drawings[way.name]]
        return Timing(f"{self.name}.{way.name}.{kind}", f"{kind} step, its scheduler included", tuple(samples))

    def steps(self, way: Way) -> list[Timing]:
        """Full and forecast steps, as far as it has them."""
        found = [self.step(way, "full")] if way.full_steps else []
        return [*found, self.step(way, "forecast")] if way.caches else found

    def distance(self, way: Way) -> float:
        """Norm of the difference to the uncached latents over theirs."""
        reference = self.first[self.ways[0].name]
        return float((self.first[way.name] - reference).norm() / reference.norm())


def measure(stock: Stock, deep_stock: Stock, settings: Settings) -> Result:
    """One family, everybody who draws with it.

    Args:
        stock: what whole drawings are measured of.
        deep_stock: what steps are measured of.
    """
    before, device = load(), settings.device
    course, deep_course = (
        PipelineCourse(one, one.build(device, settings.dtype, settings.seed)) for one in (stock, deep_stock)
    )
    wide = race("step", course, [*course.ways()], settings)
    deep_ways = [way for way in deep_course.ways() if way.caches or way.name == "diffusers"]
    deep = race("deep", deep_course, [*deep_ways, deep_course.idle()], settings)
    return Result(
        benchmark=NAME,
        size=f"{stock.family.name}-{stock.size}",
        date=today(),
        hardware=Hardware.of(device),
        settings={
            **describe(course),
            **{f"deep: {name}": value for name, value in describe(deep_course).items()},
            "full steps": f"every {THRESHOLD}th, order 1",
            "diffusers' hook, forecast": ", ".join(stock.family.forecast),
            "diffusers' hook, left out": ", ".join(stock.family.needless),
            "cache-dit": cache_dit_version(),
            "device": str(device),
            "dtype": str(settings.dtype).removeprefix("torch."),
            "seed": settings.seed,
            "rounds": settings.rounds,
        },
        facts={
            **{f"way, {way.name}": describe_way(wide, way) for way in wide.ways},
            **{f"deep, {way.name}": describe_steps(deep, way) for way in deep.ways},
            "load average before, after": f"{before}, {load()}",
        },
        timings=(
            *(wide.loop(way) for way in wide.ways),
            *(wide.whole(way) for way in wide.ways),
            *(timing for one in (wide, deep) for way in one.ways for timing in one.steps(way)),
        ),
        ratios=(*ratios_of(wide), *deep_ratios_of(deep)),
        notes=NOTES,
    )


def race(name: str, course: PipelineCourse, ways: Sequence[Way], settings: Settings) -> Race:
    """Everybody once, counted, and then round by round."""
    found = Race(name, ways, {way.name: [] for way in ways}, {}, {})
    arguments, rounds, order = course.stock.arguments(course.pipe, settings.seed), settings.rounds, list(ways)
    say(f"{course.stock.family.name} {course.stock.size}: {len(ways)} ways to draw, {rounds} rounds")
    with tqdm(total=(rounds + 1) * len(ways), unit="drawing", dynamic_ncols=True) as bar:
        for way in ways:
            with counted(way.pipe.transformer) as counts:
                found.first[way.name] = way.draw(arguments, "latent").result
            found.counts[way.name] = counts
            bar.update()
        for _ in range(rounds):
            for way in order:
                found.drawings[way.name].append(way.draw(arguments))
                bar.update()
            order.reverse()
            gc.collect()
    return found


def ratios_of(race: Race) -> list[Ratio]:
    """Loops and calls of all over the uncached ones."""
    uncached, *others = race.ways
    base, base_whole = race.loop(uncached), race.whole(uncached)
    around = base_whole.spread.median - base.spread.median
    found = []
    for way in others:
        share = len(way.full_steps) / uncached.num_steps
        bound = (base.spread.median * share + around) / base_whole.spread.median
        what = f"{len(way.full_steps)} steps full, over uncached"
        found += [
            Ratio.quotient(f"{way.name}, loop", what, race.loop(way), base, bound=share),
            Ratio.quotient(f"{way.name}, whole", what, race.whole(way), base_whole, bound=bound),
        ]
    return found


def deep_ratios_of(race: Race) -> list[Ratio]:
    """What every cache takes, over the uncached full step of the same rounds."""
    stock, idle = race.step(race.ways[0], "full"), race.step(race.ways[-1], "forecast")
    found = []
    for way in race.ways[:-1]:
        if way.caches:
            forecast, full = race.step(way, "forecast"), race.step(way, "full")
            found += [
                Ratio.quotient(f"deep {way.name}, forecast step", "over an uncached step", forecast, stock),
                own_cost(f"deep {way.name}, own cost", forecast, idle, stock),
                Ratio.overhead(f"deep {way.name}, full step", "what it adds to an uncached step", full, stock),
            ]
    return found


def own_cost(name: str, forecast: Timing, idle: Timing, stock: Timing) -> Ratio:
    """A forecast step less an idle one, over an uncached step."""
    base = stock.spread.median
    spread = Spread.of([(a - b) / base for a, b in zip(forecast.seconds, idle.seconds, strict=True)])
    formula = f"median({forecast.name} - {idle.name}, round by round) / median({stock.name})"
    return Ratio(name, "a forecast step less an idle one, over an uncached step", formula, spread.median, spread)


def describe_way(race: Race, way: Way) -> str:
    """A row of the table."""
    uncached, counts = race.ways[0], race.counts[way.name]
    loop, whole = race.loop(way).spread.median, race.whole(way).spread.median
    loop_gain, whole_gain = race.loop(uncached).spread.median / loop, race.whole(uncached).spread.median / whole
    return (
        f"loop {loop:.3g} s, {loop_gain:.2f}x; whole {whole:.3g} s, {whole_gain:.2f}x; {counts['calls']} calls,"
        f" {counts['evaluations']} evaluations; {race.distance(way):.1e} from uncached (sanity only)"
    )


def describe_steps(race: Race, way: Way) -> str:
    """Milliseconds of its steps."""
    spreads = {timing.name.rpartition(".")[2]: timing.spread for timing in race.steps(way)}
    return ", ".join(f"{kind} step {1000 * spread.median:.3g} ms" for kind, spread in spreads.items())


def describe(course: PipelineCourse) -> dict[str, Any]:
    """What is drawn with."""
    stock, transformer = course.stock, course.pipe.transformer
    found = list(parts(transformer))
    num_forecast = sum(part.is_forecast for part in found)
    return {
        "transformer": dict(stock.transformer),
        "parameters": sum(parameter.numel() for parameter in transformer.parameters()),
        "weights": "random",
        "image tokens": stock.num_image_tokens,
        "text tokens": stock.num_text_tokens,
        "steps": stock.num_steps,
        "calls a step": stock.family.calls,
        "parts of target module": f"{num_forecast} forecast, {len(found) - num_forecast} left out",
    }


def cache_dit_version() -> str:
    """The installed version, or why it does not take part."""
    if find_spec("cache_dit") is None:
        return "skipped: not installed (pip install .[cache-dit])"
    return importlib.metadata.version("cache-dit")


def load() -> str:
    """The machine's load over the last minute."""
    return f"{os.getloadavg()[0]:.2f}" if hasattr(os, "getloadavg") else "not known"
