"""How far cached pictures are from uncached ones at the same number of model evaluations.

    python -m benchmarks.quality                # everything; goes on where it stopped
    python -m benchmarks.quality --quick        # 16 prompts, 13 and 8 full steps
    python -m benchmarks.quality --screen       # every target, basis and schedule on 16 prompts

The bundled model draws prompts and seeds that it was neither trained nor calibrated on. Pictures are compared as
floats, before they are rounded to 8 bits, with the uncached picture of the same prompt and seed.
"""

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from benchmarks.contenders import DRAWBENCH, FEW_BUDGETS, HELD_OUT, Block, Method, blocks, methods, outside, screened
from benchmarks.quality_report import write_report
from benchmarks.report import RESULTS
from benchmarks.teacache import observed_changes, teacache_mask
from cache_functions import CacheConfig, Calibration, planned_full_steps
from hi_diffusers import SamplingOptions, generate_batch, load_pipeline
from hi_diffusers.console import Parser, quiet_libraries, run_script, say
from hi_diffusers.families.hidream.pipeline import HiDreamImagePipeline
from hi_diffusers.families.table import PRESETS
from hi_diffusers.pictures.metadata import write_atomically
from hi_diffusers.pictures.metrics import psnr, ssim
from hi_diffusers.runs.prompt_files import PromptFile
from training.checker import Checker
from training.evaluate import BUNDLED, held_out_prompts
from training.scenes import CPU_TIER

FIRST_SEED = 1_000  # prompts of the same list are drawn with seeds from 0 elsewhere
NUM_PROMPTS, NUM_DRAWBENCH, NUM_QUICK = 128, 64, 16
BATCH_SIZE = 16
NUM_OBSERVED = 8  # prompts that TeaCache's polynomial is fitted to
CLAIMS = ("background", "count", "colour", "shape", "position", "all")


def teacache(bench: "Bench", block: Block) -> Method:
    """TeaCache's rule, its polynomial refitted on the calibration's prompts."""

    def cache(budget: int) -> CacheConfig | None:
        mask = teacache_mask(bench.changes(block), budget)
        return mask and CacheConfig(target="residual", basis="reuse", max_order=0, schedule="mask", mask=mask)

    return Method("TeaCache, refitted: residual, reuse", cache)


@dataclass(frozen=True)
class Row:
    """What one method did at one budget; lists have one entry per picture.

    Attributes:
        block, guidance, method, budget, num_prompts: which row it is.
        settings: of the cache, resolved.
        psnr: dB of the float picture to the uncached one.
        ssim: the same.
        claims: claim -> share of the prompts whose claim holds; empty for prompts that the checker cannot read.
        seconds: of the denoising loop, a picture, in batches; no speed benchmark.
        evaluations: of the model, a picture; a guided step takes two.
        cache_bytes: the most that the cache kept, a picture.
    """

    block: str
    guidance: float
    method: str
    budget: int
    num_prompts: int
    settings: dict[str, Any]
    psnr: list[float]
    ssim: list[float]
    claims: dict[str, float]
    seconds: float
    evaluations: int
    cache_bytes: int

    @property
    def name(self) -> tuple[str, float, str, int, int]:
        """What tells rows apart."""
        return self.block, self.guidance, self.method, self.budget, self.num_prompts


