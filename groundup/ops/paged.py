"""Attention over a paged cache: keys and values lie in blocks anywhere in memory, a table says where.

Plain: gather, then torch's scaled_dot_product_attention. Fast, fp32 on a CPU: csrc/decode.c reads the blocks where they
lie. Shapes: a layer's keys and values [P, K, size, d] (P blocks, K kv heads), tables [S, width] (a row a sequence).
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from groundup.ops.native import native, pointer

FEW = 8  # queries of one sequence that are computed one by one; more are a matrix


def paged_attention(
    q_NHd: torch.Tensor,
    keys_PKSd: torch.Tensor,
    values_PKSd: torch.Tensor,
    tables_SW: torch.Tensor,
    sequence_N: torch.Tensor,
    lengths_N: torch.Tensor,
    pieces: Sequence[tuple[int, int]],
) -> torch.Tensor:
    """softmax(q k^T / sqrt(d)) v -> [N, H, d] for N queries, each over the first tokens of its sequence.

    pieces: (first token, queries) of each sequence, in the order of the queries. The same for each query, int32:
    sequence, its row of `tables`; lengths, how many tokens it sees.
    """
    cpu_fp32 = q_NHd.device.type == "cpu" and q_NHd.dtype == keys_PKSd.dtype == torch.float32
    library = native("decode") if cpu_fp32 and q_NHd.shape[-1] <= 256 and keys_PKSd.shape[2] <= 64 else None
    if library is None:
        return _by_pieces(q_NHd, keys_PKSd, values_PKSd, tables_SW, sequence_N, lengths_N, pieces)
    (n, heads, dim), (_, kv_heads, size, _) = q_NHd.shape, keys_PKSd.shape
    q_NHd, out = q_NHd.contiguous(), torch.empty_like(q_NHd, memory_format=torch.contiguous_format)
    tensors = (q_NHd, keys_PKSd, values_PKSd, tables_SW, sequence_N, lengths_N, out)
    sizes = (n, heads, kv_heads, dim, size, tables_SW.shape[1])
    library.paged_attention(*map(pointer, tensors), *sizes, ctypes.c_float(dim**-0.5))
    return out


def _by_pieces(
    q_NHd: torch.Tensor,
    keys_PKSd: torch.Tensor,
    values_PKSd: torch.Tensor,
    tables_SW: torch.Tensor,
    sequence_N: torch.Tensor,
    lengths_N: torch.Tensor,
    pieces: Sequence[tuple[int, int]],
) -> torch.Tensor:
    """Single queries together; every longer piece by itself, as a matrix."""
    singles = [count <= FEW for _, count in pieces]
    if all(singles):
        return plain(q_NHd, keys_PKSd, values_PKSd, tables_SW, sequence_N, lengths_N)
    out_NHd, at = torch.empty_like(q_NHd), 0
    few_N = torch.tensor([single for single, (_, count) in zip(singles, pieces, strict=True) for _ in range(count)])
    few = few_N.nonzero().squeeze(1).to(q_NHd.device)
    if len(few):
        out_NHd[few] = plain(q_NHd[few], keys_PKSd, values_PKSd, tables_SW, sequence_N[few], lengths_N[few])
    for row, (first, count) in enumerate(pieces):
        if count > FEW:
            total = first + count
            table = tables_SW[row, : -(-total // keys_PKSd.shape[2])]
            keys_KLd, values_KLd = (_gathered(cache, table, total) for cache in (keys_PKSd, values_PKSd))
            out_NHd[at : at + count] = _chunk(q_NHd[at : at + count], keys_KLd, values_KLd)
        at += count
    return out_NHd


def plain(
    q_NHd: torch.Tensor,
    keys_PKSd: torch.Tensor,
    values_PKSd: torch.Tensor,
    tables_SW: torch.Tensor,
    sequence_N: torch.Tensor,
    lengths_N: torch.Tensor,
) -> torch.Tensor:
    """Attention of single queries in torch's operators: static in shape, as a CUDA graph wants it."""
    rows_NW = tables_SW[sequence_N.long()].long()
    keys_NKLd, values_NKLd = (
        cache_PKSd[rows_NW].transpose(1, 2).flatten(2, 3) for cache_PKSd in (keys_PKSd, values_PKSd)
    )
    places_L = torch.arange(keys_NKLd.shape[2], device=q_NHd.device)
    seen_NL = places_L < lengths_N[:, None]
    for gathered in (keys_NKLd, values_NKLd):  # behind the end lies whatever was there: 0 * nan would be nan
        gathered.masked_fill_(~seen_NL[:, None, :, None], 0)
    grouped = q_NHd.shape[1] != keys_PKSd.shape[1]
    out_NH1d = F.scaled_dot_product_attention(
        q_NHd[:, :, None], keys_NKLd, values_NKLd, attn_mask=seen_NL[:, None, None], enable_gqa=grouped
    )
    return out_NH1d[:, :, 0]


def _gathered(cache_PKSd: torch.Tensor, table: torch.Tensor, length: int) -> torch.Tensor:
    """The first `length` keys or values of one sequence, [K, length, d]."""
    return cache_PKSd[table.long()].transpose(0, 1).flatten(1, 2)[:, :length]


def _chunk(q_THd: torch.Tensor, keys_KLd: torch.Tensor, values_KLd: torch.Tensor) -> torch.Tensor:
    """The last T of a sequence's L tokens over all before them and themselves -> [T, H, d]: a piece of a prompt."""
    length, total = q_THd.shape[0], keys_KLd.shape[1]
    grouped, mask = q_THd.shape[1] != keys_KLd.shape[0], None
    if total != length:
        places = torch.arange(total, device=q_THd.device)
        mask = places <= places[total - length :, None]
    out_1HTd = F.scaled_dot_product_attention(
        q_THd.transpose(0, 1)[None],
        keys_KLd[None],
        values_KLd[None],
        attn_mask=mask,
        is_causal=mask is None,
        enable_gqa=grouped,
    )
    return out_1HTd[0].transpose(0, 1)
