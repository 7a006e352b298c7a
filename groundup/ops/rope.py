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
    return rows.view(len(rows) // head_dim, 2, head_dim // 2, *rows.shape[1:]).transpose(1, 2)


def norm_and_turn(
    qkv_BTEd: torch.Tensor, scales_Cd: torch.Tensor | None, turns_BTp: torch.Tensor, groups: tuple[int, int], eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries [B, T, K, G, d], keys and values [B, T, K, d] for attention, from the joint product of q, k and v.

    qkv: the heads of q, k and v, pairs side by side. scales: the QK-norm's weights, a row for each head of q and k
    (None: no norm). turns: exp(i angle). groups: (K kv heads, G query heads for each). Memory is ordered by kv head,
    then token, which is how span_attention reads it.
    """
    out: tuple[torch.Tensor, torch.Tensor, torch.Tensor] = _NormAndTurn.apply(
        qkv_BTEd, scales_Cd, turns_BTp, groups, eps
    )
    return out


class _NormAndTurn(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        qkv_BTEd: torch.Tensor,
        scales_Cd: torch.Tensor | None,
        turns_BTp: torch.Tensor,
        groups: tuple[int, int],
        eps: float,
    ) -> Any:
        kv_heads, group = groups
        heads, (rows, length, _, dim) = kv_heads * group, qkv_BTEd.shape
        qk_BTCd, rstd_BTC1 = qkv_BTEd[:, :, : heads + kv_heads], None
        if scales_Cd is not None:
            rstd_BTC1 = rstd_of(qk_BTCd, eps)
            qk_BTCd = (qk_BTCd * rstd_BTC1).mul_(scales_Cd)
        q_BTKGd = qkv_BTEd.new_empty(rows, kv_heads, length, group, dim).transpose(1, 2)
        k_BTKd = qkv_BTEd.new_empty(rows, kv_heads, length, dim).transpose(1, 2)
        q_before, k_before = qk_BTCd[:, :, :heads].unflatten(2, groups), qk_BTCd[:, :, heads:]
        torch.mul(_pairs(q_before), turns_BTp[:, :, None, None], out=_pairs(q_BTKGd))
        torch.mul(_pairs(k_before), turns_BTp[:, :, None], out=_pairs(k_BTKd))
        v_BTKd = qkv_BTEd[:, :, heads + kv_heads :].transpose(1, 2).contiguous().transpose(1, 2)
        ctx.save_for_backward(None if scales_Cd is None else qkv_BTEd, rstd_BTC1, scales_Cd, turns_BTp)
        return q_BTKGd, k_BTKd, v_BTKd

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_q_BTKGd: torch.Tensor, grad_k_BTKd: torch.Tensor, grad_v_BTKd: torch.Tensor) -> Any:
        qkv_BTEd, rstd_BTC1, scales_Cd, turns_BTp = ctx.saved_tensors
        rows, length, kv_heads, group, dim = grad_q_BTKGd.shape
        both = kv_heads * (group + 1)  # heads of q and k
        grad_BTEd = grad_q_BTKGd.new_empty(rows, length, both + kv_heads, dim)
        back_BTp, grad_BTCd = turns_BTp.conj_physical(), grad_BTEd[:, :, :both]
        q_place, k_place = grad_BTCd[:, :, :-kv_heads].unflatten(2, (kv_heads, group)), grad_BTCd[:, :, -kv_heads:]
        torch.mul(_pairs(grad_q_BTKGd), back_BTp[:, :, None, None], out=_pairs(q_place))
        torch.mul(_pairs(grad_k_BTKd), back_BTp[:, :, None], out=_pairs(k_place))
        grad_BTEd[:, :, both:] = grad_v_BTKd
        if scales_Cd is None:
            return grad_BTEd, None, None, None, None
        hat_BTCd = qkv_BTEd[:, :, :both] * rstd_BTC1
        along_BTCd = grad_BTCd * hat_BTCd
        grad_scales_Cd = along_BTCd.sum((0, 1))
        along_BTC1 = along_BTCd.mul_(scales_Cd).sum(-1, keepdim=True).mul_(-1 / dim)
        grad_BTCd.mul_(scales_Cd).addcmul_(hat_BTCd, along_BTC1).mul_(rstd_BTC1)
        return grad_BTEd, grad_scales_Cd, None, None, None


def _pairs(x_d: torch.Tensor) -> torch.Tensor:
    """The last axis as complex numbers, half as many."""
    return torch.view_as_complex(x_d.unflatten(-1, (-1, 2)))
