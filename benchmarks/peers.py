"""Our pipeline beside everybody else who draws with HiDream-I1, in one process, on the same weights.

    python -m benchmarks.peers --size nano
    python -m benchmarks.peers --family flux

Every contender draws from the same noise and embeddings, one after the other, round by round; every other round
backwards. At size nano the weights are the bundled model's, encoders and VAE are there, and pictures are compared with
diffusers' own uncached ones; at the other sizes weights are random, and there is the denoising loop alone.

Other families are drawn by diffusers' own pipelines with random weights (benchmarks/pipelines.py), which our cache
forecasts from outside (benchmarks/pipeline_peers.py).
"""

import argparse
import gc
import statistics
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks import pipeline_peers
from benchmarks.ceilings import Ceilings, forward_flops, measure_ceilings
from benchmarks.pipelines import FAMILIES, find_stock
from benchmarks.racers import THRESHOLD, Course, Lap, Racer, Settings
from benchmarks.report import Hardware, Ratio, Result, Timing, today
from benchmarks.sizes import Size, Subject, Transformers, bare_pipeline, make_inputs
from benchmarks.speed import add_subject_arguments, place_of, subject_of, take_seconds
from hi_diffusers.console import Parser, Refusal, quiet_libraries, refuse_errors, run_script, say
from hi_diffusers.engine.loading import load_pipeline
from hi_diffusers.families.hidream.denoiser import GuidedDenoiser
from hi_diffusers.families.hidream.pipeline import HiDreamImagePipeline
from hi_diffusers.families.hidream.prompts import PromptEmbeds
from hi_diffusers.families.hidream.transformer import Conditioning
from hi_diffusers.pictures.metrics import CAP_DB, psnr, ssim
from training.evaluate import held_out_prompts
from training.scenes import CPU_TIER

NAME = "peers"
HIDREAM = "hidream"
UNCACHED = 1 / 1.3  # goals: ours over diffusers', uncached
SHARE = {"module": 0.80, "residual": 0.93, "velocity": 0.93, "x0": 0.93}  # of steps / full steps, at size small
NOTES = (
    "All contenders compute with the very same weights, noise and embeddings; each cached one computes as many steps"
    " whole: ours and cache-dit 0, 4, 8, ..., diffusers' hook 0, 2, 6, ... cache-dit computes the first block of either"
    " stack at every other step besides, which is in its seconds, not in its evaluations.",
    "Loops are timed with the device waited for. Encoding and decoding are the same code for all of them, measured"
    " beside the loops; a whole picture is the sum of the three medians, its ceiling what it would take if steps that"
    " are not full cost nothing.",
    "model evaluations count both guidance branches: 2 a full step.",
)


def measure(size: Size, settings: Settings) -> Result:
    """One size, all contenders."""
    ceilings = measure_ceilings(settings.device, settings.dtype)
    course = build_course(size, settings)
    subject = course.subject
    racers = list(course.racers())
    say(f"{size.name}: {len(racers)} contenders, {settings.rounds} rounds")
    laps = race(racers, subject.inputs.latents, subject.inputs.embeds, settings.rounds)
    loops = {
        racer.name: Timing(f"loop.{racer.name}", racer.what, tuple(lap.seconds for lap in laps[racer.name]))
        for racer in racers
    }
    ends = [] if course.pipe.vae is None else time_ends(course, settings)
    facts = {
        **facts_of(course, ceilings, laps, racers),
        **wholes(racers, loops, ends, size.steps),
        **(judge(course, racers, settings) if course.pipe.vae is not None and settings.pictures else {}),
    }
    steps = [timing for racer in racers if racer.ours for timing in time_steps(racer, laps[racer.name])]
    return Result(
        benchmark=NAME,
        size=size.name,
        date=today(),
        hardware=Hardware.of(settings.device),
        settings=describe(course, settings),
        facts=facts,
        timings=(*loops.values(), *ends, *steps),
        ratios=tuple(ratios_of(racers, loops, size, settings.device)),
        notes=NOTES,
    )


def build_course(size: Size, settings: Settings) -> Course:
    """The weights, and our pipeline over them."""
    if size.name != "nano":
        say(f"{size.name}: drawing random weights")
        subject = Subject.build(size, settings.device, settings.dtype, settings.seed)
        return Course(subject, bare_pipeline(subject.transformers.ours), size.preset.guidance)
    names = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
    pipe = load_pipeline("nano", device=settings.device.type, dtype=names[settings.dtype])
    inputs = make_inputs(size, settings.device, settings.dtype, settings.seed)
    embeds = encode(pipe, size.preset.example)
    subject = Subject(
        size,
        settings.device,
        settings.dtype,
        Transformers(pipe.transformer, pipe.transformer),
        type(inputs)(inputs.latents, inputs.branches, inputs.timesteps, embeds),
        conditioning(pipe, embeds, inputs.latents),
    )
    return Course(subject, pipe, size.preset.guidance)


