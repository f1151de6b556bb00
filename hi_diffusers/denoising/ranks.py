"""Several processes draw one picture: its tokens are split over some of them, the branches of guidance over two.

Every rank runs the same loop on the same latents. Splitting the tokens is diffusers' context parallelism (Ulysses,
arXiv 2309.14509): each rank holds a share of the tokens, of the experts' work and of the cache, and attention exchanges
tokens for heads. Splitting the guidance gives each of two groups of ranks one branch of classifier-free guidance (arXiv
2207.12598); after a full step they exchange their velocities. Several such groups can draw different pictures.
"""

import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

GROUP, GUIDANCE, RING, ULYSSES = "group", "guidance", "ring", "ulysses"
FOREVER = timedelta(days=3650)  # that a rank may wait for its next order

Result = TypeVar("Result")


@dataclass(frozen=True)
class Split:
    """How one picture is split.

    Attributes:
        ulysses: ranks over which the tokens are split.
        guidance: whether the branches of guidance are split over two groups of ranks.
    """

    ulysses: int = 1
    guidance: bool = False

    def __post_init__(self) -> None:
        if self.ulysses < 1:
            raise ValueError(f"ulysses must be at least 1, got {self.ulysses}")

    @property
    def size(self) -> int:
        """Number of processes that draw one picture."""
        return self.ulysses * (2 if self.guidance else 1)

    def check(self, guided: bool, **counts: int) -> None:
        """Check that a drawing can be split so.

        Args:
            guided: whether it has two branches.
            counts: what is split over the ranks, e.g. `heads` -> 20.

        Raises:
            ValueError: if there is one branch, or a count is not divisible.
        """
        if self.guidance and not guided:
            raise ValueError("guidance_parallel has no effect without guidance: drop it, or give --guidance above 1")
        for name, count in counts.items():
            if count % self.ulysses:
                raise ValueError(f"ulysses must divide the {count} {name.replace('_', ' ')}, got {self.ulysses}")


