"""A calibration: what was fitted for one model and sampler, and what was chosen by drawing with it.

For target solver these are the coefficients of every budget's solver. For targets velocity and x0 it is the Gram
matrix G [num_steps, num_steps] of uncached runs: the inner products of the target at every pair of steps, averaged over
the calibration's pictures. From it follow the learned weights for any anchors (`taylor_utils.bases.learned`) and the
best schedule for any budget (`cache_functions.optimum`). A cached run visits other states than an uncached one, so the
matrix cannot decide everything: the choices were made by drawing.
"""

import contextlib
import functools
import hashlib
import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cache_functions.solver import SOLVER, Solver
from taylor_utils.bases.learned import PRIORS

VERSION = 1
BY_HASH = "sha256:"
MAX_FILE_BYTES = 16 * 2**20  # 128 steps make 0.4 MB
MAX_KEY_STEPS = 1000
MAX_ORDER = 6
LEVELS_TOLERANCE = 1e-4


@dataclass(frozen=True)
class CalibrationKey:
    """The model, sampler and target that a calibration was made for; it fits only these.

    Attributes:
        model: identity of the base transformer's weights.
        scheduler, num_steps, shift, guidance: settings of the sampler.
        target: "solver", or the feature of the matrix, "velocity" or "x0".
        first_step: the first step that is drawn, of drawings that begin with a picture.
    """

    model: str
    scheduler: str
    num_steps: int
    shift: float
    guidance: float
    target: str
    first_step: int = 0

    @property
    def drawn_steps(self) -> int:
        """Number of steps that are drawn."""
        return self.num_steps - self.first_step

    def difference(self, wanted: "CalibrationKey") -> str | None:
        """The first field that differs, as "field is this, not that"; None if none does."""
        for field in fields(self):
            own, other = getattr(self, field.name), getattr(wanted, field.name)
            if own != other:
                return f"its {field.name} is {own}, not {other}"
        return None


@dataclass(frozen=True)
class Choice:
    """The choice for one budget of a Gram matrix, made by drawing.

    Attributes:
        full_steps: the schedule.
        max_order: number of anchors minus one.
        prior, ridge: settings of the learned weights.
        corrector, corrector_from: see `CacheConfig`.
        median_db, p10_db: median and 10th percentile of the PSNR to the uncached picture, in dB, over the held-out
            calibration prompts that were drawn to choose.
    """

    full_steps: tuple[int, ...]
    max_order: int
    prior: str
    ridge: float
    corrector: bool
    corrector_from: int
    median_db: float
    p10_db: float

    @property
    def merit(self) -> float:
        """The value that ranks choices, see `merit`."""
        return merit(self.median_db, self.p10_db)


@dataclass(frozen=True)
class SolverChoice:
    """The solver for one budget.

    Attributes:
        solver: its full steps and coefficients.
        median_db, p10_db: as in `Choice`.
    """

    solver: Solver
    median_db: float
    p10_db: float

    @property
    def full_steps(self) -> tuple[int, ...]:
        """The schedule."""
        return self.solver.full_steps


def merit(median_db: float, p10_db: float) -> float:
    """The value that ranks ways to forecast: the mean of both, so that the worst tenth counts as much as the middle."""
    return (median_db + p10_db) / 2


