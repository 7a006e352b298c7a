"""How can a matrix move in all its directions at once? Muon: momentum, made orthogonal, is the step.

Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/. A momentum matrix is nearly of low rank, so a plain step
moves a few directions only. Replacing it by its polar factor U V^T (singular values all set to 1) moves all of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

# The quintic a x + b x^3 + c x^5, chosen for its slope at 0: five rounds bring singular values from 0.002..1 to
# 0.7..1.2, not to 1 exactly, which training does not notice.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonalize(matrices_KMN: Tensor, steps: int = 5, dtype: torch.dtype | None = None) -> Tensor:
    """An approximate polar factor U V^T of each matrix, by Newton-Schulz rounds of matrix products alone.

    dtype: what the products run in; by default bf16 on CUDA, fp32 elsewhere (bf16 products crawl on most CPUs).
    """
    a, b, c = COEFFICIENTS
    dtype = dtype or (torch.bfloat16 if matrices_KMN.is_cuda else torch.float32)
    tall = matrices_KMN.size(-2) > matrices_KMN.size(-1)
    x = (matrices_KMN.mT if tall else matrices_KMN).to(dtype)  # wide: the Gram matrix is then the smaller one
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)  # the Frobenius norm bounds the spectral norm by 1
    fused = torch.baddbmm if x.ndim == 3 else torch.addmm
    for _ in range(steps):
        gram = x @ x.mT
        x = fused(x, fused(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov momentum and decoupled weight decay, for 2-D weights only.

    A weight of M x N moves by lr * sqrt(max(1, M / N)) times the orthogonal matrix, which keeps the size of the
    output's change alike across shapes. The state of a weight is one tensor, `momentum_buffer`.
    """

    def __init__(
        self, params: Iterable[Any], lr: float = 0.02, momentum: float = 0.95, weight_decay: float = 0.1, steps: int = 5
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "steps": steps})
        for group in self.param_groups:
            for p in group["params"]:
                if p.ndim != 2:
                    raise ValueError(f"Muon moves matrices, not a tensor of shape {tuple(p.shape)}")

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for params in _by_shape(p for p in group["params"] if p.grad is not None):
                self._move(params, group)

    def _move(self, params: list[Tensor], group: dict[str, Any]) -> None:
        """Move matrices of one shape together: one batched product in place of many small ones."""
        grads = [p.grad for p in params if p.grad is not None]
        buffers = [self._buffer(p) for p in params]
        torch._foreach_lerp_(buffers, grads, 1 - group["momentum"])
        updates = torch._foreach_lerp(grads, buffers, group["momentum"])  # Nesterov: look ahead along the momentum
        rows, columns = params[0].shape
        torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
        if params[0].is_cuda or rows * columns <= 2**16:
            stacked = orthogonalize(torch.stack(updates), group["steps"]).to(params[0].dtype)
            moves = list(stacked.unbind())
        else:  # a large product fills a CPU alone
            moves = [orthogonalize(u, group["steps"]).to(u.dtype) for u in updates]
        torch._foreach_add_(params, moves, alpha=-group["lr"] * math.sqrt(max(1.0, rows / columns)))

    def _buffer(self, p: Tensor) -> Tensor:
        state = self.state[p]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(p)
        return state["momentum_buffer"]


def _by_shape(params: Iterable[Tensor]) -> list[list[Tensor]]:
    groups: dict[torch.Size, list[Tensor]] = {}
    for p in params:
        groups.setdefault(p.shape, []).append(p)
    return list(groups.values())
