"""Draw a prompt file into a folder: `python sampling.py --prompt_file prompts.txt --output_dir out`.

The same command resumes a run, whatever stopped it. Pictures are drawn in units of one batch, a fixed range
of pictures that follows from the configuration alone: a resumed run, or one on several machines, draws the same.
"""

import argparse
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from hi_diffusers import __version__
from hi_diffusers.commands.stopping import Stopping
from hi_diffusers.commands.together import mute_followers, share, work_together
from hi_diffusers.console import (
    Parser,
    Refusal,
    name_flag,
    quiet_libraries,
    refuse_errors,
    run_script,
    say,
    say_loading,
)
from hi_diffusers.denoising.ranks import Ranks
from hi_diffusers.engine.session import Session
from hi_diffusers.families.table import find_family
from hi_diffusers.flags import (
    add_arguments,
    add_pipeline_arguments,
    add_rank_arguments,
    add_safety_arguments,
    check_pipeline_flags,
)
from hi_diffusers.memory.sizes import embedded_numbers
from hi_diffusers.pictures.metadata import write_atomically
from hi_diffusers.pictures.safety import SafetyChecker
from hi_diffusers.preset import unknown_words
from hi_diffusers.request.placement import TORCH_DTYPES
from hi_diffusers.runs.decisions import Decisions
from hi_diffusers.runs.manifest import Manifest, claim_folder, finished, manifest_name, sweep
from hi_diffusers.runs.plan import (
    DEFAULT_EMBEDS_GB,
    GB,
    Plan,
    check_embeds,
    configuration,
    demand,
    fit_session,
    make_job,
    make_plan,
    open_session,
)
from hi_diffusers.runs.stock_plan import StockDecisions, StockJob, make_stock_job, make_stock_plan, stock_configuration
from hi_diffusers.runs.tally import Tally
from hi_diffusers.runs.units import Shard, Task

if TYPE_CHECKING:
    from hi_diffusers.runs.job import Job
    from hi_diffusers.runs.worker import Drawn, UnitWorker

DESCRIPTION = "Draw every prompt of a file with HiDream-I1 (or the bundled small model), most steps forecast."
UNITS_PER_CHUNK = 8  # units whose prompts are encoded together, before they are drawn
MAX_LOOKED_AT = 10_000  # prompts that are searched for words unknown to the bundled model


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Exit codes: 0 done, 2 refused before weights are read, 1 failed, 130 interrupted."""
    return run_script(run, build_parser(), argv)


def build_parser() -> Parser:
    """The command line's parser."""
    parser = Parser(prog="sampling.py", description=DESCRIPTION, version=__version__)
    files = parser.add_argument_group("files")
    files.add_argument(
        "--prompt_file", type=Path, required=True, help=".txt, .csv, .tsv or .jsonl, see docs/sampling.md"
    )
    files.add_argument("--raw_lines", action="store_true", help="keep the lines of a .txt unchanged, including quotes")
    files.add_argument("--output_dir", type=Path, help="folder of the run; the same folder resumes it")
    files.add_argument(
        "--format",
        choices=("png", "jpg", "webp", "mp4"),
        help="format of the files (default: png; of videos mp4, or webp where imageio-ffmpeg is absent)",
    )
    files.add_argument(
        "--add_sampling_metadata", action="store_true", help="write the prompt and all settings into the pictures"
    )
    what = parser.add_argument_group("run")
    what.add_argument("--num_images_per_prompt", type=int, default=1, help="pictures per prompt (default: 1)")
    what.add_argument("--batch_size", type=int, default=1, help="pictures per batch (default: 1)")
    what.add_argument("--limit", type=int, help="draw only this many prompts, from the first on")
    what.add_argument("--indices", metavar="0-49,180", help="draw these prompts only")
    what.add_argument(
        "--verify", action="store_true", help="check the hashes of finished pictures, not only their sizes"
    )
    add_safety_arguments(what)
    embeds = parser.add_argument_group("prompt embeddings")
    embeds.add_argument(
        "--embeds",
        type=Path,
        metavar="FOLDER",
        help="draw from the embeddings in this folder, written by --encode_only",
    )
    embeds.add_argument(
        "--encode_only", action="store_true", help="only encode the prompts, into the folder of --embeds"
    )
    embeds.add_argument(
        "--embeds_cache_gb", type=float, help=f"GB of embeddings to keep on disk (default: {DEFAULT_EMBEDS_GB:g})"
    )
    scale = parser.add_argument_group("scale")
    scale.add_argument(
        "--shard",
        metavar="I/N",
        help="draw every N-th batch from the I-th on (default: from torchrun's or SLURM's variables)",
    )
    scale.add_argument("--threads", type=int, help="CPU threads per worker (default: those of the run's first command)")
    scale.add_argument(
        "--engine", choices=("local", "ray"), default="local", help="what distributes the work (default: local)"
    )
    scale.add_argument("--ray_address", help="address of a running Ray cluster (default: start one here)")
    scale.add_argument("--ray_workers", type=int, help="number of Ray actors (default: one per GPU)")
    add_arguments(parser)
    add_rank_arguments(parser)
    add_pipeline_arguments(parser)
    parser.set_defaults(seed=0)
    return parser


