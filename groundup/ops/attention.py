"""Attention: softmax(q k^T / sqrt(d)) v, and who sees whom.

Plain: torch's scaled_dot_product_attention with a mask of booleans. Fast, for packed rows: spans.py on a CPU,
FlexAttention on CUDA; both touch what is visible only. `document_mask` chooses, once a batch, for all layers.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from groundup.ops.forks import trunk_ids
from groundup.ops.spans import short_enough, span_attention


@dataclass(frozen=True)
class Documents:
    """A mask by its documents: a token sees itself and the earlier tokens of its own (a branch: of its trunk, too;
    forks.py). For span_attention."""

    doc_ids_BT: torch.Tensor


def document_mask(shape: tuple[int, int], doc_ids_BT: torch.Tensor | None, device: torch.device) -> Any:
    """What `attention` takes as mask for rows of `shape` (rows, tokens): one document a row, or packed ones.

    A Documents on a CPU while they are short; on CUDA a BlockMask for packed rows; else booleans, or None for causal.
    """
    if device.type == "cpu" and not torch.compiler.is_compiling():
        documents = torch.zeros(shape, dtype=torch.int32) if doc_ids_BT is None else doc_ids_BT
        if short_enough(documents):
            return Documents(documents)
    if doc_ids_BT is None:
        return None
    return _block_mask(doc_ids_BT) if _flex_works(device, shape[1]) else visible(doc_ids_BT)


def visible(doc_ids_BT: torch.Tensor) -> torch.Tensor:
    """Bool mask [B, 1, T, T]: a token sees itself and the earlier tokens of its own document, a branch its trunk.

    Filler (-1) sees only filler; its labels are never trained.
    """
    length, keys_B11T = doc_ids_BT.shape[1], doc_ids_BT[:, None, None, :]
    same = (doc_ids_BT[:, None, :, None] == keys_B11T) | (trunk_ids(doc_ids_BT)[:, None, :, None] == keys_B11T)
    return same & torch.ones(length, length, dtype=torch.bool, device=doc_ids_BT.device).tril()


def attention(q_BTHd: torch.Tensor, k_BSKd: torch.Tensor, v_BSKd: torch.Tensor, mask: Any = None) -> torch.Tensor:
    """softmax(q k^T / sqrt(d)) v -> [B, T, H, d]. K kv heads serve H query heads.

    mask: None for causal, booleans [B, 1, T, S] (true: seen), or what `document_mask` gave.
    """
    grouped = q_BTHd.shape[2] != k_BSKd.shape[2]
    if isinstance(mask, Documents):
        q_BTKGd = (q_BTHd * q_BTHd.shape[-1] ** -0.5).unflatten(2, (k_BSKd.shape[2], -1))
        return span_attention(q_BTKGd, k_BSKd, v_BSKd, mask.doc_ids_BT).flatten(2, 3)
    q, k, v = (x.transpose(1, 2) for x in (q_BTHd, k_BSKd, v_BSKd))
    if mask is None or isinstance(mask, torch.Tensor):
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped)
    else:
        out = _flex()(q, k, v, block_mask=mask, enable_gqa=grouped)
    return out.transpose(1, 2)


def _flex_works(device: torch.device, length: int) -> bool:
    """FlexAttention wants CUDA and Triton; its blocks are 128 tokens, so short rows gain nothing."""
    return device.type == "cuda" and length >= 256 and length % 128 == 0 and torch.utils._triton.has_triton()


@functools.cache
def _flex() -> Any:
    """FlexAttention compiled (uncompiled it would build the whole matrix); inside a compiled block, the plain name."""
    from torch.nn.attention.flex_attention import flex_attention

    return flex_attention if torch.compiler.is_compiling() else torch.compile(flex_attention, dynamic=False)


def _block_mask(doc_ids_BT: torch.Tensor) -> Any:
    """The blocks of 128 x 128 that hold anything visible (a few small kernels, once a batch)."""
    from torch.nn.attention.flex_attention import create_block_mask

    trunk_ids_BT = trunk_ids(doc_ids_BT)

    def sees(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return (q >= k) & ((doc_ids_BT[b, q] == doc_ids_BT[b, k]) | (trunk_ids_BT[b, q] == doc_ids_BT[b, k]))

    rows, length = doc_ids_BT.shape
    return create_block_mask(sees, rows, None, length, length, device=str(doc_ids_BT.device))
