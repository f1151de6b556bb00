"""The worker on a Ray cluster: Ray Data distributes the units, and one actor per GPU draws them."""

import pickle
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from hi_diffusers.engine.cluster import connect
from hi_diffusers.runs.units import Task
from hi_diffusers.runs.worker import Drawn, UnitWorker


class RayWorker:
    """A Ray actor: its input is a batch of one pickled unit, its output the pickled pictures."""

    def __init__(self, open_worker: Callable[[Any], UnitWorker[Any, Any]], job: Any):
        self.worker = open_worker(job)

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[bytes]]:
        """Draw one unit."""
        unit = pickle.loads(batch["unit"][0])
        self.worker.prepare([unit])
        return {"drawn": [pickle.dumps(self.worker.draw(unit))]}


def draw_on_cluster(
    job: Any,
    open_worker: Callable[[Any], UnitWorker[Any, Any]],
    units: Iterable[list[Task]],
    address: str | None,
    num_workers: int | None,
) -> Iterator[list[Drawn]]:
    """Yield the pictures of every unit as they are finished; if a worker is lost, another one draws its unit.

    Args:
        job: what the workers draw; a `Job`, or a `StockJob`.
        open_worker: makes a worker of it.
        units: the units to draw.
        address: address of a running cluster; None starts one on this machine.
        num_workers: number of actors; None is one per GPU, or one per `job.threads` CPUs without GPUs.

    The units' prompts are held by this process until all are drawn.

    Raises:
        ValueError: see `connect`.
    """
    import ray
    import ray.data

    connect(address)
    try:
        cluster = ray.cluster_resources()
        num_gpus = int(cluster.get("GPU", 0)) if job.device.startswith("cuda") else 0
        num_cpus = min(job.threads, int(cluster.get("CPU", 1)))
        workers = num_workers or num_gpus or max(1, int(cluster.get("CPU", 1)) // num_cpus)
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        items = [{"unit": pickle.dumps(unit)} for unit in units]
        # one unit per block: Ray sends, returns and repeats whole blocks
        drawn = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
            RayWorker,
            fn_constructor_args=(open_worker, job),
            batch_size=1,
            concurrency=workers,
            num_cpus=num_cpus if not num_gpus else 1,
            num_gpus=1 if num_gpus else 0,
            max_restarts=-1,
            max_task_retries=-1,
        )
        for row in drawn.iter_rows():
            yield pickle.loads(row["drawn"])
    finally:
        ray.shutdown()