def run(args: argparse.Namespace) -> None:
    """Do what the flags say.

    Raises:
        Refusal: if the request cannot be carried out, before weights are read.
        KeyboardInterrupt: after Ctrl-C or SIGTERM.
    """
    try:
        mute_followers(args)
        check_pipeline_flags(args)
    except ValueError as error:
        raise Refusal(name_flag(str(error), args)) from error
    work_together(args, args.device, partial(run_here, args))


def run_here(args: argparse.Namespace, ranks: Ranks | None, device: str) -> None:
    """Run in this process, the only one or the first of those that draw together.

    Args:
        device: this process's device.

    Raises:
        Refusal, KeyboardInterrupt: as in `run`.
    """
    try:
        if args.pipeline is not None:
            stock = prepare_stock(args)
        else:
            opened, notices = prepare(args, ranks, device)
    except (ValueError, OSError) as error:
        raise Refusal(name_flag(str(error), args)) from error
    if args.pipeline is not None:
        draw_all(stock.plan, stock)
        return
    for notice in notices:
        say(notice)
    with opened.session.explained(demand(opened.plan, opened.session)):
        if args.encode_only:
            encode_all(opened)
        else:
            draw_all(opened.plan, opened)


def prepare(args: argparse.Namespace, ranks: Ranks | None, device: str) -> tuple["Opened", list[str]]:
    """Check a run and claim its folder; returns it and sentences about choices made for the user."""
    args.format = args.format or "png"
    if args.format == "mp4":
        raise ValueError("format must be png, jpg or webp for pictures, got mp4")
    plan = make_plan(args)
    check_safety(plan)
    session = open_session(plan)
    share(session, ranks, device)
    notices = [*fit_session(plan, session), *plan.notices]  # before any file is looked for
    job = make_job(plan, session)
    check_embeds(plan, job)
    if not args.encode_only:
        claim_folder(args.output_dir, configuration(plan, job, session))
    return Opened(plan, job, session), notices


def prepare_stock(args: argparse.Namespace) -> "OpenedStock":
    """Check a run of a pipeline of diffusers and claim its folder."""
    quiet_libraries()  # a pipeline's class tells what it takes, and importing it is not silent
    plan = make_stock_plan(args)
    check_safety(plan)
    job = make_stock_job(plan)
    claim_folder(args.output_dir, stock_configuration(plan, job))
    for notice in plan.notices:
        say(notice)
    return OpenedStock(plan, job)


def check_safety(plan: Plan[Any]) -> None:
    """Refuse a broken safety checker before the folder is claimed."""
    if plan.safety is not None:
        quiet_libraries()
        SafetyChecker(plan.safety)


