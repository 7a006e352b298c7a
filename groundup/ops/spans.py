"""Attention on a CPU over packed rows: only what is visible is computed.

A span is a run of queries and the keys that they may see: tokens [queries, end) look at [start, end), all inside one
document, a block of at most 64 queries. Nothing left of the document is touched, and of what lies right of the block
only a triangle. torch's own CPU kernel computes the whole square, whatever the mask says.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any

import torch
from torch.autograd.function import once_differentiable

BLOCK = 64  # queries a span: smaller wastes less of the triangle, larger products run faster; 64 won from 256 to 1024

Span = tuple[int, int, int]  # first visible token, first query, end of both


def find_spans(shape: tuple[int, int], doc_ids_BT: torch.Tensor | None) -> list[Span]:
    """The spans of a batch of `shape` (rows, tokens), over its tokens counted through all rows."""
    rows, length = shape
    starts = torch.zeros(rows, length, dtype=torch.bool)
    starts[:, 0] = True
    if doc_ids_BT is not None:
        starts[:, 1:] = doc_ids_BT[:, 1:] != doc_ids_BT[:, :-1]
    bounds = [*starts.view(-1).nonzero().squeeze(1).tolist(), rows * length]
    return [
        (start, first, min(first + BLOCK, end))
        for start, end in itertools.pairwise(bounds)
        for first in range(start, end, BLOCK)
    ]


def span_attention(q_KNGd: torch.Tensor, k_KNd: torch.Tensor, v_KNd: torch.Tensor, spans: list[Span]) -> torch.Tensor:
    """softmax(q k^T) v by kv head, [K, N, G, d]. The scale 1 / sqrt(d) is in q already."""
    return _SpanAttention.apply(q_KNGd, k_KNd, v_KNd, spans)


class _SpanAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q_KNGd: torch.Tensor, k_KNd: torch.Tensor, v_KNd: torch.Tensor, spans: list[Span]) -> Any:
        out_KNGd, keys_KdN = torch.empty_like(q_KNGd), k_KNd.transpose(1, 2)
        probs = q_KNGd.new_empty(sum(_size(q_KNGd, span) for span in spans))
        for span, probs_Kqs in _pieces(probs, q_KNGd, spans):
            start, first, end = span
            torch.bmm(_rows(q_KNGd, span), keys_KdN[:, :, start:end], out=probs_Kqs)
            own = probs_Kqs.unflatten(1, (end - first, -1))[..., first - start :]
            own += _future(end - first)
            torch.softmax(probs_Kqs, -1, out=probs_Kqs)
            torch.bmm(probs_Kqs, v_KNd[:, start:end], out=_rows(out_KNGd, span))
        ctx.spans = spans
        ctx.save_for_backward(q_KNGd, k_KNd, v_KNd, probs)
        return out_KNGd

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_KNGd: torch.Tensor) -> Any:
        q_KNGd, k_KNd, v_KNd, probs = ctx.saved_tensors
        grad_KNGd = grad_KNGd.contiguous()
        dq_KNGd, dk_KNd, dv_KNd = torch.empty_like(q_KNGd), torch.zeros_like(k_KNd), torch.zeros_like(v_KNd)
        values_KdN = v_KNd.transpose(1, 2)
        for span, probs_Kqs in _pieces(probs, q_KNGd, ctx.spans):
            seen = slice(span[0], span[2])
            grad_Kqd = _rows(grad_KNGd, span)
            dv_KNd[:, seen].baddbmm_(probs_Kqs.transpose(1, 2), grad_Kqd)
            dprobs_Kqs = torch.bmm(grad_Kqd, values_KdN[:, :, seen])
            scores = torch._softmax_backward_data(dprobs_Kqs, probs_Kqs, -1, q_KNGd.dtype)
            torch.bmm(scores, k_KNd[:, seen], out=_rows(dq_KNGd, span))
            dk_KNd[:, seen].baddbmm_(scores.transpose(1, 2), _rows(q_KNGd, span))
        return dq_KNGd, dk_KNd, dv_KNd, None


def _rows(x_KNGd: torch.Tensor, span: Span) -> torch.Tensor:
    """A span's queries, [K, q * G, d]: those of one kv head are one matrix."""
    return x_KNGd[:, span[1] : span[2]].flatten(1, 2)


def _size(q_KNGd: torch.Tensor, span: Span) -> int:
    start, first, end = span
    return q_KNGd.shape[0] * q_KNGd.shape[2] * (end - first) * (end - start)


def _pieces(probs: torch.Tensor, q_KNGd: torch.Tensor, spans: list[Span]) -> Any:
    """Each span with its place [K, q * G, s] in the one buffer of probabilities."""
    used = 0
    for span in spans:
        size = _size(q_KNGd, span)
        yield span, probs[used : used + size].view(q_KNGd.shape[0], -1, span[2] - span[0])
        used += size


@functools.lru_cache(maxsize=BLOCK)
def _future(size: int) -> torch.Tensor:
    """-inf where a key of the block comes after its query, [size, 1, size]."""
    return torch.full((size, size), float("-inf")).triu(1)[:, None]
