"""Figures of the documents in packed rows equal those of each document alone."""

from __future__ import annotations

import pytest
import torch

from groundup.objectives.documents import Documents, per_document

DOC_IDS = torch.tensor([[0, 0, 0, 1, 1, -1], [0, 2, 2, 2, 2, 2], [-1, -1, -1, -1, -1, -1]], dtype=torch.int32)
MASK = torch.tensor([[0, 1, 1, 0, 0, 0], [1, 0, 1, 0, 1, 0], [0, 0, 0, 0, 0, 0]])
VALUES = torch.arange(18.0).view(3, 6)


def test_documents_are_numbered_row_by_row():
    documents = Documents(DOC_IDS)
    assert documents.number == 4
    assert documents.index_BT.tolist() == [[0, 0, 0, 1, 1, 4], [2, 3, 3, 3, 3, 3], [4] * 6]


def test_neighbours_with_one_number_in_two_rows_are_two_documents():
    assert per_document(torch.ones(2, 3), torch.zeros(2, 3, dtype=torch.int32)).tolist() == [3, 3]


def test_sums_counts_and_means():
    documents = Documents(DOC_IDS)
    assert documents.sum(VALUES).tolist() == [3, 7, 6, 45]
    assert documents.sum(VALUES, MASK).tolist() == [3, 0, 6, 18]
    assert documents.count(MASK).tolist() == [2, 0, 1, 2]
    assert documents.mean(VALUES, MASK).tolist() == [1.5, 0, 6, 9]
    assert documents.last(MASK).tolist() == [2, -1, 6, 10]
    assert documents.spread(torch.tensor([1.0, 2, 3, 4])).tolist() == [[1, 1, 1, 2, 2, 0], [3, 4, 4, 4, 4, 4], [0] * 6]


def test_values_outside_the_mask_are_not_looked_at():
    values = torch.where(MASK.bool(), VALUES, torch.nan).requires_grad_()
    sums = Documents(DOC_IDS).mean(values, MASK)
    sums.sum().backward()
    assert sums.tolist() == [1.5, 0, 6, 9]
    assert values.grad.tolist() == [[0, 0.5, 0.5, 0, 0, 0], [1, 0, 0.5, 0, 0.5, 0], [0] * 6]


def test_nothing_but_filler():
    documents = Documents(DOC_IDS[2:])
    assert documents.number == 0
    assert documents.sum(VALUES[2:]).shape == documents.last(MASK[2:]).shape == (0,)
    assert documents.spread(torch.zeros(0)).tolist() == [[0.0] * 6]


def test_sums_of_many_tokens_lose_nothing():
    values, one = torch.full((1, 5000), -0.1), torch.zeros(1, 5000, dtype=torch.int32)
    assert per_document(values, one).item() == pytest.approx(values.double().sum().item(), rel=1e-7)
    assert per_document(values.bfloat16(), one).item() == pytest.approx(values.bfloat16().double().sum().item())
    assert per_document(values.double(), one).dtype == torch.float64


def test_autocast_does_not_round_them():
    with torch.autocast("cpu", torch.bfloat16):
        total = per_document(torch.full((1, 300), 1.001), torch.zeros(1, 300, dtype=torch.int32))
    assert total.dtype == torch.float32 and total.item() == pytest.approx(300.3)
