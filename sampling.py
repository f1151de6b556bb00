"""A prompt file, a folder of pictures: `python sampling.py --prompt_file prompts.txt --output_dir out`.

The same command goes on where a run was stopped, by whatever. Pictures are drawn in units of one batch, a fixed range
of pictures that follows from the configuration alone: a resumed run, or one on several machines, draws the same.
"""

import argparse
import signal
import time
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from hi_diffusers.console import Parser, Refusal, name_flag, quiet_libraries, refuse_errors, run_script, say
from hi_diffusers.metadata import write_atomically
from hi_diffusers.options import add_arguments
from hi_diffusers.runs.manifest import Manifest, claim_folder, finished, sweep
from hi_diffusers.runs.plan import SUFFIXES, Plan, configuration, make_job, make_plan
from hi_diffusers.runs.prompt_files import PromptLine
from hi_diffusers.runs.units import Task
from hi_diffusers.safety import DEFAULT_CHECKER

if TYPE_CHECKING:
    from hi_diffusers.runs.job import Job
    from hi_diffusers.runs.worker import Drawn

DESCRIPTION = "Draw every prompt of a file with HiDream-I1 (or the bundled small model), most steps forecast."
UNITS_PER_CHUNK = 8  # encoded together before they are drawn
MAX_LOOKED_AT = 10_000  # prompts, for words that the bundled model does not know


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Exit codes: 0 done, 2 refused before weights are read, 1 failed, 130 interrupted."""
    return run_script(run, build_parser(), argv)


def build_parser() -> Parser:
    """All flags."""
    parser = Parser(prog="sampling.py", description=DESCRIPTION)
    files = parser.add_argument_group("files")
    files.add_argument(
        "--prompt_file", type=Path, required=True, help=".txt, .csv, .tsv or .jsonl, see docs/sampling.md"
    )
    files.add_argument("--raw_lines", action="store_true", help="take the lines of a .txt as they are, quotes and all")
    files.add_argument("--output_dir", type=Path, help="folder of the run; given again, the run goes on")
    files.add_argument("--format", choices=tuple(SUFFIXES), default="png", help="of the pictures (default: png)")
    files.add_argument("--add_sampling_metadata", action="store_true", help="pictures carry prompt and all settings")
    what = parser.add_argument_group("run")
    what.add_argument("--num_images_per_prompt", type=int, default=1, help="pictures of each prompt (default: 1)")
    what.add_argument("--batch_size", type=int, default=1, help="pictures drawn at once (default: 1)")
    what.add_argument("--limit", type=int, help="draw the first so many prompts only")
    what.add_argument("--indices", metavar="0-49,180", help="draw these prompts only")
    what.add_argument(
        "--verify", action="store_true", help="check the hashes of finished pictures, not the sizes alone"
    )
    what.add_argument("--use_nsfw_filter", action="store_true", help="withhold pictures that --safety_checker flags")
    what.add_argument(
        "--safety_checker",
        metavar="MODEL",
        help=f"image classifier of transformers, by id or folder, with a label nsfw (default: {DEFAULT_CHECKER})",
    )
    what.add_argument("--safety_threshold", type=float, help="of its probability, above 0 to 1 (default: 0.5)")
    embeds = parser.add_argument_group("prompt embeddings")
    embeds.add_argument("--embeds", type=Path, metavar="FOLDER", help="draw from what --encode_only put here")
    embeds.add_argument("--encode_only", action="store_true", help="encode all prompts into --embeds and draw nothing")
    embeds.add_argument(
        "--embeds_cache_gb", type=float, default=20.0, help="GiB of embeddings that are kept (default: %(default)g)"
    )
    scale = parser.add_argument_group("scale")
    scale.add_argument(
        "--shard", metavar="I/N", help="draw every N-th unit from the I-th on (default: torchrun's, SLURM's)"
    )
    scale.add_argument("--threads", type=int, help="of the CPU, for a worker (default: the run's first command's)")
    scale.add_argument("--engine", choices=("local", "ray"), default="local", help="what draws (default: local)")
    scale.add_argument("--ray_address", help="of a running cluster (default: one is started here)")
    scale.add_argument("--ray_workers", type=int, help="actors (default: one for each GPU)")
    add_arguments(parser)
    parser.set_defaults(seed=0)
    return parser


def run(args: argparse.Namespace) -> None:
    """Do what the flags say.

    Raises:
        Refusal: before weights are read.
        KeyboardInterrupt: if it was asked to stop.
    """
    quiet_libraries()
    try:
        plan = make_plan(args)
        job = make_job(plan)
    except (ValueError, OSError) as error:
        raise Refusal(name_flag(str(error), args)) from error
    for notice in plan.notices:
        say(notice)
    if args.encode_only:
        encode_all(plan, job)
        return
    refuse_errors(claim_folder, args.output_dir, configuration(plan, job))
    with refuse_errors(Manifest, args.output_dir, plan.shard) as manifest:
        sweep(args.output_dir, plan.numbering, plan.shard)
        done = refuse_errors(finished, args.output_dir, plan.numbering, verify=args.verify)
        due = plan.asked & ~done
        if due.any():
            draw_due(plan, job, due, manifest)
    print(f"{int((done | due).sum())} of {plan.numbering.num_pictures} pictures are in {args.output_dir}")


def draw_due(plan: Plan, job: "Job", due: np.ndarray, manifest: Manifest) -> None:
    """Draw what is due and write it, unit by unit."""
    num_due, num_drawn, started = int(due.sum()), 0, time.perf_counter()
    embeds_notice(plan, job, due)
    units = plan.units(due)
    with Stopping() as stopping, tqdm(total=num_due, unit="picture", dynamic_ncols=True) as bar:
        engine = draw_here(job, units) if plan.args.engine == "local" else draw_with_ray(plan, job, units)
        for unit in engine:
            keep(plan.args.output_dir, unit, manifest)
            num_drawn += len(unit)
            bar.update(len(unit))
            if stopping.asked and num_drawn < num_due:
                say(f"stopped with {num_due - num_drawn} pictures to go; the same command goes on")
                raise KeyboardInterrupt
    seconds = time.perf_counter() - started
    print(f"drawn: {num_drawn} pictures in {seconds:.1f} s, {num_drawn / seconds:.2f} a second, loading included")


def draw_here(job: "Job", units: Iterable[list[Task]]) -> Iterator[list["Drawn"]]:
    """In this process: a chunk of units is encoded, then drawn."""
    from hi_diffusers.runs.worker import Worker

    worker = Worker(job)
    units = iter(units)
    while chunk := list(islice(units, UNITS_PER_CHUNK)):
        worker.encoder.fill(chunk)
        yield from map(worker.draw, chunk)


def draw_with_ray(plan: Plan, job: "Job", units: Iterable[list[Task]]) -> Iterator[list["Drawn"]]:
    """On a cluster."""
    from hi_diffusers.runs.ray_engine import draw_on_cluster

    return draw_on_cluster(job, units, plan.args.ray_address, plan.args.ray_workers)


def keep(folder: Path, unit: Sequence["Drawn"], manifest: Manifest) -> None:
    """Write a unit's pictures, then their lines."""
    for one in unit:
        if one.data:
            path = folder / one.line["file"]
            path.parent.mkdir(exist_ok=True)
            write_atomically(path, one.data)
    manifest.append(one.line for one in unit)


