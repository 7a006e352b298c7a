"""Was the plan right? What a run took, by the same parts as plan/memory.py estimates, side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn

from groundup.optim import Optimizers

PARTS = ("weights", "gradients", "optimizer", "ema", "total")


class Meter:
    """Peak memory of a run. Made before the model is; `begin` once it stands."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.before = device, psutil.Process().memory_info().rss

    def begin(self) -> None:
        """Forget the peaks of loading."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            try:
                Path("/proc/self/clear_refs").write_text("5")  # VmHWM falls to what is held now
            except OSError:
                return

    def total(self) -> int:
        """Bytes at the peak since `begin`; on a CPU those of the process, without what it held before the model."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return max(0, _peak_rss() - self.before)


def measured(model: nn.Module, optimizer: Optimizers, ema: dict[str, torch.Tensor], total: int) -> dict[str, int]:
    """Bytes by part, and `total`, the peak."""
    held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in _tensors(model)}
    states = [
        t
        for part in optimizer.parts.values()
        for state in part.state.values()
        for t in state.values()
        if isinstance(t, torch.Tensor)
    ]
    return {
        "weights": sum(held.values()),
        "gradients": sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad),
        "optimizer": sum(t.nbytes for t in states),
        "ema": sum(t.nbytes for t in ema.values()),
        "total": total,
    }


def table(planned: dict[str, int], found: dict[str, int]) -> list[str]:
    """Lines for people: each part, planned and measured. What is not weights, gradients or states is activations."""
    lines = ["memory         planned     measured"]
    kept = ("weights", "optimizer", "ema")
    rest = [max(0, each["total"] - sum(each[part] for part in kept)) for each in (planned, found)]
    rows: list[tuple[str, Any, Any]] = [
        (part, planned[part], found[part]) for part in PARTS if planned[part] or found[part]
    ]
    rows.insert(-1, ("the rest", rest[0], rest[1]))  # activations and logits; gradients come and go beside them
    return lines + [f"{name:<10} {_mb(a):>11} {_mb(b):>12}" for name, a, b in rows]


def _tensors(model: nn.Module) -> list[torch.Tensor]:
    return [t for t in [*model.parameters(), *model.buffers()] if t.device.type != "meta"]


def _peak_rss() -> int:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return psutil.Process().memory_info().rss


def _mb(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"
