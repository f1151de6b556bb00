"""A run's pictures: their numbers, seeds and file names, and the units of work.

Picture p of a run is image p % num_images of prompt p // num_images. A unit is a fixed range of pictures, drawn as one
batch. Its content follows from the run's configuration alone, so that a resumed run, or one on other machines, draws
the same bits. The pictures that a command asks for are an array of bools over the run's pictures.
"""

import hashlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from hi_diffusers.request.options import MAX_SEED
from hi_diffusers.runs.prompt_files import PromptLine

FOLDERS_FROM = 10_000  # runs of this many pictures or more are split into folders of a thousand
PER_FOLDER = 1_000
MAX_DIGITS = 12


@dataclass(frozen=True)
class Task:
    """One picture to draw.

    Attributes:
        number: number of the picture in the run.
        line: line of its prompt.
        image: number among the prompt's pictures, from 0.
        seed: seed of its noise.
        file: file name below the run's folder.
        wanted: whether it is written; a picture that is not wanted is drawn only to keep the batch the same.
    """

    number: int
    line: PromptLine
    image: int
    seed: int
    file: str
    wanted: bool = True


@dataclass(frozen=True)
class Shard:
    """One of `count` workers of a run, which share its units; `index` from 0."""

    index: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        if not (self.count >= 1 and 0 <= self.index < self.count):
            raise ValueError(f"shard must be I/N with I from 0 to N - 1, got {self.index}/{self.count}")


@dataclass(frozen=True)
class Numbering:
    """How a run's pictures are numbered, named and put into units.

    Attributes:
        num_prompts: number of prompts in the prompt file.
        num_images: pictures per prompt.
        base_seed: seed of the run.
        suffix: suffix of the files, such as ".png".
        unit_size: pictures per unit; the last unit may be smaller.
    """

    num_prompts: int
    num_images: int
    base_seed: int
    suffix: str
    unit_size: int

    @property
    def num_pictures(self) -> int:
        """Number of pictures in the whole run."""
        return self.num_prompts * self.num_images

    def seed(self, line: PromptLine, image: int) -> int:
        """Seed of a picture's noise, 0 to 2^63 - 1, from base seed, prompt index and image index alone."""
        own = line.overrides.get("seed")
        if own is not None:
            return (own + image) % (MAX_SEED + 1)
        text = f"{self.base_seed}/{line.index}/{image}"
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") & MAX_SEED

    def file_name(self, number: int) -> str:
        """`00007_00.png`, with more digits for larger runs; in folders `00000/` and so on from 10 000 pictures on."""
        index, image = divmod(number, self.num_images)
        width, narrow = max(5, len(str(self.num_prompts - 1))), max(2, len(str(self.num_images - 1)))
        name = f"{index:0{width}d}_{image:0{narrow}d}{self.suffix}"
        return name if self.num_pictures < FOLDERS_FROM else f"{number // PER_FOLDER:05d}/{name}"

    def of_shard(self, shard: Shard) -> np.ndarray:
        """Which pictures the shard draws, those of every `count`-th unit: [num_pictures], bool."""
        return np.arange(self.num_pictures) // self.unit_size % shard.count == shard.index

    def of_prompts(self, indices: str | None, limit: int | None) -> np.ndarray:
        """Which pictures --indices, such as 0-49,180, and --limit ask for, [num_pictures], bool; raises ValueError."""
        if limit is not None and limit < 1:
            raise ValueError(f"limit must be at least 1, got {limit}")
        asked = np.full(self.num_prompts, indices is None)
        for part in (indices or "").split(",") if indices is not None else ():
            first, dash, last = part.strip().partition("-")
            last = last if dash else first
            if not (
                len(last) < MAX_DIGITS
                and first.isdecimal()
                and last.isdecimal()
                and int(first) <= int(last) < self.num_prompts
            ):
                raise ValueError(
                    f"indices must be numbers and ranges like 0-49,180, up to {self.num_prompts - 1}, got {indices!r}"
                )
            asked[int(first) : int(last) + 1] = True
        if limit is not None:
            asked[limit:] = False
        return np.repeat(asked, self.num_images)

    def units(self, lines: Iterable[PromptLine], due: np.ndarray) -> Iterator[list[Task]]:
        """The units that hold a due picture, complete and in order.

        Args:
            lines: all prompts of the run.
            due: [num_pictures], bool.
        """
        starts = np.arange(0, self.num_pictures, self.unit_size)
        holds = np.add.reduceat(due, starts) > 0 if len(starts) else np.zeros(0, bool)
        unit: list[Task] = []
        for line in lines:
            for image in range(self.num_images):
                number = line.index * self.num_images + image
                if not holds[number // self.unit_size]:
                    continue
                if unit and number % self.unit_size == 0:
                    yield unit
                    unit = []
                unit.append(self._task(line, image, number, bool(due[number])))
        if unit:
            yield unit

    def _task(self, line: PromptLine, image: int, number: int, wanted: bool) -> Task:
        return Task(number, line, image, self.seed(line, image), self.file_name(number), wanted)


def find_shard(given: str | None, per_shard: int = 1) -> tuple[Shard, str | None]:
    """The shard from --shard, or from torchrun's or SLURM's variables, and their names.

    Args:
        given: I/N.
        per_shard: consecutive processes that draw one shard together.

    Raises:
        ValueError: if it is none.
    """
    if given is not None:
        index, slash, count = given.partition("/")
        if not (slash and index.isdecimal() and count.isdecimal() and len(count) < MAX_DIGITS):
            raise ValueError(f"shard must be I/N such as 0/4, got {given!r}")
        return Shard(int(index), int(count)), None
    # SLURM's step variables, which srun sets for each process; its job variables are set for a lone process, too
    for rank, size in (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS")):
        if rank in os.environ and size in os.environ:
            try:
                one, all_of_them = int(os.environ[rank]) // per_shard, int(os.environ[size]) // per_shard
                return Shard(one, all_of_them), f"{rank} and {size}"
            except ValueError as error:
                values = f"{os.environ[rank]!r} and {os.environ[size]!r}"
                raise ValueError(
                    f"the variables {rank} and {size} must hold the shard's index and count, got {values}"
                ) from error
    return Shard(), None
