"""SwiGLU: silu(gate) * up, the product that gates the feed-forward layer (arXiv 2002.05202)."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up, elementwise."""
    return F.silu(gate) * up
