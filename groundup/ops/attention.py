"""Attention over packed rows, plain causal rows, or a cache."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def visible(doc_ids_BT: torch.Tensor) -> torch.Tensor:
    """Bool mask [B, 1, T, T]: a token sees itself and the earlier tokens of its own document.

    Built once a batch and shared by every layer. Filler (-1) sees only filler; its labels are never trained.
    """
    length = doc_ids_BT.shape[1]
    same = doc_ids_BT[:, None, :, None] == doc_ids_BT[:, None, None, :]
    return same & torch.ones(length, length, dtype=torch.bool, device=doc_ids_BT.device).tril()


def attention(
    q_BTHd: torch.Tensor, k_BSKd: torch.Tensor, v_BSKd: torch.Tensor, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """softmax(q k^T / sqrt(d)) v -> [B, T, H, d]. Causal when mask is None; K kv heads serve H query heads."""
    q, k, v = (x.transpose(1, 2) for x in (q_BTHd, k_BSKd, v_BSKd))
    grouped = q.shape[1] != k.shape[1]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped)
    return out.transpose(1, 2)
