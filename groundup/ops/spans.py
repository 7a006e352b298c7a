"""Attention on a CPU over packed rows: only what is visible is computed.

Queries go in blocks of 64. A block looks at the keys from the start of its first token's document to its own end:
nothing left of the document is touched, nothing right of the block (a branch of a forked document looks at its trunk
and at itself, not at the branches between). torch's own CPU kernel computes the whole square,
whatever the mask says. Neighbouring rows whose blocks look about equally far back are computed together, since with
small models the calls cost as much as the products. The probabilities are kept for the backward pass, so this is for
short documents; `short_enough` says when.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from groundup.ops.forks import forked, starts, trunks

BLOCK = 64  # queries: smaller wastes less of the triangle, larger products run faster; 64 won from 256 to 1024 tokens
SLACK = 32  # keys a row that may be computed in vain to save a call
LARGEST = 2**18  # probabilities computed together by a thread (1 MB): what a core's cache holds
MOST_KEYS = 544  # a query, on average: beyond, the probabilities take more memory than they save time


@dataclass(frozen=True)
class Span:
    """Rows [top, bottom), queries [first, end), keys [left, end); bias [rows, 1, queries, 1, keys]: -inf for unseen.

    trunk: the columns [trunk[0], trunk[1]) of a trunk further left, whose keys come first; 0, 0 if there is none.
    """

    top: int
    bottom: int
    left: int
    first: int
    end: int
    bias: torch.Tensor
    trunk: tuple[int, int] = (0, 0)

    @property
    def rows(self) -> slice:
        return slice(self.top, self.bottom)

    @property
    def keys(self) -> int:
        return self.end - self.left + self.trunk[1] - self.trunk[0]

    def numbers(self, heads: int) -> int:
        return (self.bottom - self.top) * heads * (self.end - self.first) * self.keys

    def take(self, x_BKTd: torch.Tensor) -> torch.Tensor:
        """The keys' share of x, [rows * K, keys, d]: a view where no trunk stands apart."""
        near = x_BKTd[self.rows, :, self.left : self.end]
        if self.trunk[1]:
            near = torch.cat([x_BKTd[self.rows, :, slice(*self.trunk)], near], 2)
        return near.flatten(0, 1)

    def give(self, dx_BKTd: torch.Tensor, weights: torch.Tensor, x: torch.Tensor) -> None:
        """dx += weights^T @ x, where `take` took from; weights [rows * K, q * G, keys], x [rows * K, q * G, d]."""
        near = dx_BKTd[self.rows, :, self.left : self.end]
        apart = self.trunk[1] - self.trunk[0]
        near.flatten(0, 1).baddbmm_(weights[..., apart:].transpose(1, 2), x)
        if apart:
            far = dx_BKTd[self.rows, :, slice(*self.trunk)].flatten(0, 1)
            far.baddbmm_(weights[..., :apart].transpose(1, 2), x)


def span_attention(
    q_BTKGd: torch.Tensor, k_BTKd: torch.Tensor, v_BTKd: torch.Tensor, doc_ids_BT: torch.Tensor
) -> torch.Tensor:
    """softmax(q k^T) v -> [B, T, K, G, d], each token over itself and the earlier tokens of its document and its trunk.

    K kv heads, each asked by G query heads. The scale 1 / sqrt(d) must be in q already. Saves a copy where q, k and v
    are views of memory ordered [B, K, T, G, d] and [B, K, T, d].
    """
    return _span_attention(q_BTKGd, k_BTKd, v_BTKd, doc_ids_BT)[0]


def short_enough(doc_ids_BT: torch.Tensor) -> bool:
    """Whether the documents are as short as this is good for: by the keys that queries see on average."""
    places_T, (begin_BT, end_BT) = torch.arange(1, doc_ids_BT.shape[1] + 1), trunks(doc_ids_BT)
    return (places_T - starts(doc_ids_BT) + end_BT - begin_BT).sum().item() <= MOST_KEYS * doc_ids_BT.numel()


_recent: list[tuple[torch.Tensor, int, tuple[Span, ...]]] = []


def find_spans(doc_ids_BT: torch.Tensor, heads: int) -> tuple[Span, ...]:
    """The spans of a batch. Every layer asks, so the last few answers are kept, by content."""
    for known_BT, known_heads, spans in _recent:
        if known_heads == heads and torch.equal(known_BT, doc_ids_BT):
            return spans
    spans = tuple(_plan(doc_ids_BT, heads))
    _recent.insert(0, (doc_ids_BT.clone(), heads, spans))
    del _recent[4:]
    return spans


def _plan(doc_ids_BT: torch.Tensor, heads: int) -> Iterator[Span]:
    rows, length = doc_ids_BT.shape
    columns_T, largest = torch.arange(length), LARGEST * torch.get_num_threads()
    start_BT, (begin_BT, end_BT) = starts(doc_ids_BT), trunks(doc_ids_BT)
    apart_BT = forked(doc_ids_BT) & (end_BT < start_BT)  # other branches stand between
    from_BT = torch.where(forked(doc_ids_BT) & ~apart_BT, begin_BT, start_BT)
    trunk_BT2 = torch.stack([begin_BT, end_BT], -1)
    for first in range(0, length, BLOCK):
        end = min(first + BLOCK, length)
        lefts = from_BT[:, first].tolist()
        far = [tuple(pair) for pair in (trunk_BT2[:, first] * apart_BT[:, first, None]).tolist()]
        top = 0
        while top < rows:
            bottom, left, wasted = top + 1, lefts[top], 0
            while bottom < rows and far[top] == far[bottom]:
                joint = min(left, lefts[bottom])
                wasted += (left - joint) * (bottom - top) + lefts[bottom] - joint
                size = (bottom + 1 - top) * heads * (end - first) * (end - joint + far[top][1] - far[top][0])
                if wasted > SLACK * (bottom - top) or size > largest:
                    break
                bottom, left = bottom + 1, joint
            keys_S = torch.cat([columns_T[slice(*far[top])], columns_T[left:end]])
            own, begin, behind = (x_BT[top:bottom, first:end, None] for x_BT in (start_BT, begin_BT, end_BT))
            seen_BqS = (keys_S >= own) | ((keys_S >= begin) & (keys_S < behind))
            seen_BqS &= keys_S <= columns_T[first:end, None]
            bias_BqS = torch.zeros(seen_BqS.shape).masked_fill_(~seen_BqS, float("-inf"))
            yield Span(top, bottom, left, first, end, bias_BqS[:, None, :, None], far[top])
            top = bottom


