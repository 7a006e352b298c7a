"""RMSNorm: scale each vector to root mean square 1, then by a learned weight (arXiv 1910.07467).

Fast on a CPU: the vector's size comes from one read (vector_norm), the normalised copy is the only tensor kept, and
where a matrix follows, the weight moves into the matrix (`x_hat * w @ W.T == x_hat @ (W * w).T`), so that neither
direction passes over the tokens for it.
"""

from __future__ import annotations

from ctypes import c_float, c_int64
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from groundup.ops.native import native, pointer


def rms_norm(x_D: torch.Tensor, weight_D: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis; the mean is taken in fp32, the result has x's dtype."""
    if x_D.device.type == "cpu" and x_D.dtype == weight_D.dtype == torch.float32 and not torch.compiler.is_compiling():
        return _RMSNorm.apply(x_D, weight_D, eps)
    return rms_norm_reference(x_D, weight_D, eps)


def rms_norm_reference(x_D: torch.Tensor, weight_D: torch.Tensor, eps: float) -> torch.Tensor:
    """The plain form, which compilers fuse well."""
    x32_D = x_D.float()
    rstd = torch.rsqrt(x32_D.pow(2).mean(-1, keepdim=True) + eps)
    return weight_D.to(x_D.dtype) * (x32_D * rstd).to(x_D.dtype)


def rstd_of(x_D: torch.Tensor, eps: float) -> torch.Tensor:
    """1 / sqrt(mean(x^2) + eps) of each vector, [..., 1], fp32 on a CPU."""
    squares = torch.linalg.vector_norm(x_D, dim=-1, keepdim=True).square_()
    return squares.mul_(1 / x_D.shape[-1]).add_(eps).rsqrt_()


def normalize_backward_(grad_D: torch.Tensor, x_hat_D: torch.Tensor, rstd: torch.Tensor) -> torch.Tensor:
    """The gradient of x from that of x_hat = x * rstd, in place: rstd * (g - x_hat * mean(g * x_hat))."""
    along = (grad_D * x_hat_D).sum(-1, keepdim=True).mul_(-1 / x_hat_D.shape[-1])
    return grad_D.addcmul_(x_hat_D, along).mul_(rstd)


def normalize(x_ND: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(x * rstd, rstd [N, 1]) of fp32 tokens on a CPU: csrc/train.c, else as above."""
    library = native("train")
    if library is None or not x_ND.is_contiguous():
        rstd_N1 = rstd_of(x_ND, eps)
        return x_ND * rstd_N1, rstd_N1
    x_hat_ND, rstd_N1 = torch.empty_like(x_ND), x_ND.new_empty(len(x_ND), 1)
    sizes = (*map(c_int64, x_ND.shape), torch.get_num_threads())
    library.normalize(*map(pointer, (x_ND, x_hat_ND, rstd_N1)), c_float(eps), *sizes)
    return x_hat_ND, rstd_N1


def residual_backward_(
    grad_ND: torch.Tensor, x_hat_ND: torch.Tensor, rstd_N1: torch.Tensor, beside_ND: torch.Tensor
) -> torch.Tensor:
    """normalize_backward_ plus `beside`, what the residual stream brings: all fp32, contiguous, on a CPU."""
    library = native("train")
    if library is None or not beside_ND.is_contiguous():
        return normalize_backward_(grad_ND, x_hat_ND, rstd_N1).add_(beside_ND)
    sizes = (*map(c_int64, grad_ND.shape), torch.get_num_threads())
    library.normalize_backward(*map(pointer, (grad_ND, x_hat_ND, rstd_N1, beside_ND)), *sizes)
    return grad_ND


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_D: torch.Tensor, weight_D: torch.Tensor, eps: float) -> torch.Tensor:
        rstd = rstd_of(x_D, eps)
        x_hat_D = x_D * rstd
        ctx.save_for_backward(x_hat_D, rstd, weight_D)
        return x_hat_D * weight_D

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_D: torch.Tensor) -> Any:
        x_hat_D, rstd, weight_D = ctx.saved_tensors
        need_x, need_weight, _ = ctx.needs_input_grad
        grad_weight = (grad_D * x_hat_D).flatten(0, -2).sum(0) if need_weight else None
        return normalize_backward_(grad_D * weight_D, x_hat_D, rstd) if need_x else None, grad_weight, None


def norm_linear(x_ND: torch.Tensor, weight_ED: torch.Tensor, bias_E: torch.Tensor | None, eps: float) -> Any:
    """(x, normalised(x) @ weight^T + bias): RMSNorm without a weight of its own, into a matrix, and the residual.

    x comes back so that its two gradients, that of the residual stream and that through the norm, meet in one pass.
    """
    return _NormLinear.apply(x_ND, weight_ED, bias_E, eps)


class _NormLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_ND: torch.Tensor, weight_ED: torch.Tensor, bias_E: torch.Tensor | None, eps: float) -> Any:
        rstd_N1 = rstd_of(x_ND, eps)
        x_hat_ND = x_ND * rstd_N1
        ctx.save_for_backward(x_hat_ND, rstd_N1, weight_ED)
        out_NE = x_hat_ND @ weight_ED.T if bias_E is None else torch.addmm(bias_E, x_hat_ND, weight_ED.T)
        return x_ND, out_NE

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_x_ND: torch.Tensor, grad_out_NE: torch.Tensor) -> Any:
        x_hat_ND, rstd_N1, weight_ED = ctx.saved_tensors
        need_x, need_weight, need_bias, _ = ctx.needs_input_grad
        grad_weight = (x_hat_ND.T @ grad_out_NE).T if need_weight else None  # this way round: a sixth faster
        grad_bias = grad_out_NE.sum(0) if need_bias else None
        grad_x = normalize_backward_(grad_out_NE @ weight_ED, x_hat_ND, rstd_N1).add_(grad_x_ND) if need_x else None
        return grad_x, grad_weight, grad_bias, None