@dataclass(frozen=True)
class Opened:
    """A checked run: its plan, the job for the workers, and the model."""

    plan: Plan[Decisions]
    job: "Job"
    session: Session

    def begin(self, due: np.ndarray) -> None:
        """Say what the run takes, and encode its prompts where that comes first."""
        say_what_embeds_take(self, due)
        say_what_is_unknown(self.plan, due)
        say_loading(self.job.preset.name)
        if self.job.frees_encoders:
            fill_embeds(self, due)

    def worker(self) -> "UnitWorker[Any, Any]":
        """Load the model in this process."""
        from hi_diffusers.runs.worker import Worker

        return Worker(self.job, self.session, self.plan.decisions)


@dataclass(frozen=True)
class OpenedStock:
    """A checked run of a pipeline of diffusers."""

    plan: Plan[StockDecisions]
    job: StockJob

    def begin(self, due: np.ndarray) -> None:
        """Say what is loaded."""
        say_loading(self.job.source.where)

    def worker(self) -> "UnitWorker[Any, Any]":
        """Load the pipeline in this process."""
        from hi_diffusers.runs.stock_worker import StockWorker

        return StockWorker(self.job)


def draw_all(plan: Plan[Any], opened: Opened | OpenedStock) -> None:
    """Draw the pictures that are asked for and not finished.

    Raises:
        Refusal: if another run draws them, or the manifest cannot be read.
    """
    folder, verify = plan.args.output_dir, plan.args.verify
    with refuse_errors(Manifest, folder, plan.shard) as manifest:
        sweep(folder, plan.numbering, plan.shard)
        due = plan.asked & ~refuse_errors(finished, folder, plan.numbering, verify=verify)
        if due.any():
            draw_due(opened, due, manifest)
    num_finished = int(finished(folder, plan.numbering).sum())
    print(f"{num_finished} of {plan.numbering.num_pictures} pictures are finished in {folder}")
    if plan.shard.count > 1 and num_finished < plan.numbering.num_pictures:
        shards = (Shard(index, plan.shard.count) for index in range(plan.shard.count))
        absent = [str(one.index) for one in shards if not (folder / manifest_name(one)).is_file()]
        others = f"; nothing was drawn yet by shards {', '.join(absent)}" if absent else ""
        say(f"shard {plan.shard.index} of {plan.shard.count} is done, the other shards' pictures are not{others}")


def draw_due(opened: Opened | OpenedStock, due: np.ndarray, manifest: Manifest) -> None:
    """Draw the due pictures and write them, unit by unit."""
    plan = opened.plan
    num_due, tally, started = int(due.sum()), Tally(), time.perf_counter()
    opened.begin(due)
    units = plan.units(due)
    drawn = draw_here(opened, units) if plan.args.engine == "local" else draw_with_ray(opened, units)
    with Stopping() as stopping, tqdm(total=num_due, unit="picture", dynamic_ncols=True) as bar:
        for unit in drawn:
            keep(plan.args.output_dir, unit, manifest)
            tally.add(unit)
            bar.update(len(unit))
            if stopping.asked and tally.num_drawn < num_due:
                say(f"stopped with {num_due - tally.num_drawn} pictures left; the same command resumes the run")
                raise KeyboardInterrupt
    assert tally.num_drawn == num_due, f"{num_due} pictures were due and {tally.num_drawn} came back"
    seconds = time.perf_counter() - started
    rate = tally.num_drawn / seconds
    print(f"drawn: {num_due} pictures in {seconds:.1f} s, {rate:.2f} per second, loading included")
    if tally.first_cut is not None and isinstance(opened, Opened):
        say(tally.cut_notice(opened.job.max_sequence_length))
    if tally.num_withheld:
        print(f"withheld: {tally.num_withheld} of them")


def draw_here(opened: Opened | OpenedStock, units: Iterable[list[Task]]) -> Iterator[list["Drawn"]]:
    """Draw units in this process; the model is loaded before this returns."""
    worker = opened.worker()
    for notice in worker.notices:
        say(notice)
    return draw_chunks(worker, units)


def draw_chunks(worker: "UnitWorker[Any, Any]", units: Iterable[list[Task]]) -> Iterator[list["Drawn"]]:
    """Prepare and draw units, chunk by chunk."""
    units = iter(units)
    while chunk := list(islice(units, UNITS_PER_CHUNK)):
        worker.prepare(chunk)
        for unit in chunk:
            yield worker.draw(unit)


