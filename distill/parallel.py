"""One process or several: who am I, and sums over all. torchrun starts several; a plain command is one."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Processes:
    """This process among all."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    """Of this machine: the GPU's number."""

    @property
    def first(self) -> bool:
        return self.rank == 0

    def sum(self, x: Tensor) -> Tensor:
        """``x`` summed over all processes, in place."""
        if self.world > 1:
            dist.all_reduce(x)
        return x

    def largest(self, *numbers: int) -> list[int]:
        """Each number's maximum over all processes; between CPUs, so no GPU is waited for."""
        if self.world == 1:
            return list(numbers)
        there = torch.tensor(numbers)
        dist.all_reduce(there, dist.ReduceOp.MAX)
        found: list[int] = there.tolist()
        return found

    def first_says(self, value: Any) -> Any:
        """The first process's ``value``, on all of them."""
        if self.world == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box)
        return box[0]

    def wait(self) -> None:
        """Until every process is here."""
        if self.world > 1:
            dist.barrier()

    def share(self, rows: int) -> slice:
        """Which of ``rows`` are this process's."""
        if rows % self.world:
            raise ValueError(f"batch is {rows} rows: expected a multiple of the {self.world} processes")
        own = rows // self.world
        return slice(self.rank * own, (self.rank + 1) * own)


@contextmanager
def processes(device: str) -> Iterator[Processes]:
    """Join the others that torchrun started, if it did (nccl between GPUs, gloo between CPUs)."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        yield Processes()
        return
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if device.startswith("cuda"):
        torch.cuda.set_device(local)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo")
    try:
        yield Processes(dist.get_rank(), world, local)
    finally:
        dist.destroy_process_group()
