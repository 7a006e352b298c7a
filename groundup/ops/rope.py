"""Apply rotary position embeddings: turn each pair (i, i + d/2) of a head by its position's angle.

RoFormer, arXiv 2104.09864; where the angles come from is model/rope.py. Fast on a CPU: with the two numbers of a pair
side by side, a turn is one complex product, one pass where the halves of Hugging Face's order take five. Attention
does not care in which order a head's numbers stand, so the rows of the query and key matrices are put in that order
(`pairs_first`) and nothing else changes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from groundup.ops.norm import rstd_of


def apply_rope(x_BTHd: torch.Tensor, cos_BTp: torch.Tensor, sin_BTp: torch.Tensor) -> torch.Tensor:
    """Rotate queries or keys. cos, sin hold d/2 angles a position; Hugging Face's order of pairs (halves)."""
    cos, sin = cos_BTp[:, :, None], sin_BTp[:, :, None]
    a, b = x_BTHd.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x_BTHd.dtype)


def pairs_first(rows: torch.Tensor, head_dim: int) -> torch.Tensor:
    """The first axis (heads * head_dim) with each head in the order 0, d/2, 1, d/2 + 1, ...: [heads, d/2, 2, ...]."""
    return rows.view(-1, 2, head_dim // 2, *rows.shape[1:]).transpose(1, 2)


def norm_and_turn(
    qkv_NEd: torch.Tensor, scales_Cd: torch.Tensor | None, turns_N1p: torch.Tensor, groups: tuple[int, int], eps: float
) -> Any:
    """Queries [K, N, G, d] and keys [K, N, d] ready for attention, and values [K, N, d], from their joint product.

    qkv: [tokens, heads of q, k, v, d] with pairs side by side. scales: the QK-norm's weights, a row for each head of q
    and k (None: no norm). turns: exp(i angle) a token and pair. groups: (K kv heads, G query heads for each).
    Memory is laid out for attention: all tokens of one kv head are neighbours.
    """
    return _NormAndTurn.apply(qkv_NEd, scales_Cd, turns_N1p, groups, eps)


class _NormAndTurn(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        qkv_NEd: torch.Tensor,
        scales_Cd: torch.Tensor | None,
        turns_N1p: torch.Tensor,
        groups: tuple[int, int],
        eps: float,
    ) -> Any:
        kv_heads, group = groups
        heads, (tokens, _, dim) = kv_heads * group, qkv_NEd.shape
        qk_NCd = qkv_NEd[:, : heads + kv_heads]
        q_KNGd, k_KNd = qkv_NEd.new_empty(kv_heads, tokens, group, dim), qkv_NEd.new_empty(kv_heads, tokens, dim)
        rstd_NC1 = None
        if scales_Cd is not None:
            rstd_NC1 = rstd_of(qk_NCd, eps)
            qk_NCd = (qk_NCd * rstd_NC1).mul_(scales_Cd)
        turns_N11p = turns_N1p[:, None]
        torch.mul(_pairs(qk_NCd[:, :heads]).unflatten(1, groups), turns_N11p, out=_pairs(q_KNGd).transpose(0, 1))
        torch.mul(_pairs(qk_NCd[:, heads:]), turns_N1p, out=_pairs(k_KNd).transpose(0, 1))
        ctx.save_for_backward(qkv_NEd if scales_Cd is not None else None, rstd_NC1, scales_Cd, turns_N1p)
        return q_KNGd, k_KNd, qkv_NEd[:, heads + kv_heads :].transpose(0, 1).contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_q_KNGd: torch.Tensor, grad_k_KNd: torch.Tensor, grad_v_KNd: torch.Tensor) -> Any:
        qkv_NEd, rstd_NC1, scales_Cd, turns_N1p = ctx.saved_tensors
        (kv_heads, tokens, group, dim), heads = grad_q_KNGd.shape, grad_q_KNGd.shape[0] * grad_q_KNGd.shape[2]
        grad_NEd = grad_q_KNGd.new_empty(tokens, heads + 2 * kv_heads, dim)
        back_N1p = turns_N1p.conj_physical()
        for grad, place in (
            (grad_q_KNGd.transpose(0, 1), grad_NEd[:, :heads].unflatten(1, (kv_heads, group))),
            (grad_k_KNd.transpose(0, 1), grad_NEd[:, heads : heads + kv_heads]),
        ):
            turns = back_N1p[:, None] if grad.ndim == 4 else back_N1p
            torch.mul(_pairs(grad), turns, out=_pairs(place))
        grad_NEd[:, heads + kv_heads :] = grad_v_KNd.transpose(0, 1)
        grad_scales = None
        if scales_Cd is not None:
            grad_NCd = grad_NEd[:, : heads + kv_heads]
            hat_NCd = qkv_NEd[:, : heads + kv_heads] * rstd_NC1
            both_NCd = grad_NCd * hat_NCd
            grad_scales = both_NCd.sum(0)
            along_NC1 = both_NCd.mul_(scales_Cd).sum(-1, keepdim=True).mul_(-1 / dim)
            grad_NCd.mul_(scales_Cd).addcmul_(hat_NCd, along_NC1).mul_(rstd_NC1)
        return grad_NEd, grad_scales, None, None, None


def _pairs(x_d: torch.Tensor) -> torch.Tensor:
    """The last axis as complex numbers, half as many."""
    return torch.view_as_complex(x_d.unflatten(-1, (-1, 2)))
