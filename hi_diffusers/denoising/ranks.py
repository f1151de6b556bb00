"""Several processes draw one picture: its tokens are split over some of them, the branches of guidance over two.

Every rank runs the same loop on the same latents. Splitting the tokens is diffusers' context parallelism (Ulysses,
arXiv 2309.14509): each rank holds a share of the tokens, of the experts' work and of the cache, and attention exchanges
tokens for heads. Splitting the guidance gives each of two groups of ranks one branch of classifier-free guidance (arXiv
2207.12598); after a full step they exchange their velocities.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

GUIDANCE, RING, ULYSSES = "guidance", "ring", "ulysses"


class Ranks:
    """The processes that draw one picture; torch.distributed must be initialized.

    Args:
        ulysses: ranks over which the tokens are split.
        guidance: whether the branches of guidance are split over two groups of ranks.
        device: type of the device that each rank computes on, e.g. "cuda".

    Raises:
        ValueError: if there are not as many processes.
    """

    def __init__(self, ulysses: int, guidance: bool, device: str):
        size = dist.get_world_size()
        if size != ulysses * (2 if guidance else 1):
            asked = f"ulysses {ulysses}" + (" with guidance_parallel" if guidance else "")
            raise ValueError(f"{asked} needs {ulysses * (2 if guidance else 1)} processes, got {size}")
        self.ulysses, self.guidance = ulysses, guidance
        shape = (2 if guidance else 1, 1, ulysses)
        self._mesh = init_device_mesh(device, shape, mesh_dim_names=(GUIDANCE, RING, ULYSSES))

    @property
    def is_first(self) -> bool:
        """Whether this rank prints and writes."""
        return dist.get_rank() == 0

    @property
    def branch(self) -> int:
        """The branch of guidance that this rank computes, if they are split: 0 is the negative prompt's."""
        branch: int = self._mesh[GUIDANCE].get_local_rank()
        return branch

    def split_tokens(self, transformer: Any) -> None:
        """Split a transformer's tokens over the ranks, by the plan that its class states."""
        from diffusers import ContextParallelConfig  # here: diffusers takes seconds to import

        if self.ulysses > 1:
            mesh = self._mesh[RING, ULYSSES]
            with _a_device_is_counted():
                transformer.enable_parallelism(config=ContextParallelConfig(ulysses_degree=self.ulysses, mesh=mesh))

    def gather_branches(self, velocity: Tensor) -> tuple[Tensor, Tensor]:
        """The velocities of both branches, of which this rank has computed its own."""
        velocity = velocity.contiguous()
        both = [torch.empty_like(velocity) for _ in range(2)]
        dist.all_gather(both, velocity, group=self._mesh[GUIDANCE].get_group())
        return both[0], both[1]

    def sum(self, values: Tensor) -> Tensor:
        """The sum of every rank's values."""
        dist.all_reduce(values)
        return values

    def share(self, value: Any) -> Any:
        """The first rank's value, on every rank; tensors in it must lie on the CPU."""
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]


def join(ulysses: int, guidance: bool, device: str, environment: Mapping[str, str] = os.environ) -> tuple[Ranks, str]:
    """Join the processes that torchrun started.

    Args:
        ulysses, guidance: as in `Ranks`.
        device: the device that was asked for, e.g. "cuda" or "cpu".

    Returns:
        The ranks, and this rank's own device, e.g. "cuda:1".

    Raises:
        ValueError: if torchrun started none, or not as many.
    """
    if "WORLD_SIZE" not in environment:
        count = ulysses * (2 if guidance else 1)
        raise ValueError(f"ulysses and guidance_parallel need {count} processes: torchrun --nproc_per_node {count} ...")
    kind = torch.device(device).type
    own = f"cuda:{environment['LOCAL_RANK']}" if kind == "cuda" else device
    if kind == "cuda":
        torch.cuda.set_device(own)
    dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    return Ranks(ulysses, guidance, kind), own


@contextmanager
def _a_device_is_counted() -> Iterator[None]:
    """A context in which torch counts at least one accelerator: diffusers divides by their number, 0 on a CPU."""
    count = torch.accelerator.device_count
    torch.accelerator.device_count = lambda: max(1, count())
    try:
        yield
    finally:
        torch.accelerator.device_count = count