@torch.no_grad()
def conditioning(pipe: HiDreamImagePipeline, embeds: PromptEmbeds, latents: Tensor) -> Conditioning:
    """What is constant over a generation."""
    denoiser = GuidedDenoiser(pipe.transformer, torch.zeros(1), embeds, guidance=2.0, gated=False)
    denoiser.condition(latents)
    assert denoiser.conditioning is not None
    return denoiser.conditioning


def encode(pipe: HiDreamImagePipeline, prompt: str) -> PromptEmbeds:
    """Both branches."""
    with torch.no_grad():
        return pipe.encode([prompt], pipe.preset.max_sequence_length, [""])


def race(racers: Sequence[Racer], noise: Tensor, embeds: PromptEmbeds, rounds: int) -> dict[str, list[Lap]]:
    """All of them, round by round; before that those of few full steps once, which warms up the others, too."""
    laps: dict[str, list[Lap]] = {racer.name: [] for racer in racers}
    order, short = list(racers), [racer for racer in racers if racer.full_steps < max(r.full_steps for r in racers)]
    with torch.no_grad(), tqdm(total=rounds * len(racers) + len(short), unit="loop", dynamic_ncols=True) as bar:
        for racer in short:
            racer.run(noise, embeds)
            bar.update()
        for _ in range(rounds):
            for racer in order:
                laps[racer.name].append(racer.run(noise, embeds))
                bar.update()
            order.reverse()
            gc.collect()
    return laps


def time_ends(course: Course, settings: Settings) -> list[Timing]:
    """Encoding and decoding of one picture."""
    pipe, latents = course.pipe, course.subject.inputs.latents
    prompt = course.size.preset.example
    found = []
    for name, what, work in (
        ("encode", "a prompt and its negative", lambda: encode(pipe, prompt)),
        ("decode", "a picture", lambda: pipe.decode(latents)),
    ):
        seconds = [take_seconds(work, settings.device) for _ in range(settings.rounds + 2)][2:]
        found.append(Timing(name, what, tuple(seconds)))
    return found


def time_steps(racer: Racer, laps: Sequence[Lap]) -> list[Timing]:
    """Full and forecast steps of our loops; a sample is the median of one loop's."""
    found = []
    for kind in ("full", "forecast"):
        steps = [[record.seconds for record in lap.records if record.kind == kind] for lap in laps]
        if all(steps):
            samples = tuple(statistics.median(one) for one in steps)
            found.append(Timing(f"step.{racer.name}.{kind}", f"a {kind} step, its scheduler included", samples))
    return found


def ratios_of(racers: Sequence[Racer], loops: dict[str, Timing], size: Size, device: torch.device) -> list[Ratio]:
    """Ours against diffusers', each target against its ceiling, and ours against every cache at equal full steps."""
    has_goals, num_steps = device.type == "cpu", size.steps
    shares = SHARE if has_goals and size.name == "small" else {}
    uncached = loops["ours"]
    goal = UNCACHED if has_goals else None
    ratios = [
        Ratio.quotient("uncached", "our uncached loop over diffusers'", uncached, loops["diffusers"], goal=goal),
        Ratio.quotient("plain", "the same without the faster ways", loops["ours plain"], loops["diffusers"]),
    ]
    for racer in racers:
        if racer.caches and racer.ours:
            share = racer.full_steps / num_steps
            target = racer.name.removeprefix("ours ")
            goal = share / shares[target] if target in shares else None
            what = f"the loop over our uncached one, {racer.full_steps} of {num_steps} steps full"
            ratios.append(Ratio.quotient(racer.name, what, loops[racer.name], uncached, goal=goal, bound=share))
        elif racer.caches:
            fastest = loops["ours x0"]
            what = "our loop with x0 over this one's"
            ratios.append(Ratio.quotient(f"ours over {racer.name}", what, fastest, loops[racer.name], goal=1.0))
    return ratios


def wholes(racers: Sequence[Racer], loops: dict[str, Timing], ends: Sequence[Timing], num_steps: int) -> dict[str, Any]:
    """Seconds of a whole picture, speedup over diffusers' and its ceiling."""
    around = sum(timing.spread.median for timing in ends)
    base = loops["diffusers"].spread.median + around
    ours = loops["ours"].spread.median
    found = {}
    for racer in racers:
        whole = loops[racer.name].spread.median + around
        row = f"{whole:.3g} s, {base / whole:.2f} times as fast as diffusers'"
        if racer.ours and racer.caches:
            ceiling = (ours + around) / (ours * racer.full_steps / num_steps + around)
            row += f", {(ours + around) / whole:.2f} of at most {ceiling:.2f} times our uncached"
        found[f"whole picture, {racer.name}"] = f"{row}; {2 * racer.full_steps} model evaluations"
    return found