def draw_with_ray(opened: Opened | OpenedStock, units: Iterable[list[Task]]) -> Iterator[list["Drawn"]]:
    """Draw units on a Ray cluster."""
    from hi_diffusers.runs.ray_engine import draw_on_cluster
    from hi_diffusers.runs.stock_worker import StockWorker
    from hi_diffusers.runs.worker import Worker

    args = opened.plan.args
    kind = Worker if isinstance(opened, Opened) else StockWorker
    return draw_on_cluster(opened.job, kind, units, args.ray_address, args.ray_workers)


def keep(folder: Path, unit: Sequence["Drawn"], manifest: Manifest) -> None:
    """Write a unit's pictures, then their manifest lines."""
    for one in unit:
        if one.data:
            path = folder / one.line["file"]
            if path.parent.is_symlink() and path.parent != folder:
                raise ValueError(f"{path.parent} is a symbolic link: pictures lie in the run's own folders")
            path.parent.mkdir(exist_ok=True)
            for name, data in one.beside.items():
                write_atomically(path.with_name(name), data)
            write_atomically(path, one.data)
    manifest.append(one.line for one in unit)


def say_what_embeds_take(opened: Opened, due: np.ndarray) -> None:
    """Say how large the prompts' embeddings will be."""
    plan, job = opened.plan, opened.job
    if not job.encodes:
        return
    num_prompts = int(_of_prompts(plan, due).sum())
    shapes = find_family(job.preset).shapes(job.preset, job.source)
    numbers = embedded_numbers(shapes, job.max_sequence_length)
    size = numbers * TORCH_DTYPES[job.placement.dtype].itemsize / 1e6
    limit = "" if job.embeds_limit is None else f" ({job.embeds_limit / GB:g} GB at most)"
    whole = f"{size:.3g} MB each, {num_prompts * size / 1e3:.3g} GB"
    say(f"embeddings of {num_prompts} prompts, {whole}, in {job.embeds}{limit}")


def say_what_is_unknown(plan: Plan[Decisions], due: np.ndarray) -> None:
    """Say how many prompts use words that the model was not taught."""
    preset = plan.decisions.preset
    if preset.vocabulary is None:
        return
    wanted = _of_prompts(plan, due)
    looked_at = islice((line for line in plan.prompts if wanted[line.index]), MAX_LOOKED_AT)
    num_unknown = sum(bool(unknown_words(line.prompt, preset.vocabulary)) for line in looked_at)
    if num_unknown:
        those = f"the first {MAX_LOOKED_AT}" if wanted.sum() > MAX_LOOKED_AT else str(wanted.sum())
        say(
            f"{num_unknown} of {those} prompts use words that {preset.name} does not know: it was taught"
            f" {preset.world}, such as {preset.example!r}; --model_type full|dev|fast draws with HiDream-I1"
        )


def _of_prompts(plan: Plan[Any], pictures: np.ndarray) -> np.ndarray:
    """Which prompts have one of these pictures, [num_prompts], bool."""
    return np.logical_or.reduce(pictures.reshape(-1, plan.numbering.num_images), axis=1)


def encode_all(opened: Opened) -> None:
    """Encode the prompts that are asked for."""
    say_what_embeds_take(opened, opened.plan.asked)
    say_loading(opened.job.preset.name)
    fill_embeds(opened, opened.plan.asked)
    print(opened.job.embeds.parent)


def fill_embeds(opened: Opened, pictures: np.ndarray) -> None:
    """Write the embeddings of these pictures' prompts to the disk."""
    from hi_diffusers.runs.encoder import Encoder

    encoder = Encoder(opened.job, opened.session, opened.plan.decisions)
    with tqdm(total=int(pictures.sum()), unit="picture", desc="encoding") as bar:
        for unit in opened.plan.units(pictures):
            encoder.fill([unit])
            bar.update(sum(task.wanted for task in unit))
