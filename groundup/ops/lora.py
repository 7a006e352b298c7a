"""A frozen matrix with a thin product beside it, W + B A (LoRA, arXiv 2106.09685), in few passes on a CPU.

The sum is made once a pass, in full: for all tokens it costs what one row of tokens would, and then the forward pass is
one product and so is the gradient of its input, where W and B A apart would each read and write all tokens again. The
sum is not kept either: the backward pass makes it anew, from W as it is stored. Gradients of A and B take thin products
only; W gets none.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from groundup.ops.norm import normalize, residual_backward_
from groundup.ops.swiglu import swiglu_rows, swiglu_rows_backward

TOKENS = 512  # a thread and chunk: what is wide about them stays in the cache


@dataclass(frozen=True)
class Matrix:
    """W + B A: `frozen` gives W [E, D], made anew where `spare`; a [R, D] and b [E, R] are trained, R may be 0."""

    frozen: Callable[[], torch.Tensor]
    a: torch.Tensor
    b: torch.Tensor
    spare: bool = True

    def whole(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        frozen_ED = self.frozen()
        if not len(a):
            return frozen_ED
        return frozen_ED.addmm_(b, a) if self.spare else torch.addmm(frozen_ED, b, a)


def norm_linear_lora(x_ND: torch.Tensor, matrix: Matrix, bias_E: torch.Tensor | None, eps: float) -> Any:
    """norm_linear of ops/norm.py: (x, normalised(x) @ (W + B A)^T + bias). The bias is frozen."""
    return _NormLinear.apply(x_ND, matrix.a, matrix.b, matrix, bias_E, eps)


def residual_linear_lora(x_ND: torch.Tensor, in_NF: torch.Tensor, matrix: Matrix) -> torch.Tensor:
    """x + in @ (W + B A)^T."""
    out: torch.Tensor = _ResidualLinear.apply(x_ND, in_NF, matrix.a, matrix.b, matrix)
    return out


def residual_ffn_lora(x_ND: torch.Tensor, gate_up: Matrix, down: Matrix, eps: float) -> torch.Tensor:
    """residual_ffn of ops/swiglu.py."""
    out: torch.Tensor = _ResidualFFN.apply(x_ND, gate_up.a, gate_up.b, down.a, down.b, gate_up, down, eps)
    return out


class _NormLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_ND: torch.Tensor, a: torch.Tensor, b: torch.Tensor, matrix: Matrix, bias_E: Any, eps: float
    ) -> Any:
        x_hat_ND, rstd_N1 = normalize(x_ND, eps)
        ctx.save_for_backward(x_hat_ND, rstd_N1, a, b)
        ctx.matrix = matrix
        whole_ED = matrix.whole(a, b)
        out_NE = x_hat_ND @ whole_ED.T if bias_E is None else torch.addmm(bias_E, x_hat_ND, whole_ED.T)
        return x_ND, out_NE

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_x_ND: torch.Tensor, grad_NE: torch.Tensor) -> Any:
        x_hat_ND, rstd_N1, a, b = ctx.saved_tensors
        da, db = _thin_gradients(ctx, x_hat_ND, grad_NE, a, b)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = residual_backward_(grad_NE @ ctx.matrix.whole(a, b), x_hat_ND, rstd_N1, grad_x_ND)
        return dx, da, db, None, None, None


class _ResidualLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_ND: torch.Tensor, in_NF: torch.Tensor, a: torch.Tensor, b: torch.Tensor, matrix: Matrix
    ) -> torch.Tensor:
        ctx.save_for_backward(in_NF, a, b)
        ctx.matrix = matrix
        return torch.addmm(x_ND, in_NF, matrix.whole(a, b).T)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_ND: torch.Tensor) -> Any:
        in_NF, a, b = ctx.saved_tensors
        need_in, need_thin = ctx.needs_input_grad[1:3]
        da, db = _thin(in_NF, grad_ND, a, b) if need_thin else (None, None)
        return grad_ND, grad_ND @ ctx.matrix.whole(a, b) if need_in else None, da, db, None


class _ResidualFFN(torch.autograd.Function):
    """Kept for the backward pass: the normalised input, gate and up. What follows from them is made again by chunks."""

    @staticmethod
    def forward(
        ctx: Any, x_ND: torch.Tensor, a1: torch.Tensor, b1: torch.Tensor, a2: torch.Tensor, b2: torch.Tensor,
        gate_up: Matrix, down: Matrix, eps: float,
    ) -> torch.Tensor:  # fmt: skip
        x_hat_ND, rstd_N1 = normalize(x_ND, eps)
        first_ED, second_DF = gate_up.whole(a1, b1), down.whole(a2, b2)
        wide_N2F = x_ND.new_empty(len(x_ND), len(first_ED))
        out_ND = torch.empty_like(x_ND)
        for rows in _chunks(x_ND):
            wide = torch.mm(x_hat_ND[rows], first_ED.T, out=wide_N2F[rows])
            torch.addmm(x_ND[rows], swiglu_rows(wide), second_DF.T, out=out_ND[rows])
        ctx.save_for_backward(x_hat_ND, rstd_N1, wide_N2F, a1, b1, a2, b2)
        ctx.matrices = gate_up, down
        return out_ND

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_ND: torch.Tensor) -> Any:
        x_hat_ND, rstd_N1, wide_N2F, a1, b1, a2, b2 = ctx.saved_tensors
        first_ED, second_DF = ctx.matrices[0].whole(a1, b1), ctx.matrices[1].whole(a2, b2)
        sums = [torch.zeros_like(thin) for thin in (a1, b1, a2, b2)]
        dx_ND = torch.empty_like(grad_ND)
        for rows in _chunks(grad_ND):
            x_hat, grad = x_hat_ND[rows], grad_ND[rows]
            dwide, product = swiglu_rows_backward(wide_N2F[rows], grad @ second_DF)
            _add_thin_(sums[2:], product, grad, a2, b2)
            _add_thin_(sums[:2], x_hat, dwide, a1, b1)
            torch.mm(dwide, first_ED, out=dx_ND[rows])
            residual_backward_(dx_ND[rows], x_hat, rstd_N1[rows], grad)
        return dx_ND, *sums, None, None, None


def _thin_gradients(ctx: Any, x_ND: torch.Tensor, grad_NE: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> Any:
    return _thin(x_ND, grad_NE, a, b) if ctx.needs_input_grad[1] else (None, None)


def _thin(x_ND: torch.Tensor, grad_NE: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> list[torch.Tensor]:
    """The gradients of a and b: (grad b)^T x and grad^T (x a^T)."""
    sums = [torch.zeros_like(a), torch.zeros_like(b)]
    for rows in _chunks(x_ND):
        _add_thin_(sums, x_ND[rows], grad_NE[rows], a, b)
    return sums


def _add_thin_(sums: list[torch.Tensor], x: torch.Tensor, grad: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    sums[0].addmm_((grad @ b).T, x)
    sums[1].addmm_(grad.T, x @ a.T)


def _chunks(x_ND: torch.Tensor) -> list[slice]:
    step = TOKENS * torch.get_num_threads()
    return [slice(start, start + step) for start in range(0, len(x_ND), step)]