@dataclass(frozen=True, eq=False)
class Calibration:
    """One calibration file.

    Attributes:
        key: the model, sampler and target that it fits.
        gram: [S,S] of the S steps that are drawn, float64; None for target solver.
        sigmas: noise level at every one of them and after the last, S + 1.
        choices: budget -> choice.
        made_of: information for readers: prompts, seeds, versions.
        sha256: SHA-256 of the file's bytes.
    """

    key: CalibrationKey
    gram: Tensor | None
    sigmas: tuple[float, ...]
    choices: Mapping[int, Choice | SolverChoice]
    made_of: Mapping[str, Any]
    sha256: str

    @property
    def matrix(self) -> Tensor:
        """The Gram matrix; raises ValueError if there is none."""
        if self.gram is None:
            raise ValueError(f"a calibration of target {self.key.target} has no Gram matrix")
        return self.gram

    @property
    def reference(self) -> str:
        """The calibration's name in settings: its hash."""
        return BY_HASH + self.sha256

    def has_levels(self, sigmas: Sequence[float]) -> bool:
        """Whether these are its noise levels; true if none are given."""
        pairs = zip(self.sigmas, sigmas, strict=False)
        return all(math.isclose(own, other, abs_tol=LEVELS_TOLERANCE) for own, other in pairs)

    def solver(self, full_steps: int) -> Solver:
        """The solver of a budget.

        Raises:
            ValueError: if there is none.
        """
        choice = self.choices.get(full_steps)
        if not isinstance(choice, SolverChoice):
            known = ", ".join(map(str, sorted(self.choices)))
            raise ValueError(f"full_steps must be one of {known}, for which the solver is fitted, got {full_steps}")
        return choice.solver

    def nearest_choice(self, full_steps: int) -> Choice:
        """The choice for the budget nearest to `full_steps`; the smaller budget of two equally near ones."""
        choices = {budget: one for budget, one in self.choices.items() if isinstance(one, Choice)}
        return choices[min(choices, key=lambda budget: (abs(budget - full_steps), budget))]

    @classmethod
    def read(cls, path: Path) -> "Calibration":
        """Read a calibration file.

        Raises:
            ValueError: in one sentence, if it cannot be read or is not a calibration.
        """
        try:
            if path.exists() and (
                not path.is_file() or path.stat().st_size > MAX_FILE_BYTES
            ):  # a device could be endless
                raise ValueError(f"it must be a file of at most {MAX_FILE_BYTES // 2**20} MiB")
            data = path.read_bytes()
            content = json.loads(data)
            if content["version"] != VERSION:
                raise ValueError(f"version is {content['version']!r}, this software reads {VERSION}")
            key = CalibrationKey(**content["key"])
            _check_key(key)
            sigmas = tuple(float(sigma) for sigma in content["sigmas"])
            if len(sigmas) != key.drawn_steps + 1 or not content["choices"]:
                raise ValueError(f"its noise levels or choices do not fit {key.drawn_steps} steps")
            _check_sigmas(sigmas)
            gram = None if key.target == SOLVER else _read_gram(content["gram"], key.drawn_steps)
            read = _read_choice if gram is not None else _read_solver
            choices = {int(budget): read(one, int(budget), key) for budget, one in content["choices"].items()}
        except OSError as error:
            raise ValueError(f"calibration {path} cannot be read: {error.strerror}") from error
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError, OverflowError, RuntimeError) as error:
            reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
            raise ValueError(f"calibration {path} is not a calibration file: {reason}") from error
        return cls(key, gram, sigmas, choices, content.get("made_of", {}), hashlib.sha256(data).hexdigest())


def _check_key(key: CalibrationKey) -> None:
    """Raise ValueError for an invalid key."""
    texts = (key.model, key.scheduler, key.target)
    numbers = (key.shift, key.guidance)
    if not all(isinstance(text, str) for text in texts) or not all(_is_number(number) for number in numbers):
        raise ValueError("its key must hold texts and numbers")
    if isinstance(key.num_steps, bool) or not isinstance(key.num_steps, int) or not 1 <= key.num_steps <= MAX_KEY_STEPS:
        raise ValueError(f"num_steps must be a whole number from 1 to {MAX_KEY_STEPS}, got {key.num_steps!r}")
    first = key.first_step
    if isinstance(first, bool) or not isinstance(first, int) or not 0 <= first < key.num_steps:
        raise ValueError(f"first_step must be a whole number from 0 to {key.num_steps - 1}, got {first!r}")


def _check_sigmas(sigmas: Sequence[float]) -> None:
    """Raise ValueError for noise levels that do not fall."""
    if not all(map(math.isfinite, sigmas)):
        raise ValueError("its noise levels hold NaN or infinity")
    if any(later >= earlier for earlier, later in itertools.pairwise(sigmas)) or sigmas[-1] < 0:
        raise ValueError("its noise levels must fall from step to step")


def _read_gram(content: Any, num_steps: int) -> Tensor:
    """The matrix; raises ValueError for one that is not a Gram matrix."""
    gram = torch.tensor(content, dtype=torch.float64)
    if gram.shape != (num_steps, num_steps):
        raise ValueError(f"its matrix of shape {tuple(gram.shape)} does not fit {num_steps} steps")
    if not bool(gram.isfinite().all()):
        raise ValueError("its matrix holds NaN or infinity")
    if not torch.allclose(gram, gram.T) or bool((gram.diagonal() < 0).any()):
        raise ValueError(
            "its matrix is not a Gram matrix: it must be symmetric, with no negative number on its diagonal"
        )
    return gram


def _read_solver(content: dict[str, Any], budget: int, key: CalibrationKey) -> SolverChoice:
    """A budget's solver; raises ValueError for an invalid one."""
    solver = Solver.of(**content["solver"])
    try:
        solver.check(key.drawn_steps)
    except ValueError as error:
        raise ValueError(f"its solver for {budget} full steps is damaged: {error}") from error
    guided = key.guidance > 1
    if len(solver.full_steps) != budget or solver.num_outputs != (2 if guided else 1):
        raise ValueError(f"its solver for {budget} full steps has other full steps or outputs than its key says")
    choice = SolverChoice(**(content | {"solver": solver}))
    if not all(map(_is_number, (choice.median_db, choice.p10_db))):
        raise ValueError(f"its choice for {budget} full steps has an invalid PSNR")
    return choice


