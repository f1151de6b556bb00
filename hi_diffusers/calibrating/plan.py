"""The checked request for a calibration."""

from dataclasses import dataclass, replace
from pathlib import Path

from cache_functions import CacheConfig, CalibrationKey
from hi_diffusers.preset import ModelPreset
from hi_diffusers.request.drawing import Drawing
from hi_diffusers.request.options import ResolvedOptions

NUM_ANCHORS = 3


@dataclass(frozen=True)
class Plan:
    """The request, checked as far as possible without reading weights.

    Attributes:
        drawings: one per prompt, uncached; the first `num_fitted` fit the matrix, the others choose.
        budgets: numbers of full steps, the largest first.
        targets: what is calibrated, one file per target.
        folder: folder that the files are written to.
        model: part of the file names where the model's files are not the preset's own.
    """

    preset: ModelPreset
    drawings: tuple[Drawing, ...]
    num_fitted: int
    budgets: tuple[int, ...]
    targets: tuple[str, ...]
    folder: Path
    batch_size: int
    model: str = ""

    @property
    def num_pictures(self) -> int:
        """Number of all pictures."""
        return len(self.drawings)

    @property
    def sampler(self) -> ResolvedOptions:
        """The first drawing's options; all drawings share them except prompt and seed."""
        return self.drawings[0].options

    def most_demanding(self) -> Drawing:
        """The drawing that needs the most memory."""
        return replace(self.drawings[0], cache=CacheConfig(target="x0", max_order=NUM_ANCHORS - 1))

    def key(self, model: str, target: str) -> CalibrationKey:
        """The key of a target's calibration file."""
        one = self.sampler
        return CalibrationKey(
            model, one.scheduler, one.num_steps, one.shift, one.guidance if one.guided else 0.0, target, one.first_step
        )

    def path(self, target: str) -> Path:
        """The file of a target; its name leaves out settings that are the preset's own."""
        one = self.sampler
        shift = "" if one.shift == self.preset.shift else f"-shift{one.shift:g}"
        name = f"{self.preset.name}{self.model}-{one.scheduler}{one.num_steps}{shift}-guidance{one.guidance:g}"
        begins = f"-from{one.first_step}" if one.first_step else ""
        return self.folder / f"{name}{begins}-{target}.json"


def sampler_sigmas(options: ResolvedOptions) -> list[float]:
    """Noise level at every step and after the last one."""
    scheduler = options.timed_scheduler()
    return [float(sigma) for sigma in scheduler.sigmas]