def facts_of(course: Course, ceilings: Ceilings, laps: dict[str, list[Lap]], racers: Sequence[Racer]) -> dict[str, Any]:
    """How near the steps come to what the machine can do."""
    full = statistics.median(record.seconds for lap in laps["ours"] for record in lap.records)
    flops = forward_flops(course.subject)
    module = [r.seconds for lap in laps["ours module"] for r in lap.records if r.kind == "forecast"]
    kept = max(record.cache_bytes for lap in laps["ours module"] for record in lap.records)
    reached, read = flops / full, kept / statistics.median(module)
    return {
        "matrix-product ceiling": f"{ceilings.flops / 1e12:.3g} TFLOP/s",
        "copy ceiling": f"{ceilings.bytes / 1e9:.3g} GB/s",
        "a full step": f"{flops / 1e12:.3g} TFLOP, {reached / 1e12:.3g} TFLOP/s, {reached / ceilings.flops:.0%} of it",
        "a forecast step, module": f"reads {kept / 1e6:.4g} MB of anchors, {read / 1e9:.3g} GB/s",
        "contenders": ", ".join(racer.name for racer in racers),
    }


def judge(course: Course, racers: Sequence[Racer], settings: Settings) -> dict[str, Any]:
    """PSNR and SSIM, before rounding, to diffusers' uncached picture of the same noise and prompt."""
    pipe, inputs = course.pipe, course.subject.inputs
    prompts = held_out_prompts(CPU_TIER, settings.pictures)
    scores: dict[str, list[tuple[float, float]]] = {racer.name: [] for racer in racers}
    generator = torch.Generator().manual_seed(settings.seed + 1)
    with torch.no_grad():
        for prompt in tqdm(prompts, unit="prompt", dynamic_ncols=True):
            noise = torch.randn(inputs.latents.shape, generator=generator).to(settings.device)
            embeds = encode(pipe, prompt)
            pictures = {racer.name: pipe.decode(racer.run(noise, embeds).latents)[0] for racer in racers}
            for name, picture in pictures.items():
                reference = pictures["diffusers"]
                scores[name].append((min(psnr(reference, picture), CAP_DB), ssim(reference, picture)))
    found = {}
    for name, pairs in scores.items():
        if name != "diffusers":
            decibels, similarity = (np.array(values) for values in zip(*pairs, strict=True))
            low = np.percentile(decibels, 10)
            found[f"quality, {name}"] = (
                f"PSNR median {np.median(decibels):.1f}, mean {decibels.mean():.1f}, 10th percentile {low:.1f} dB;"
                f" SSIM median {np.median(similarity):.4f}; {len(pairs)} prompts"
            )
    return found


def describe(course: Course, settings: Settings) -> dict[str, Any]:
    """What was asked for."""
    size = course.size
    return {
        "transformer": dict(size.transformer),
        "weights": "the bundled model's" if size.name == "nano" else "random",
        "image tokens": size.num_image_tokens,
        "text tokens": f"3 x {size.num_text_tokens}",
        "batch": "2, both guidance branches",
        "scheduler": size.preset.scheduler,
        "steps": size.steps,
        "guidance": course.guidance,
        "full steps": f"every {THRESHOLD}th",
        "device": str(settings.device),
        "dtype": str(settings.dtype).removeprefix("torch."),
        "seed": settings.seed,
        "rounds": settings.rounds,
    }


def make_parser() -> Parser:
    """The flags."""
    parser = Parser("benchmarks.peers", description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--family", choices=(HIDREAM, *FAMILIES), default=HIDREAM, help="all but hidream have size small alone"
    )
    add_subject_arguments(parser)
    parser.set_defaults(size=None)
    parser.add_argument("--rounds", type=int, default=5, help="of all contenders (default: %(default)s)")
    parser.add_argument("--pictures", type=int, default=64, help="for quality, size nano (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of noise and random weights (default: 0)")
    parser.add_argument("--without_cache_dit", action="store_true", help="measure although cache-dit is not installed")
    return parser


def run(args: argparse.Namespace) -> None:
    """Measure, write the files, print the Markdown."""
    work = prepare_hidream(args) if args.family == HIDREAM else prepare_pipeline(args)
    if find_spec("cache_dit") is None and not args.without_cache_dit:
        raise Refusal("cache-dit is a peer and not installed: pip install .[cache-dit], or give --without_cache_dit")
    quiet_libraries()
    work().publish(args.output)


def prepare_hidream(args: argparse.Namespace) -> Callable[[], Result]:
    """The measurement of HiDream-I1."""
    args.size = args.size or "nano"
    size, device, dtype = subject_of(args)
    settings = refuse_errors(Settings, device, dtype, args.seed, args.rounds, args.pictures)
    return lambda: measure(size, settings)


def prepare_pipeline(args: argparse.Namespace) -> Callable[[], Result]:
    """The measurement of another family."""
    if args.size not in (None, "small"):
        raise Refusal(f"family {args.family} has size small alone, got {args.size}")
    device, dtype = place_of(args)
    settings = refuse_errors(Settings, device, dtype, args.seed, args.rounds, args.pictures)
    stock, deep_stock = find_stock(args.family, "small"), find_stock(args.family, "deep")
    return lambda: pipeline_peers.measure(stock, deep_stock, settings)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; exit codes as every script's."""
    return run_script(run, make_parser(), argv)


if __name__ == "__main__":
    raise SystemExit(main())
