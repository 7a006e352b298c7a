"""Who takes part? The ranks that torchrun started, and what they must agree on."""

from __future__ import annotations

import atexit
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from groundup.errors import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """This process among all. Alone (rank 0 of 1), every call below costs nothing."""

    rank: int = 0
    size: int = 1

    @property
    def main(self) -> bool:
        """Rank 0: the one that writes files and talks."""
        return self.rank == 0

    def sum(self, values: Sequence[float]) -> list[float]:
        """Sums of these numbers over all ranks, in float64 (counts stay exact up to 2^53)."""
        if self.size == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor)
        return tensor.tolist()

    def gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """This CPU tensor of every rank (all of one shape), in the order of the ranks."""
        if self.size == 1:
            return [tensor]
        out = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(out, tensor.contiguous())
        return out

    def gather_objects(self, value: T) -> list[T]:
        """This small thing of every rank, in the order of the ranks; pickled between processes of one run."""
        if self.size == 1:
            return [value]
        out: list[Any] = [None] * self.size
        dist.all_gather_object(out, value)
        return out

    def barrier(self) -> None:
        if self.size > 1:
            self.sum([0.0])


def rank_and_size() -> tuple[int, int]:
    """(RANK, WORLD_SIZE) as torchrun sets them, (0, 1) without it. Needs no process group."""
    try:
        rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    except ValueError:
        raise UserError("RANK, WORLD_SIZE", "are not numbers", "start with torchrun, or unset them") from None
    if not 0 <= rank < size:
        raise UserError("RANK", f"{rank} of WORLD_SIZE {size} cannot be", "start with torchrun, or unset them")
    return rank, size


def start(device: torch.device, minutes: float = 30.0) -> World:
    """Join the other ranks, once a process: gloo for CPU tensors, and NCCL for those of a GPU. Alone, nothing starts.

    minutes: how long a rank waits for the others in one collective before it fails.
    """
    rank, size = rank_and_size()
    if size > 1 and not dist.is_initialized():
        if device.type == "cuda":
            torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(minutes=minutes))
        atexit.register(dist.destroy_process_group)  # not before: a second group would meet the first one's addresses
    return World(rank, size)