@torch.library.custom_op("groundup::span_attention", mutates_args=())
def _span_attention(
    q_BTKGd: torch.Tensor, k_BTKd: torch.Tensor, v_BTKd: torch.Tensor, doc_ids_BT: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(attention [B, T, K, G, d], the probabilities of all spans in one buffer)."""
    q_BKTGd, k_BKTd, v_BKTd = _by_head(q_BTKGd), _by_head(k_BTKd), _by_head(v_BTKd)
    kv_heads, group = q_BKTGd.shape[1], q_BKTGd.shape[3]
    spans = find_spans(doc_ids_BT, kv_heads * group)
    out_BKTGd = torch.empty_like(q_BKTGd)
    buffer = q_BTKGd.new_empty(sum(span.numbers(kv_heads * group) for span in spans))
    for span, probs in _pieces(buffer, spans, kv_heads, group):
        keys, values = span.take(k_BKTd), span.take(v_BKTd)
        torch.bmm(_queries(q_BKTGd, span), keys.transpose(1, 2), out=probs)
        probs.view(-1, kv_heads, span.end - span.first, group, span.keys).add_(span.bias)
        torch.softmax(probs, -1, out=probs)
        torch.bmm(probs, values, out=_queries(out_BKTGd, span))
    return out_BKTGd.transpose(1, 2).contiguous(), buffer


@torch.library.custom_op("groundup::span_attention_backward", mutates_args=())
def _span_attention_backward(
    grad_BTKGd: torch.Tensor,
    q_BTKGd: torch.Tensor,
    k_BTKd: torch.Tensor,
    v_BTKd: torch.Tensor,
    doc_ids_BT: torch.Tensor,
    buffer: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    q_BKTGd, k_BKTd, v_BKTd, grad_BKTGd = (_by_head(x) for x in (q_BTKGd, k_BTKd, v_BTKd, grad_BTKGd))
    kv_heads, group = q_BKTGd.shape[1], q_BKTGd.shape[3]
    dq_BKTGd, dk_BKTd, dv_BKTd = torch.empty_like(q_BKTGd), torch.zeros_like(k_BKTd), torch.zeros_like(v_BKTd)
    for span, probs in _pieces(buffer, find_spans(doc_ids_BT, kv_heads * group), kv_heads, group):
        keys, values = span.take(k_BKTd), span.take(v_BKTd)
        queries, grad = _queries(q_BKTGd, span), _queries(grad_BKTGd, span)
        span.give(dv_BKTd, probs, grad)
        dprobs = torch.bmm(grad, values.transpose(1, 2))
        scores = torch._softmax_backward_data(dprobs, probs, -1, probs.dtype)
        torch.bmm(scores, keys, out=_queries(dq_BKTGd, span))
        span.give(dk_BKTd, scores, queries)
    return dq_BKTGd.transpose(1, 2), dk_BKTd.transpose(1, 2), dv_BKTd.transpose(1, 2)


def _by_head(x_BTK: torch.Tensor) -> torch.Tensor:
    return x_BTK.transpose(1, 2).contiguous()


def _queries(x_BKTGd: torch.Tensor, span: Span) -> torch.Tensor:
    """A view of a span's queries, a matrix [q * G, d] for each row and kv head."""
    block = x_BKTGd[span.rows, :, span.first : span.end]
    return block.view(-1, block.shape[2] * block.shape[3], block.shape[4])


def _pieces(buffer: torch.Tensor, spans: tuple[Span, ...], kv_heads: int, group: int) -> Any:
    """Each span with its probabilities [rows * K, q * G, s] in the buffer."""
    used = 0
    for span in spans:
        size = span.numbers(kv_heads * group)
        yield span, buffer[used : used + size].view(-1, (span.end - span.first) * group, span.keys)
        used += size


@_span_attention.register_fake
def _(q_BTKGd: Any, k_BTKd: Any, v_BTKd: Any, doc_ids_BT: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Shapes for the compiler; how many probabilities there are depends on the documents."""
    return q_BTKGd.new_empty(q_BTKGd.shape), q_BTKGd.new_empty(torch.library.get_ctx().new_dynamic_size())


@_span_attention_backward.register_fake
def _(grad: Any, q_BTKGd: Any, k_BTKd: Any, v_BTKd: Any, doc_ids_BT: Any, buffer: Any) -> Any:
    return tuple(x.new_empty(x.transpose(1, 2).shape).transpose(1, 2) for x in (q_BTKGd, k_BTKd, v_BTKd))


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs, output[1])


def _backward(ctx: Any, grad_BTKGd: torch.Tensor, _: Any) -> Any:
    return *_span_attention_backward(grad_BTKGd, *ctx.saved_tensors), None


_span_attention.register_autograd(_backward, setup_context=_save)
