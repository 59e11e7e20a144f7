"""The processes of one training, one for each GPU: a single one, or those that `accelerate launch` started."""

from __future__ import annotations

import atexit
import os
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Processes:
    """How many processes train together, and which one this is.

    Attributes:
        rank: of this one, from 0; that one writes the files.
        count: of all.
        device: what this one computes on.
    """

    rank: int
    count: int
    device: str

    def gather(self, x: Tensor) -> Tensor:
        """What every process has, x [n, ...], in the order of their ranks: [count * n, ...]."""
        if self.count == 1:
            return x
        gathered = x.new_empty(self.count * len(x), *x.shape[1:])
        torch.distributed.all_gather_into_tensor(gathered, x.contiguous())
        return gathered

    def average(self, tensors: list[Tensor]) -> None:
        """Put in place of each tensor its mean over the processes."""
        for tensor in tensors:
            torch.distributed.all_reduce(tensor)
            tensor.div_(self.count)

    def wait(self) -> None:
        """Until all processes are here."""
        if self.count > 1:
            torch.distributed.barrier()


def join_processes(device: str) -> Processes:
    """The processes that train, this one alone unless `accelerate launch` started several; `device` is `cpu` or a GPU.

    Of several, each has the GPU that accelerate gives it.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Processes(0, 1, device)
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=device == "cpu")
    atexit.register(accelerator.end_training)
    return Processes(accelerator.process_index, accelerator.num_processes, str(accelerator.device))


def is_first_process() -> bool:
    """Whether this one has rank 0: the one that tells what was done."""
    return os.environ.get("RANK", "0") == "0"
