"""RMSNorm: scale each vector to root mean square 1, then by a learned weight (arXiv 1910.07467)."""

from __future__ import annotations

import torch


def rms_norm(x_D: torch.Tensor, weight_D: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis; the mean is taken in fp32, the result has x's dtype."""
    x32_D = x_D.float()
    rstd = torch.rsqrt(x32_D.pow(2).mean(-1, keepdim=True) + eps)
    return weight_D * (x32_D * rstd).to(x_D.dtype)
