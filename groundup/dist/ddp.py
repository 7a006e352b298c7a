"""The data axis: every rank holds the whole model, sees other rows, and averages gradients with the rest."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from groundup.dist.mesh import World


def spread(module: nn.Module, world: World) -> nn.Module:
    """`module` as it is when alone, else in DDP, which starts all ranks from rank 0's weights.

    DDP averages over ranks. The loop multiplies its loss by the number of ranks, so that sums stay sums.
    """
    if world.size == 1:
        return module
    # Buffers are a frozen base's (a quantised one lives in them): the same everywhere from the start.
    return DistributedDataParallel(module, gradient_as_bucket_view=True, broadcast_buffers=False)


def without_sync(module: nn.Module, last: bool) -> AbstractContextManager:
    """Around every micro-step: gradients travel on the last one only."""
    return module.no_sync() if isinstance(module, DistributedDataParallel) and not last else nullcontext()
