"""Draws units of a run with a pipeline of diffusers."""

from collections.abc import Hashable, Sequence
from pathlib import Path

import torch

from hi_diffusers.console import quiet_libraries
from hi_diffusers.pictures.safety import SafetyChecker
from hi_diffusers.runs.manifest import sha256_of
from hi_diffusers.runs.stock_plan import StockDecisions, StockJob
from hi_diffusers.runs.units import Task
from hi_diffusers.runs.worker import Drawn, UnitWorker
from hi_diffusers.stock.drawing import StockModel, StockResult
from hi_diffusers.stock.files import encode_result, files_beside, frames_sha256
from hi_diffusers.stock.request import StockRequest


class StockWorker(UnitWorker[StockRequest, StockResult]):
    """Draws units with a pipeline of diffusers.

    Args:
        job: the run's settings.

    Raises:
        ValueError: if the pipeline or the safety checker cannot be loaded.
    """

    def __init__(self, job: StockJob):
        quiet_libraries()
        torch.set_num_threads(job.threads)
        self.job = job
        self.decisions = StockDecisions(job.source, job.options, job.cache, job.calibration_dir, job.folder)
        self.safety = SafetyChecker(job.safety, job.device) if job.safety else None
        self.model = StockModel.open(job.source)
        self.notices = self.model.notices

    def decide(self, task: Task) -> StockRequest:
        """See `UnitWorker`."""
        return self.decisions.drawing(task.line, task.seed)

    def shared(self, drawing: StockRequest) -> Hashable:
        """See `UnitWorker`; pictures that start from another one are batches of one."""
        alone = (drawing.seed, drawing.prompt) if drawing.images else ()
        return (*sorted(drawing.options.items()), drawing.image_hashes, alone)

    def draw_batch(self, drawings: Sequence[StockRequest]) -> Sequence[StockResult]:
        """See `UnitWorker`."""
        return self.model.draw(drawings)

    def finish(self, task: Task, picture: StockResult, batch: int) -> Drawn:
        """See `UnitWorker`."""
        line = self.line_of(task, picture.metadata, picture.trace, picture.seconds, batch)
        line["calls"] = sum(record.evaluations for record in picture.trace)
        if picture.is_video:
            line |= {"frames": len(picture.frames), "frames_sha256": frames_sha256(picture)}
        if self.safety is not None:
            score = max(self.safety.score(frame) for frame in picture.frames)
            line["nsfw_score"] = round(score, 4)
            if self.safety.withholds(score):
                return Drawn(line | {"file": "", "withheld": "nsfw", "bytes": 0, "sha256": ""}, b"")
        data = encode_result(picture, self.job.suffix, embed=self.job.add_metadata)
        line |= {"file": task.file, "bytes": len(data), "sha256": sha256_of(data)}
        files = {path.name: content for path, content in files_beside(picture, Path(task.file)).items()}
        if not self.job.add_metadata:
            files = {name: content for name, content in files.items() if not name.endswith(".json")}
        return Drawn(line, data, files)
