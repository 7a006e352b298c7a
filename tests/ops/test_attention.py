"""Attention by spans equals masked softmax attention, for any cut of rows into documents."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from groundup.ops import spans
from groundup.ops.attention import Documents, attention, document_mask, visible
from groundup.ops.forks import BRANCH


def documents(rows: int, length: int, longest: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.full((rows, length), -1, dtype=torch.int32)
    for row in range(rows):
        start, index = 0, 0
        while start < length - int(torch.randint(0, 20, (), generator=generator)):  # some rows end in filler
            size = int(torch.randint(1, longest + 1, (), generator=generator))
            ids[row, start : start + size] = index
            start, index = start + size, index + 1
    return ids


def tensors(rows: int, length: int, heads: int, kv_heads: int, dim: int):
    shapes = [(rows, length, heads, dim), (rows, length, kv_heads, dim), (rows, length, kv_heads, dim)]
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("longest", [1, 7, 60, 300])
@pytest.mark.parametrize("length", [1, 63, 64, 200])
@pytest.mark.parametrize("heads", [(4, 2), (3, 1), (2, 2)])
def test_spans_equal_masked_attention(heads, length, longest):
    doc_ids = documents(3, length, longest)
    q, k, v = tensors(3, length, *heads, dim=8)
    fast = attention(q, k, v, Documents(doc_ids))
    plain = attention(q, k, v, visible(doc_ids))
    slope = torch.randn(plain.shape, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(fast, plain, atol=1e-5, rtol=1e-4)
    for a, b in zip(
        torch.autograd.grad(fast, (q, k, v), slope), torch.autograd.grad(plain, (q, k, v), slope), strict=True
    ):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def forking(*rows: list[tuple[int, list[int]]], length: int) -> torch.Tensor:
    """Rows of documents: (tokens of the trunk, tokens of each branch)."""
    ids = torch.full((len(rows), length), -1, dtype=torch.int32)
    for row, documents in zip(ids, rows, strict=True):
        at = 0
        for number, (trunk, branches) in enumerate(documents):
            for branch, size in enumerate([trunk, *branches]):
                row[at : at + size] = number + BRANCH * branch
                at += size
    return ids


def test_a_branch_sees_its_trunk_and_itself():
    torch.manual_seed(0)
    doc_ids = forking([(3, [2, 4]), (5, []), (2, [1, 1])], length=20)
    q, k, v = tensors(1, 20, 4, 2, 8)
    out = attention(q, k, v, visible(doc_ids))
    alone = {"first": [0, 1, 2, 3, 4], "second": [0, 1, 2, 5, 6, 7, 8], "third": [14, 15, 17]}
    for places in alone.values():
        expected = attention(q[:, places], k[:, places], v[:, places])
        torch.testing.assert_close(out[:, places], expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("heads", [(4, 2), (2, 2)])
def test_spans_equal_masked_attention_where_documents_fork(heads):
    doc_ids = forking(
        [(100, [64, 30, 90]), (7, [3, 3])],
        [(1, [1, 130, 70]), (40, []), (60, [20])],
        [(100, [64, 30, 90])],
        [(64, [64, 64, 64])],
        length=310,
    )
    q, k, v = tensors(4, 310, *heads, dim=8)
    fast, plain = (attention(q, k, v, mask) for mask in (Documents(doc_ids), visible(doc_ids)))
    slope = torch.randn(plain.shape, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(fast, plain, atol=1e-5, rtol=1e-4)
    grads = (torch.autograd.grad(out, (q, k, v), slope) for out in (fast, plain))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_spans_leave_the_branches_between_out():
    doc_ids = forking([(128, [128] * 7)], length=1024)
    done = sum(span.numbers(heads=1) for span in spans.find_spans(doc_ids, heads=1))
    triangle = 128 * (128 + spans.BLOCK) / 2
    assert done == 8 * triangle + 7 * 128 * 128
    assert isinstance(
        document_mask((1, 8192), forking([(128, [128] * 63)], length=8192), torch.device("cpu")), Documents
    )


def test_spans_compute_little_more_than_is_visible():
    doc_ids = documents(8, 512, 60)
    done = sum(span.numbers(heads=1) for span in spans.find_spans(doc_ids, heads=1))
    assert done < 0.3 * 8 * 512 * 512
    whole = torch.zeros(8, 512, dtype=torch.int32)
    assert sum(span.numbers(heads=1) for span in spans.find_spans(whole, heads=1)) == 8 * 512 * (512 + spans.BLOCK) / 2


def test_plans_are_remembered_by_content_not_by_address():
    doc_ids = documents(2, 100, 30)
    first = spans.find_spans(doc_ids, heads=2)
    assert spans.find_spans(doc_ids.clone(), heads=2) is first
    doc_ids[:, 50:] += 1  # the same tensor, another batch
    assert spans.find_spans(doc_ids, heads=2) is not first


def test_the_operator_keeps_torchs_contract():
    q, k, v = tensors(2, 20, 4, 2, 8)
    inputs = (q.unflatten(2, (2, 2)), k, v, documents(2, 20, 9))
    torch.library.opcheck(spans._span_attention, inputs, test_utils=("test_schema", "test_autograd_registration"))


def test_mask_is_chosen_by_length():
    cpu = torch.device("cpu")
    assert isinstance(document_mask((2, 256), None, cpu), Documents)
    assert document_mask((1, 4096), None, cpu) is None  # plain causal: torch's kernel keeps no probabilities
    long = torch.zeros(1, 4096, dtype=torch.int32)
    assert document_mask((1, 4096), long, cpu).dtype == torch.bool
    short = torch.arange(4096).div(100, rounding_mode="floor").int()[None]
    assert isinstance(document_mask((1, 4096), short, cpu), Documents)


def test_causal_and_grouped_heads():
    q, k, v = tensors(2, 9, 4, 2, 8)
    scores = torch.einsum("bthd,bshd->bhts", q, k.repeat_interleave(2, 2)) / 8**0.5
    scores = scores.masked_fill(torch.ones(9, 9).triu(1).bool(), float("-inf"))
    expected = torch.einsum("bhts,bshd->bthd", F.softmax(scores, -1), v.repeat_interleave(2, 2))
    for mask in (None, Documents(torch.zeros(2, 9, dtype=torch.int32))):
        torch.testing.assert_close(attention(q, k, v, mask), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.slow
def test_flex_attention_of_cuda_runs_say_the_same():
    """No GPU in the tests: the mask and the call are checked with FlexAttention's CPU forward."""
    from groundup.ops.attention import _block_mask

    q, k, v = (x.detach() for x in tensors(2, 256, 4, 2, 32))
    for doc_ids in (documents(2, 256, 90), forking([(70, [50, 40])], [(9, [30]), (100, [1, 60])], length=256)):
        with torch.no_grad():
            found, wanted = (attention(q, k, v, mask) for mask in (_block_mask(doc_ids), visible(doc_ids)))
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)
