"""One process or several: who am I, and sums over all. torchrun starts several; a plain command is one."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

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

    def agree(self, flag: bool) -> bool:
        """Whether any process says so: all leave a loop at the same step."""
        if self.world == 1:
            return flag
        device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        return bool(self.sum(torch.tensor(float(flag), device=device)) > 0)

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
    """Join the others that torchrun started, if it did (nccl on GPUs, gloo on CPUs)."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        yield Processes()
        return
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if device.startswith("cuda"):
        torch.cuda.set_device(local)
    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    try:
        yield Processes(dist.get_rank(), world, local)
    finally:
        dist.destroy_process_group()