class Bench:
    """Draws what is missing, and keeps every row and every uncached picture in a folder.

    Args:
        folder: kept between runs.
        num_prompts: pictures of a row.
        drawbench: the file of DrawBench's prompts, one a line; None: their blocks are left out.
    """

    def __init__(self, folder: Path, num_prompts: int, drawbench: Path | None = None):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.rows_path = folder / "rows.jsonl"
        self.prompts = {HELD_OUT: held_out_prompts(CPU_TIER, num_prompts)}
        if drawbench is not None:
            self.prompts[DRAWBENCH] = spread([line.prompt for line in PromptFile(drawbench)], NUM_DRAWBENCH)
        self.checker = Checker(CPU_TIER)
        self.pipes: dict[str, HiDreamImagePipeline] = {}
        self.observed: dict[float, tuple[np.ndarray, np.ndarray]] = {}

    def pipe(self, model: str) -> HiDreamImagePipeline:
        """The model, loaded once."""
        if model not in self.pipes:
            self.pipes[model] = load_pipeline(model, device="cpu")
        return self.pipes[model]

    def rows(self) -> list[Row]:
        """All rows drawn so far with these weights, but for those of calibrations that are no longer there."""
        if not self.rows_path.is_file():
            return []
        there = {one.reference for model in BUNDLED for one in self._calibrations(model)}
        rows = [Row(**json.loads(line)) for line in self.rows_path.read_text(encoding="utf-8").splitlines()]
        return [row for row in rows if row.settings.get("calibration") in (None, *there)]

    def guidance(self, block: Block) -> float:
        """The block's, or its preset's."""
        return PRESETS[block.model].guidance if block.guidance is None else block.guidance

    def row_name(self, block: Block, method: Method, budget: int) -> tuple[str, float, str, int, int]:
        """The name of a row, see `Row`."""
        return block.name, self.guidance(block), method.name, budget, len(self.prompts[block.prompts])

    def reference(self, block: Block) -> np.ndarray:
        """The uncached pictures, float32 [N,H,W,3]."""
        name = f"reference-{block.name}-{self.guidance(block):g}-{len(self.prompts[block.prompts])}.npy"
        path = self.folder / name
        if not path.is_file():
            pictures = [picture.pixels for picture in self._draw(block, block.options(), CacheConfig.off())]
            partial = path.with_suffix(".partial")
            with partial.open("wb") as file:
                np.save(file, np.stack(pictures))
            partial.replace(path)
        return np.load(path)

    def changes(self, block: Block) -> tuple[np.ndarray, np.ndarray]:
        """What TeaCache's rule is fitted to, observed on the calibration's prompts."""
        guidance = self.guidance(block)
        if guidance not in self.observed:
            preset = PRESETS[block.model]
            prompts = preset.calibration_prompts.read_text(encoding="utf-8").splitlines()[:NUM_OBSERVED]
            options = [SamplingOptions(one, seed=i, guidance=guidance) for i, one in enumerate(prompts)]
            resolved = [one.resolve(preset) for one in options]
            self.observed[guidance] = observed_changes(self.pipe(block.model), resolved)
        return self.observed[guidance]

    def measure(self, block: Block, method: Method, budget: int) -> Row | None:
        """Draw one row; None if the method cannot make that budget."""
        cache = method.cache(budget)
        if cache is None:
            return None
        options = block.options(**method.sampler(budget))
        resolved = options.resolve(PRESETS[block.model])
        try:
            if cache.schedule in ("interval", "cosine", "power") and not cache.is_off:
                planned_full_steps(cache, resolved.num_steps)
        except ValueError:
            return None
        if method.published is not None:
            return self._measure_published(block, method, budget)
        drawn = list(self._draw(block, options, cache))
        at_once = min(_batch_size(cache), len(drawn))
        return self._row(
            block,
            method,
            budget,
            [one.pixels for one in drawn],
            settings=drawn[0].metadata["cache"],
            seconds=round(float(np.mean([one.seconds.denoise for one in drawn])) / at_once, 4),
            evaluations=sum(record.evaluations for record in drawn[0].trace),
            cache_bytes=max(record.cache_bytes for record in drawn[0].trace) // at_once,
        )

    def complete(self, jobs: Sequence[tuple[Block, Method, int]]) -> None:
        """Draw the rows that are missing."""
        known = {row.name for row in self.rows()}
        for block, method, budget in tqdm(jobs, unit="row", disable=None):
            if self.row_name(block, method, budget) in known:
                continue
            row = self.measure(block, method, budget)
            if row is not None:
                with self.rows_path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({field.name: getattr(row, field.name) for field in fields(row)}) + "\n")

    def _measure_published(self, block: Block, method: Method, budget: int) -> Row:
        """As `measure`, for a cache that is no setting of ours."""
        assert method.published is not None
        pipe, started, pictures = self.pipe(block.model), time.perf_counter(), list[np.ndarray]()
        for batch in self._batches(block, block.options(), BATCH_SIZE):
            pictures += [*method.published.draw(pipe, [one.resolve(PRESETS[block.model]) for one in batch], budget)]
        return self._row(
            block,
            method,
            budget,
            pictures,
            settings={"published": method.name},
            seconds=round((time.perf_counter() - started) / len(pictures), 4),
            evaluations=budget * (2 if self.guidance(block) > 1 else 1),
            cache_bytes=0,
        )

    def _row(self, block: Block, method: Method, budget: int, pictures: Sequence[np.ndarray], **measured: Any) -> Row:
        """A row of these pictures; `measured` are its fields that the pictures do not tell."""
        pairs = list(zip(pictures, self.reference(block), strict=True))
        return Row(
            block=block.name,
            guidance=self.guidance(block),
            method=method.name,
            budget=budget,
            num_prompts=len(pictures),
            psnr=[round(psnr(one, other), 4) for one, other in pairs],
            ssim=[round(ssim(one, other), 6) for one, other in pairs],
            claims=self._claims(block, pictures),
            **measured,
        )

    def _claims(self, block: Block, pictures: Sequence[np.ndarray]) -> dict[str, float]:
        """Claim -> share of the pictures in which it holds; nothing for prompts that the checker cannot read."""
        if block.prompts == DRAWBENCH:
            return {}
        prompts = self.prompts[block.prompts]
        verdicts = [self.checker.check(one, prompt) for one, prompt in zip(pictures, prompts, strict=True)]
        return {name: _share([getattr(one, name) for one in verdicts]) for name in CLAIMS}

    def _calibrations(self, model: str) -> list[Calibration]:
        shelf = self.pipe(model).calibrations
        return shelf.all() if shelf else []

    def _draw(self, block: Block, options: SamplingOptions, cache: CacheConfig) -> Iterator[Any]:
        for batch in self._batches(block, options, _batch_size(cache)):
            yield from generate_batch(self.pipe(block.model), batch, cache)

    def _batches(self, block: Block, options: SamplingOptions, size: int) -> Iterator[list[SamplingOptions]]:
        settings, prompts = asdict(options), self.prompts[block.prompts]
        for start in range(0, len(prompts), size):
            yield [
                SamplingOptions(**(settings | {"prompt": prompt, "seed": FIRST_SEED + start + place}))
                for place, prompt in enumerate(prompts[start : start + size])
            ]