def _read_choice(content: dict[str, Any], budget: int, key: CalibrationKey) -> Choice:
    """A budget's choice; raises ValueError for an invalid one."""
    choice = Choice(**(content | {"full_steps": tuple(content["full_steps"])}))
    steps = choice.full_steps
    whole = all(isinstance(step, int) and not isinstance(step, bool) for step in steps)
    rising = whole and all(earlier < later for earlier, later in itertools.pairwise(steps))
    numbers = (choice.ridge, choice.median_db, choice.p10_db)
    if not (rising and len(steps) == budget and steps[0] == 0 and steps[-1] < key.drawn_steps):
        raise ValueError(f"its choice for {budget} full steps must list {budget} increasing steps from 0 on")
    if not (isinstance(choice.max_order, int) and 0 <= choice.max_order <= MAX_ORDER and choice.prior in PRIORS):
        raise ValueError(
            f"its choice for {budget} full steps has invalid max_order {choice.max_order!r} or prior {choice.prior!r}"
        )
    if not all(map(_is_number, numbers)) or choice.ridge < 0 or not isinstance(choice.corrector, bool):
        raise ValueError(f"its choice for {budget} full steps has an invalid ridge, corrector or PSNR")
    if not isinstance(choice.corrector_from, int) or choice.corrector_from < 0:
        raise ValueError(f"its choice for {budget} full steps has an invalid corrector_from {choice.corrector_from!r}")
    return choice


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def calibration_text(
    key: CalibrationKey,
    gram: Tensor | None,
    sigmas: Sequence[float],
    choices: Mapping[int, Choice | SolverChoice],
    made_of: Mapping[str, Any],
) -> str:
    """A calibration file's JSON text; equal arguments give equal text."""
    content = {
        "version": VERSION,
        "key": {name: value for name, value in asdict(key).items() if name != "first_step" or value},
        "made_of": dict(made_of),
        "choices": {str(budget): asdict(choices[budget]) for budget in sorted(choices, reverse=True)},
        "sigmas": list(sigmas),
        **({} if gram is None else {"gram": gram.tolist()}),
    }
    lines = [f" {json.dumps(name)}: {json.dumps(value)}" for name, value in content.items()]
    return "{\n" + ",\n".join(lines) + "\n}\n"


@dataclass(frozen=True)
class CalibrationShelf:
    """The folders that are searched for a model's calibrations.

    Attributes:
        model: identity of the base transformer's weights, as in the key.
        folders: the folders, searched in this order.
        altered: changes of the drawing model to the base weights, such as "nf4"; empty if there are none.
        computes_up_to: steps up to which schedules of budgets that were not calibrated are computed; None: any number.
    """

    model: str
    folders: tuple[Path, ...] = ()
    altered: str = ""
    computes_up_to: int | None = None

    def find(self, key: CalibrationKey, sigmas: Sequence[float] = ()) -> Calibration | None:
        """The first calibration with exactly this key, for these noise levels if they are given."""
        return next((one for one in self.all() if one.key == key and one.has_levels(sigmas)), None)

    def open(self, reference: str) -> Calibration:
        """The calibration of that path, or of that "sha256:..." in the folders.

        Raises:
            ValueError: if there is no such calibration.
        """
        if not reference.startswith(BY_HASH):
            return Calibration.read(Path(reference))
        found = next((one for one in self.all() if one.reference == reference), None)
        if found is None:
            raise ValueError(f"calibration {reference[:15]}... was not found in the folders: give its file")
        return found

    def all(self) -> list[Calibration]:
        """All calibrations in the folders that can be read."""
        return [found for found in self._read() if isinstance(found, Calibration)]

    def faults(self) -> list[str]:
        """A sentence about each file in the folders that cannot be read."""
        return [found for found in self._read() if isinstance(found, str)]

    def _read(self) -> Iterator[Calibration | str]:
        for path in (path for folder in self.folders for path in sorted(folder.glob("*.json"))):
            with contextlib.suppress(OSError):  # removed meanwhile
                yield _read_once(path, path.stat().st_mtime_ns)


@functools.lru_cache(maxsize=256)
def _read_once(path: Path, modified_ns: int) -> Calibration | str:
    """Read a file, or say why that fails; cached by its modification time, since every drawing reads all files."""
    try:
        return Calibration.read(path)
    except ValueError as error:
        return f"{error}; the file is skipped"