class Ranks:
    """The processes that draw one picture; torch.distributed must be initialized by as many, or a multiple.

    Args:
        split: how a picture is split. Of more processes than that, each consecutive `split.size` are one group.
        device: type of the device that each rank computes on, e.g. "cuda".

    Attributes:
        split: how a picture is split.
        group, num_groups: number of this rank's group, and of all groups.

    Raises:
        ValueError: if the number of processes does not fit.
    """

    def __init__(self, split: Split, device: str):
        size = dist.get_world_size()
        if size % split.size:
            raise ValueError(f"{_asked(split)} needs {split.size} processes or a multiple, got {size}")
        self.split, self.num_groups = split, size // split.size
        self.group = dist.get_rank() // split.size
        self._is_lost = self._is_stopped = False
        self._busy = threading.RLock()  # held by the thread that draws
        shape = (self.num_groups, 2 if split.guidance else 1, 1, split.ulysses)
        self._mesh = init_device_mesh(device, shape, mesh_dim_names=(GROUP, GUIDANCE, RING, ULYSSES))
        self._tokens = self._mesh[RING, ULYSSES]
        self._tokens._flatten()  # diffusers finds it again; all processes must make a group together, which is now
        self._all, _ = dist.new_subgroups(split.size)
        self._orders, _ = dist.new_subgroups(split.size, timeout=FOREVER, backend="gloo")

    @property
    def is_first(self) -> bool:
        """Whether this rank speaks for its group: it encodes prompts, decodes, prints and writes."""
        return dist.get_rank() == self._first

    @property
    def branch(self) -> int:
        """The branch of guidance that this rank computes, if they are split: 0 is the negative prompt's."""
        branch: int = self._mesh[GUIDANCE].get_local_rank()
        return branch

    @property
    def _first(self) -> int:
        return self.group * self.split.size

    def split_tokens(self, transformer: Any) -> None:
        """Split a transformer's tokens over the ranks, by the plan that its class states."""
        from diffusers import ContextParallelConfig  # here: diffusers takes seconds to import

        if self.split.ulysses > 1:
            with _a_device_is_counted():
                config = ContextParallelConfig(ulysses_degree=self.split.ulysses, mesh=self._tokens)
                transformer.enable_parallelism(config=config)

    def gather_branches(self, velocity: Tensor) -> tuple[Tensor, Tensor]:
        """The velocities of both branches, of which this rank has computed its own."""
        velocity = velocity.contiguous()
        both = [torch.empty_like(velocity) for _ in range(2)]
        dist.all_gather(both, velocity, group=self._mesh[GUIDANCE].get_group())
        return both[0], both[1]

    def sum(self, values: Tensor) -> Tensor:
        """The sum of every rank's values."""
        dist.all_reduce(values, group=self._all)
        return values

    def share(self, value: Any) -> Any:
        """The first rank's value, on every rank; tensors in it must lie on the CPU.

        Raises:
            RuntimeError: if the ranks lost each other before, see `in_step`.
        """
        self.check_in_touch()
        box = [value]
        with self.in_step():
            dist.broadcast_object_list(box, src=self._first, group=self._orders)
        return box[0]

    def stop(self, is_stopped: bool = False) -> bool:
        """Whether all ranks stop here, as the first one says."""
        told = torch.tensor([is_stopped])
        with self.in_step():
            dist.broadcast(told, src=self._first, group=self._orders)
        self._is_stopped = bool(told)
        return self._is_stopped

    def together(self, step: Callable[[], Result]) -> Result:
        """Do what every rank does.

        Raises:
            RuntimeError: if it failed on another rank; what it raises here is raised as it is.
        """
        faults: list[str | None] = [None] * self.split.size
        with self.in_step():
            try:
                result, fault = step(), None
            except Exception as error:
                result, fault = None, error
            dist.all_gather_object(faults, fault and f"{type(fault).__name__}: {fault}", group=self._orders)
        if fault is not None:
            raise fault
        for rank, other in enumerate(faults):
            if other is not None:
                raise RuntimeError(f"rank {self._first + rank} failed: {other}")
        return result  # type: ignore[return-value]

    @contextmanager
    def in_step(self) -> Iterator[None]:
        """A context that all ranks leave together; after an error on one, unless all `stop`, nothing can be drawn."""
        self._is_stopped = False
        try:
            with self._busy:
                yield
        except BaseException as error:
            self._is_lost |= not self._is_stopped
            if isinstance(error, torch.OutOfMemoryError):  # no smaller batch can follow: the others wait in this one
                raise RuntimeError(
                    f"out of memory on rank {dist.get_rank()}: draw fewer or smaller pictures"
                ) from error
            if isinstance(error, RuntimeError) and _tells_of_an_end(error):
                raise RuntimeError(f"another of the {self.split.size} processes that draw together ended") from error
            raise

    @property
    def is_lost(self) -> bool:
        """Whether one rank failed where the others did not, so that nothing can be drawn any more."""
        return self._is_lost

    def check_in_touch(self) -> None:
        """Raise RuntimeError if one rank failed where the others did not."""
        if self._is_lost:
            raise RuntimeError("a drawing failed on one of the processes that draw together: start them again")

    def check_one_group(self) -> None:
        """Raise ValueError if there are more processes than draw one picture."""
        if self.num_groups > 1:
            total = self.num_groups * self.split.size
            raise ValueError(f"{_asked(self.split)} needs {self.split.size} processes here, got {total}")

    def leave(self) -> None:
        """End the drawing together. The first rank dismisses the others, see `engine.following`."""
        if self._is_lost or not self._busy.acquire(blocking=False):
            return  # the others wait for something else; they end when this process does
        if self.is_first:
            self.share(None)
        dist.destroy_process_group()


def join(split: Split, device: str, environment: Mapping[str, str] = os.environ) -> tuple[Ranks, str]:
    """Join the processes that torchrun started.

    Args:
        split: as in `Ranks`.
        device: the device that was asked for, e.g. "cuda" or "cpu".

    Returns:
        The ranks, and this rank's own device, e.g. "cuda:1".

    Raises:
        ValueError: if torchrun started none, or a number that does not fit, or there are fewer GPUs.
    """
    if "WORLD_SIZE" not in environment:
        raise ValueError(
            f"{_asked(split)} needs {split.size} processes: start it by torchrun --nproc_per_node {split.size}"
        )
    kind = torch.device(device).type
    own = f"cuda:{environment['LOCAL_RANK']}" if kind == "cuda" else device
    if kind == "cuda":
        num_here, num_cards = int(environment["LOCAL_WORLD_SIZE"]), torch.cuda.device_count()
        if num_here > num_cards:
            raise ValueError(f"{_asked(split)} needs a GPU for each process: {num_here} were started on {num_cards}")
        torch.cuda.set_device(own)
    dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    return Ranks(split, kind), own


def _tells_of_an_end(error: RuntimeError) -> bool:
    """Whether an error is that of a connection to another process."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)


def _asked(split: Split) -> str:
    if split.ulysses == 1:
        return "guidance_parallel"
    return f"ulysses {split.ulysses}" + (" with guidance_parallel" if split.guidance else "")


@contextmanager
def _a_device_is_counted() -> Iterator[None]:
    """A context in which torch counts at least one accelerator: diffusers divides by their number, 0 on a CPU."""
    count = torch.accelerator.device_count
    torch.accelerator.device_count = lambda: max(1, count())
    try:
        yield
    finally:
        torch.accelerator.device_count = count
