"""SwiGLU: silu(gate) * up, the product that gates the feed-forward layer (arXiv 2002.05202).

Fast on a CPU: norm, both matrices, the product and the way back as one step that works through the tokens a chunk at
a time, so that each chunk's wide activations are still in the cache when the next pass wants them. The way back needs
no exponential: with s = silu(g), sigma = sigmoid(g) and the product h = s * u, the slope of h in g is
u * (sigma + s * (1 - sigma)) = u * sigma + h * (1 - sigma) = lerp(h, u, sigma).
"""

from __future__ import annotations

from ctypes import c_int64
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from groundup.ops.native import native, pointer
from groundup.ops.norm import normalize_backward_, rstd_of


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up, elementwise."""
    return F.silu(gate) * up


def swiglu_rows(wide_N2F: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up of fp32 rows [gate, up] on a CPU, contiguous: csrc/train.c, else plain."""
    library, wide = native("train"), wide_N2F.shape[1] // 2
    if library is None:
        return swiglu(*wide_N2F.split(wide, dim=1))
    out_NF = wide_N2F.new_empty(len(wide_N2F), wide)
    sizes = (c_int64(len(wide_N2F)), c_int64(wide), torch.get_num_threads())
    library.swiglu(*map(pointer, (wide_N2F, out_NF)), *sizes)
    return out_NF


def swiglu_rows_backward(wide_N2F: torch.Tensor, grad_NF: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(the gradient of `wide`, swiglu_rows(wide) once more)."""
    library, wide = native("train"), grad_NF.shape[1]
    grad_N2F = torch.empty_like(wide_N2F)
    if library is None:
        (gate, up), (dgate, dup) = wide_N2F.split(wide, dim=1), grad_N2F.split(wide, dim=1)
        sigma = torch.sigmoid(gate)
        silu = gate * sigma
        out_NF = silu * up
        torch.mul(grad_NF, silu, out=dup)
        torch.mul(grad_NF, torch.lerp(out_NF, up, sigma), out=dgate)
        return grad_N2F, out_NF
    out_NF = torch.empty_like(grad_NF)
    sizes = (c_int64(len(wide_N2F)), c_int64(wide), torch.get_num_threads())
    library.swiglu_backward(*map(pointer, (wide_N2F, grad_NF, out_NF, grad_N2F)), *sizes)
    return grad_N2F, out_NF


def residual_ffn(x_ND: torch.Tensor, gate_up_2FD: torch.Tensor, down_DF: torch.Tensor, eps: float) -> torch.Tensor:
    """x + down(silu(gate(x_hat)) * up(x_hat)), x_hat = x normalised; gate_up: both matrices, gate first, [2F, D]."""
    return _ResidualFFN.apply(x_ND, gate_up_2FD, down_DF, eps)


class _ResidualFFN(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_ND: torch.Tensor, gate_up_2FD: torch.Tensor, down_DF: torch.Tensor, eps: float
    ) -> torch.Tensor:
        rstd_N1 = rstd_of(x_ND, eps)
        x_hat_ND = x_ND * rstd_N1
        wide = down_DF.shape[1]
        wide_N2F = x_ND.new_empty(x_ND.shape[0], 2 * wide)
        sigma_NF = x_ND.new_empty(x_ND.shape[0], wide)
        out_ND = torch.empty_like(x_ND)
        for rows in _chunks(x_ND):
            torch.mm(x_hat_ND[rows], gate_up_2FD.T, out=wide_N2F[rows])
            gate, up = wide_N2F[rows].split(wide, dim=1)
            gate.mul_(torch.sigmoid(gate, out=sigma_NF[rows]))  # from here on silu(gate)
            torch.addmm(x_ND[rows], gate * up, down_DF.T, out=out_ND[rows])
        ctx.save_for_backward(x_hat_ND, rstd_N1, wide_N2F, sigma_NF, gate_up_2FD, down_DF)
        return out_ND

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_ND: torch.Tensor) -> Any:
        x_hat_ND, rstd_N1, wide_N2F, sigma_NF, gate_up_2FD, down_DF = ctx.saved_tensors
        wide = down_DF.shape[1]
        dgate_up_D2F, ddown = grad_ND.new_zeros(grad_ND.shape[1], 2 * wide), torch.zeros_like(down_DF)
        dx_ND = torch.empty_like(grad_ND)
        _, need_gate_up, need_down, _ = ctx.needs_input_grad
        for rows in _chunks(grad_ND):
            silu, up = wide_N2F[rows].split(wide, dim=1)
            sigma, grad, x_hat = sigma_NF[rows], grad_ND[rows], x_hat_ND[rows]
            product = silu * up
            if need_down:
                ddown.addmm_(grad.T, product)
            dproduct = grad @ down_DF
            both = torch.empty_like(wide_N2F[rows])
            dgate, dup = both.split(wide, dim=1)
            torch.mul(dproduct, silu, out=dup)
            torch.mul(dproduct, torch.lerp(product, up, sigma, out=product), out=dgate)
            if need_gate_up:
                dgate_up_D2F.addmm_(x_hat.T, both)
            torch.mm(both, gate_up_2FD, out=dx_ND[rows])
            normalize_backward_(dx_ND[rows], x_hat, rstd_N1[rows]).add_(grad)
        return dx_ND, dgate_up_D2F.T if need_gate_up else None, ddown if need_down else None, None


def _chunks(x_ND: torch.Tensor) -> list[slice]:
    """Tokens in pieces that the cores' caches hold; wider models want longer ones, so that the products of a piece
    outweigh adding them to the matrices' gradients."""
    tokens, width = x_ND.shape
    step = max(256, 2 * width) * torch.get_num_threads()
    return [slice(start, start + step) for start in range(0, tokens, step)]
