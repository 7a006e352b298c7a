from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from groundup.data.pack import WINDOW, cut, pack


def corpus(n: int = 3000, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).lognormal(5, 1, n).astype(np.int64) + 1


def test_cut_keeps_every_token_once_and_says_where_a_document_goes_on():
    lengths, seq_len = np.array([5, 8, 16, 17, 1]), 8
    pieces = cut(lengths, seq_len)
    assert pieces.document.tolist() == [0, 1, 2, 2, 3, 3, 3, 4]
    assert pieces.start.tolist() == [0, 0, 0, 8, 0, 8, 16, 0]
    assert pieces.length.tolist() == [5, 8, 8, 8, 8, 8, 1, 1]
    assert pieces.continues.tolist() == [False, False, True, False, True, True, False, False]


@pytest.mark.parametrize("seq_len", [64, 256, 1024])
def test_every_piece_is_in_one_row_and_no_row_overflows(seq_len: int):
    lengths = cut(corpus(), seq_len).length
    packing = pack(lengths, seq_len)
    assert sorted(packing.order.tolist()) == list(range(len(lengths)))
    rows = np.add.reduceat(lengths[packing.order], packing.offsets[:-1])
    assert rows.max() <= seq_len and rows.min() > 0
    assert packing.fill == pytest.approx(rows.sum() / (len(rows) * seq_len))


def test_fill_is_above_99_5_percent_on_documents_of_all_lengths():
    for seq_len in (256, 512, 1024, 2048):
        assert pack(cut(corpus(20_000), seq_len).length, seq_len).fill > 0.995, seq_len


def test_best_fit_needs_the_fewest_rows_where_that_is_known():
    # 3 + 5, 4 + 4, 6 + 2: three full rows of 8 hold them all; first come, first served needs four.
    for seed in range(20):
        assert pack(np.array([3, 4, 6, 5, 4, 2]), 8, seed).fill == 1.0


def test_rows_mix_lengths():
    """Strict order of length would fill rows with pieces of one length: often of one template."""
    lengths = np.clip(np.random.default_rng(1).normal(45, 12, 20_000), 20, 120).astype(np.int64)
    packing = pack(lengths, 512)
    row = np.repeat(np.arange(len(packing.offsets) - 1), np.diff(packing.offsets))
    spread = [np.ptp(lengths[packing.order][row == r]) for r in range(0, len(packing.offsets) - 1, 50)]
    assert np.mean(spread) > 5


def test_packing_depends_on_the_seed_alone():
    lengths = cut(corpus(), 256).length
    one, same, other = pack(lengths, 256, 1), pack(lengths, 256, 1), pack(lengths, 256, 2)
    assert (one.order == same.order).all() and (one.offsets == same.offsets).all()
    assert (one.order != other.order).any()


def test_more_than_a_window():
    lengths = np.random.default_rng(0).integers(1, 33, WINDOW + 1000).astype(np.int32)
    packing = pack(lengths, 32)
    assert (np.sort(packing.order) == np.arange(len(lengths))).all()
    assert np.add.reduceat(lengths[packing.order], packing.offsets[:-1]).max() <= 32
    assert packing.fill > 0.998


def test_a_piece_longer_than_a_row_is_refused():
    with pytest.raises(ValueError, match="1 to 8 tokens"):
        pack(np.array([3, 9]), 8)


@pytest.mark.parametrize("page", ["packing.md", "packing.zh.md"])
def test_the_experiment_of_the_page_prints_what_the_page_says(page: str, capsys: pytest.CaptureFixture[str]):
    text = (Path(__file__).parents[2] / "docs" / "learn" / page).read_text(encoding="utf-8")
    found = re.search(r"```python\n(.*?)```\n```\n(.*?)```", text, re.DOTALL)
    assert found
    exec(found[1], {})
    assert capsys.readouterr().out == found[2]
