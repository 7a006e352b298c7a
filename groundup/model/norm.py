"""RMSNorm as a module; the arithmetic is ops/norm.py."""

from __future__ import annotations

import torch
from torch import nn

from groundup.ops.norm import rms_norm


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x_D: torch.Tensor) -> torch.Tensor:
        return rms_norm(x_D, self.weight, self.eps)
