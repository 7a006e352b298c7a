"""Apply rotary position embeddings: turn each pair (i, i + d/2) of a head by its position's angle.

RoFormer, arXiv 2104.09864; where the angles come from is model/rope.py.
"""

from __future__ import annotations

import torch


def apply_rope(x_BTHd: torch.Tensor, cos_BTp: torch.Tensor, sin_BTp: torch.Tensor) -> torch.Tensor:
    """Rotate queries or keys. cos, sin hold d/2 angles a position; Hugging Face's order of pairs (halves)."""
    cos, sin = cos_BTp[:, :, None], sin_BTp[:, :, None]
    a, b = x_BTHd.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x_BTHd.dtype)