class Stopping:
    """Ctrl-C and SIGTERM ask to stop after the running unit; once more stops at once."""

    def __init__(self) -> None:
        self.asked = False
        self.before: dict[int, Any] = {}

    def __enter__(self) -> "Stopping":
        self.before = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _ask(self, *_: object) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        say("finishing the running batch; once more stops at once")


def embeds_notice(plan: Plan, job: "Job", due: np.ndarray) -> None:
    """Say what the embeddings will take, and how many prompts the bundled model does not understand."""
    from hi_diffusers.embeds import entry_bytes
    from hi_diffusers.loading import model_folder
    from hi_diffusers.pipelines.prompts import unknown_words

    num_prompts = int(due.reshape(-1, plan.numbering.num_images).any(1).sum())
    if job.encodes:
        folder = model_folder(plan.preset, plan.args.model_path, "encoders")
        size = entry_bytes(folder, job.dtype, plan.base.resolve(plan.preset).max_sequence_length) / 1e6
        kept = "" if job.embeds_cache_gb is None else f" ({job.embeds_cache_gb:g} GiB at most)"
        whole = f"{size:.3g} MB each, {num_prompts * size / 1e3:.3g} GB"
        say(f"embeddings of {num_prompts} prompts, {whole}, in {job.embeds}{kept}")
    if not plan.preset.is_bundled or not job.encodes:
        return
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer_3")
    looked_at = list(islice(_due_lines(plan, due), MAX_LOOKED_AT))
    num_unknown = sum(bool(unknown_words(tokenizer, line.prompt)) for line in looked_at)
    if num_unknown:
        those = f"the first {MAX_LOOKED_AT}" if num_prompts > MAX_LOOKED_AT else str(num_prompts)
        say(
            f"{num_unknown} of {those} prompts use words that"
            f" {plan.preset.name} does not know: it knows a little world of shapes, such as {plan.preset.example!r};"
            " --model_type full|dev|fast draws with HiDream-I1"
        )


def _due_lines(plan: Plan, due: np.ndarray) -> Iterator[PromptLine]:
    wanted = due.reshape(-1, plan.numbering.num_images).any(1)
    return (line for line in plan.prompts if wanted[line.index])


def encode_all(plan: Plan, job: "Job") -> None:
    """Encode the prompts that are asked for."""
    from hi_diffusers.runs.encoder import Encoder

    embeds_notice(plan, job, plan.asked)
    encoder = Encoder(job)
    with tqdm(total=int(plan.asked.sum()), unit="picture", desc="encoding") as bar:
        for unit in plan.units(plan.asked):
            encoder.fill([unit])
            bar.update(sum(task.wanted for task in unit))
    print(job.embeds.parent)


if __name__ == "__main__":
    raise SystemExit(main())
