"""The C kernels beside torch's operators: the same numbers, and every row's the same whoever stands beside it."""

from __future__ import annotations

import shutil

import pytest
import torch
import torch.nn.functional as F

from groundup.ops.linear import linear
from groundup.ops.native import native
from groundup.ops.paged import paged_attention, plain

needs_compiler = pytest.mark.skipif(not shutil.which("cc"), reason="no C compiler here")


def batch(heads: int, kv_heads: int, dim: int, size: int, seed: int = 0):
    """Random cache and queries: single ones, a long piece from the start, one that goes on."""
    generator = torch.Generator().manual_seed(seed)
    pieces = [(0, 1), (37, 1), (0, 23), (17, 12), (5, 3)]
    width = max(-(-(first + count) // size) for first, count in pieces)
    tables = torch.randperm(len(pieces) * width, generator=generator).view(len(pieces), width).int()
    keys, values = (torch.randn(tables.numel(), kv_heads, size, dim, generator=generator) for _ in range(2))
    of = torch.tensor([row for row, (_, count) in enumerate(pieces) for _ in range(count)], dtype=torch.int32)
    lengths = torch.tensor([first + i + 1 for first, count in pieces for i in range(count)], dtype=torch.int32)
    q = torch.randn(len(of), heads, dim, generator=generator)
    return q, keys, values, tables, of, lengths, pieces


def by_hand(q, keys, values, tables, of, lengths):
    rows = []
    for query, row, length in zip(q, of.tolist(), lengths.tolist(), strict=True):
        k, v = (cache[tables[row].long()].transpose(0, 1).flatten(1, 2)[:, :length] for cache in (keys, values))
        group = len(query) // len(k)
        k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
        weights = (torch.einsum("hd,hld->hl", query, k) * query.shape[-1] ** -0.5).softmax(-1)
        rows.append(torch.einsum("hl,hld->hd", weights, v))
    return torch.stack(rows)


@pytest.mark.parametrize(("heads", "kv_heads", "dim", "size"), [(9, 3, 64, 16), (4, 4, 32, 4), (2, 1, 10, 64)])
@pytest.mark.parametrize("compiled", [True, False])
def test_paged_attention(heads, kv_heads, dim, size, compiled, monkeypatch) -> None:
    if not compiled:
        monkeypatch.setattr("groundup.ops.paged.native", lambda name: None)
    case = batch(heads, kv_heads, dim, size)
    wanted = by_hand(*case[:-1])
    torch.testing.assert_close(paged_attention(*case), wanted, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(plain(*case[:-1]), wanted, atol=2e-6, rtol=1e-5)


@needs_compiler
def test_a_query_does_not_know_its_neighbours() -> None:
    q, keys, values, tables, of, lengths, pieces = batch(9, 3, 64, 16)
    together = paged_attention(q, keys, values, tables, of, lengths, pieces)
    for i in range(len(q)):
        here = slice(i, i + 1)
        piece = [(int(lengths[i]) - 1, 1)]
        assert torch.equal(
            paged_attention(q[here], keys, values, tables, of[here], lengths[here], piece)[0], together[i]
        )


@pytest.mark.parametrize(("outputs", "inputs"), [(960, 576), (33, 50), (4, 16), (7, 5), (130, 1000)])
def test_linear(outputs: int, inputs: int) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(outputs, inputs, generator=generator), torch.randn(outputs, generator=generator)
    x = torch.randn(37, inputs, generator=generator)
    for b in (None, bias):
        torch.testing.assert_close(linear(x, weight, b), F.linear(x, weight, b), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(linear(x[:, :], weight, b), linear(x.clone(), weight, b), atol=0, rtol=0)


@needs_compiler
def test_a_row_does_not_know_its_neighbours() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(99, 203, generator=generator), torch.randn(41, 203, generator=generator)
    together = linear(x, weight)
    for rows in (1, 2, 3, 4, 5, 16, 17, 40):
        assert torch.equal(linear(x[:rows], weight), together[:rows])
        assert torch.equal(linear(x[-rows:], weight), together[-rows:])


def test_without_a_compiler_torch_answers(monkeypatch) -> None:
    monkeypatch.setenv("GROUNDUP_NATIVE", "0")
    native.cache_clear()
    try:
        assert native("decode") is None
        weight, x = torch.randn(5, 6), torch.randn(3, 6)
        assert torch.equal(linear(x, weight), F.linear(x, weight))
    finally:
        native.cache_clear()


def test_a_compiler_that_fails_is_said_once(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("CC", "false")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    native.cache_clear()
    try:
        with pytest.warns(UserWarning, match="does not compile here"):
            assert native("decode") is None
        assert native("decode") is None
        assert not list(tmp_path.rglob("*.so"))
    finally:
        native.cache_clear()


@needs_compiler
def test_denormal_numbers_are_left_alone() -> None:
    """-ffast-math, linked carelessly, would switch them off for the whole process."""
    assert native("decode") is not None
    assert (torch.tensor([1e-30], dtype=torch.float32) * 1e-12).item() > 0
