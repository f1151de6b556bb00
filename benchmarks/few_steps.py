"""What the default cache is worth in drawings of few steps, beside simply drawing fewer steps.

    python -m benchmarks.few_steps

Every drawing of N steps is compared with the same seed's uncached one of N steps: cached with K full steps by the rule
that is taken where no calibration fits, and uncached with K steps only. What is drawn is kept in a folder, so that a
stopped run goes on.
"""

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from benchmarks.quality_report import paired_difference
from benchmarks.report import RESULTS, write_json
from cache_functions import CacheConfig
from hi_diffusers import SamplingOptions, load_pipeline
from hi_diffusers.console import Parser, quiet_libraries, run_script
from hi_diffusers.engine.generation import draw_batch
from hi_diffusers.families.family import Model
from hi_diffusers.pictures.metrics import Score, psnr
from hi_diffusers.request.drawing import decide
from training.evaluate import held_out_prompts
from training.scenes import CPU_TIER

NUM_STEPS = (4, 6, 8, 10, 12, 16, 24, 36)
FRACTIONS = (4, 3, 2)  # one full step in so many
SAMPLERS = (("unipc", 2.0), ("lcm", 0.0), ("unipc", 0.0), ("unipc", 4.0))
FIRST_SEED = 5_000
BATCH_SIZE = 16


@dataclass(frozen=True)
class Row:
    """One way to draw, against the uncached drawing of as many steps.

    Attributes:
        full_steps: steps that are computed.
        cached: with the default's rule; else so many steps were drawn and no more.
        psnr: of each prompt, dB, of float pictures.
    """

    scheduler: str
    guidance: float
    num_steps: int
    full_steps: int
    cached: bool
    psnr: tuple[float, ...]


class Pictures:
    """The pictures of a sampler, each drawn once.

    Args:
        model: what draws.
        prompts: one for each picture.
        scheduler, guidance: the sampler.
    """

    def __init__(self, model: Model, prompts: Sequence[str], scheduler: str, guidance: float):
        self.model, self.prompts, self.scheduler, self.guidance = model, prompts, scheduler, guidance
        self._uncached: dict[int, list[np.ndarray]] = {}

    def uncached(self, num_steps: int) -> list[np.ndarray]:
        """With every step computed."""
        if num_steps not in self._uncached:
            self._uncached[num_steps] = self.draw(num_steps, CacheConfig.off())
        return self._uncached[num_steps]

    def draw(self, num_steps: int, cache: CacheConfig) -> list[np.ndarray]:
        """All prompts, without a calibration."""
        assert self.model.preset is not None
        settings = {"num_steps": num_steps, "scheduler": self.scheduler, "guidance": self.guidance}
        drawings = [
            decide(self.model.preset, SamplingOptions(prompt, seed=FIRST_SEED + number, **settings), cache)
            for number, prompt in enumerate(self.prompts)
        ]
        batches = [drawings[start : start + BATCH_SIZE] for start in range(0, len(drawings), BATCH_SIZE)]
        return [picture.pixels for batch in batches for picture in draw_batch(self.model, batch)]


def budgets(num_steps: int) -> list[int]:
    """Numbers of full steps that are tried, fewer than all."""
    found = {math.ceil(num_steps / fraction) for fraction in FRACTIONS}
    return sorted(budget for budget in found if budget < num_steps)


def measure(pictures: Pictures, num_steps: int) -> list[Row]:
    """All ways to draw so many steps."""
    rows = []
    for budget in budgets(num_steps):
        drawn = ((True, pictures.draw(num_steps, CacheConfig.best(budget))), (False, pictures.uncached(budget)))
        for cached, found in drawn:
            values = tuple(psnr(a, b) for a, b in zip(found, pictures.uncached(num_steps), strict=True))
            rows.append(Row(pictures.scheduler, pictures.guidance, num_steps, budget, cached, values))
    return rows


def summaries(rows: Sequence[Row]) -> list[dict[str, object]]:
    """One line for each budget: both ways, and the cached one minus the other, paired by prompt."""
    found = []
    for cached, fewer in zip(rows[::2], rows[1::2], strict=True):
        scores = {name: Score.of(one.psnr) for name, one in (("cached", cached), ("fewer_steps", fewer))}
        of_all = {name: {"median": round(one.median, 2), "p10": round(one.p10, 2)} for name, one in scores.items()}
        row = {name: value for name, value in asdict(cached).items() if name not in ("cached", "psnr")}
        found.append(row | of_all | {"difference": paired_difference(cached, fewer)})
    return found


def run(args: argparse.Namespace) -> None:
    """Draw what is missing, and write the result file."""
    quiet_libraries()
    args.folder.mkdir(parents=True, exist_ok=True)
    prompts = held_out_prompts(CPU_TIER, args.num_prompts)
    rows: list[Row] = []
    jobs = [(*sampler, num_steps) for sampler in SAMPLERS for num_steps in NUM_STEPS]
    model: Model | None = None
    pictures: Pictures | None = None
    for scheduler, guidance, num_steps in tqdm(jobs, unit="block"):
        path = args.folder / f"{scheduler}-{guidance:g}-{num_steps}-{args.num_prompts}.json"
        if not path.is_file():
            model = model or load_pipeline("nano", device="cpu")
            if pictures is None or (pictures.scheduler, pictures.guidance) != (scheduler, guidance):
                pictures = Pictures(model, prompts, scheduler, guidance)
            content = [asdict(row) for row in measure(pictures, num_steps)]
            path.with_suffix(".partial").write_text(json.dumps(content), encoding="utf-8")
            path.with_suffix(".partial").replace(path)
        rows += [Row(**row) for row in json.loads(path.read_text(encoding="utf-8"))]
    what = "PSNR in dB of float pictures to the uncached picture of as many steps; no calibration; paired by prompt"
    content = {"what": what, "num_prompts": args.num_prompts, "first_seed": FIRST_SEED, "rows": summaries(rows)}
    print(write_json(args.output, "few_steps", torch.device("cpu"), content))


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = Parser(prog="python -m benchmarks.few_steps", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--num_prompts", type=int, default=128, help="default: %(default)s")
    parser.add_argument(
        "--folder", type=Path, default=Path("outputs/few_steps"), help="of what is drawn (default: %(default)s)"
    )
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the result file (default: %(default)s)")
    return run_script(run, parser, argv)


if __name__ == "__main__":
    raise SystemExit(main())