def _batch_size(cache: CacheConfig) -> int:
    return 1 if cache.schedule == "adaptive" else BATCH_SIZE  # which decides for one picture at a time


def spread(prompts: Sequence[str], count: int) -> list[str]:
    """`count` of the prompts, evenly spread over them."""
    return [prompts[place * len(prompts) // count] for place in range(count)]


def _share(verdicts: list[bool | None]) -> float:
    stated = [verdict for verdict in verdicts if verdict is not None]
    return round(sum(stated) / len(stated), 4) if stated else 1.0


def plan_jobs(args: argparse.Namespace, bench: Bench) -> list[tuple[Block, Method, int]]:
    """The rows asked for."""
    tables = [block for block in blocks() if block.prompts in bench.prompts]

    def rows(block: Block) -> list[Method]:
        found = methods(PRESETS[block.model].scheduler == "lcm")
        if block.prompts == DRAWBENCH:
            return [method for method in found if outside(method)]
        return [*found, teacache(bench, block)] if block.name == "unipc" else found

    if args.screen:
        return [(block, method, k) for block in tables[:1] for method in screened() for k in FEW_BUDGETS]
    wanted = [(block, FEW_BUDGETS) for block in tables[:1]] if args.quick else [(one, one.budgets) for one in tables]
    return [
        (block, method, k)
        for block, budgets in wanted
        for method in rows(block)
        for k in budgets
        if k <= method.largest
    ]


def run(args: argparse.Namespace) -> None:
    """Draw what is missing and write the report."""
    quiet_libraries()
    num_prompts = NUM_QUICK if args.quick or args.screen else NUM_PROMPTS
    kind = "screen" if args.screen else "quick" if args.quick else "full"
    bench = Bench(args.folder, num_prompts, args.drawbench)
    _claim(bench)
    started = time.monotonic()
    jobs = plan_jobs(args, bench)
    bench.complete(jobs)
    say(f"{len(jobs)} rows, {time.monotonic() - started:.0f} s in this run")
    wanted = {bench.row_name(*job) for job in jobs}
    rows = [row for row in bench.rows() if row.name in wanted]
    for path in write_report(rows, kind, bench.pipe("nano").identity.fingerprint, args.output, args.plot):
        say(f"written: {path}")


def _claim(bench: Bench) -> None:
    """Rows of other weights are deleted: they would be compared with these."""
    mark = bench.folder / "weights.txt"
    fingerprint = bench.pipe("nano").identity.fingerprint
    if mark.is_file() and mark.read_text(encoding="utf-8") != fingerprint:
        for path in [bench.rows_path, *bench.folder.glob("reference-*.npy")]:
            path.unlink(missing_ok=True)
        say("the rows drawn before were other weights' and are deleted: they are drawn again")
    write_atomically(mark, fingerprint.encode())


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = Parser(prog="python -m benchmarks.quality", description=(__doc__ or "").splitlines()[0])
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--quick", action="store_true", help="16 prompts, 13 and 8 full steps, the preset's guidance")
    which.add_argument("--screen", action="store_true", help="every target, basis and schedule on 16 prompts")
    parser.add_argument(
        "--folder",
        type=Path,
        default=Path("outputs/quality"),
        help="keeps rows between runs (default: %(default)s)",
    )
    parser.add_argument(
        "--drawbench", type=Path, help="DrawBench's prompts, one a line (default: blocks of them are left out)"
    )
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results (default: %(default)s)")
    parser.add_argument("--plot", type=Path, help="PNG file for the Pareto plot; needs matplotlib (default: none)")
    return run_script(run, parser, argv)


if __name__ == "__main__":
    raise SystemExit(main())
