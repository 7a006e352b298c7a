"""Answers that are judged one by one: their label goes with them through shards and rows; and rows made in memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from groundup.data.batch import IGNORE, PackedDataset, open_dataset
from groundup.data.documents import Document, documents, mismatched, pack_documents
from groundup.data.mix import Source
from groundup.errors import UserError
from groundup.tokenizer import Tokenizer

Write = Callable[..., str]


def judged(number: int, answer: str, label: bool) -> dict[str, Any]:
    return {"prompt": f"question {number}?", "completion": answer, "label": label}


def opened(path: str, tokenizer: Tokenizer, folder: Path, seq_len: int = 96, **options: Any) -> PackedDataset:
    data, _ = open_dataset(
        [Source(path)], tokenizer, kind="unpaired", seq_len=seq_len, cache_dir=folder / "cache", seed=0, **options
    )
    return data


def test_the_label_stays_with_its_answer(tokenizer: Tokenizer, write: Write, tmp_path: Path) -> None:
    rows = [judged(n, "good" * (1 + n % 5) if n % 3 else "bad" * (1 + n % 4), n % 3 > 0) for n in range(60)]
    data = opened(write("judged.jsonl", rows), tokenizer, tmp_path)
    assert data.documents == 60 and data.wanted is not None and int(data.wanted.sum()) == 40 and len(data) > 3
    seen = []
    for row in range(len(data)):
        batch = data.row(row)
        docs, labels = batch.doc_ids_BT[0], batch.labels_BT[0]
        for one in docs[docs >= 0].unique().tolist():
            said = tokenizer.decode(labels[(docs == one) & (labels != IGNORE)].tolist())
            assert ("good" in said) == (one % 2 == 0) and ("bad" in said) == (one % 2 == 1)
            seen.append(one)
    assert len(seen) == 60
    again = opened(write("judged.jsonl", rows), tokenizer, tmp_path)  # from disk
    assert torch.equal(again.row(0).doc_ids_BT, data.row(0).doc_ids_BT)


def test_only_the_last_answer_is_judged_and_pairs_are_two_of_them(
    tokenizer: Tokenizer, write: Write, tmp_path: Path
) -> None:
    said = [
        {"role": "user", "content": "a?"},
        {"role": "assistant", "content": "first"},
        {"role": "user", "content": "b?"},
    ]
    sides = {name: [*said, {"role": "assistant", "content": name}] for name in ("chosen", "rejected")}
    pairs = opened(write("pairs.jsonl", [sides]), tokenizer, tmp_path)
    single = opened(write("one.jsonl", [{"messages": sides["chosen"], "label": True}]), tokenizer, tmp_path)
    assert pairs.documents == 2 and pairs.wanted is not None and pairs.wanted.sum() == 1
    for data in (pairs, single):
        batch = data.row(0)
        docs, labels = batch.doc_ids_BT[0], batch.labels_BT[0]
        for one in docs[docs >= 0].unique().tolist():
            said_here = tokenizer.decode(labels[(docs == one) & (labels != IGNORE)].tolist(), skip_special_tokens=True)
            assert said_here.strip() == ("chosen" if one % 2 == 0 else "rejected")


def test_long_ones_are_cut_and_other_rows_named(tokenizer: Tokenizer, write: Write, tmp_path: Path) -> None:
    data = opened(write("long.jsonl", [judged(1, "good " * 300, True), judged(2, "bad", False)]), tokenizer, tmp_path)
    assert all((data.row(i).labels_BT != IGNORE).any() for i in range(len(data)))
    with pytest.raises(UserError, match=r"chat.jsonl:1: a row of kind Chat where a judged answer"):
        row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
        opened(write("chat.jsonl", [row]), tokenizer, tmp_path)


@pytest.mark.parametrize("kind", ["unpaired", "preference"])
def test_documents_are_found_again_by_their_numbers(
    kind: str, tokenizer: Tokenizer, write: Write, tmp_path: Path
) -> None:
    def pair(n: int) -> dict[str, Any]:
        return {"prompt": f"{n}?", "chosen": "yes " * (n % 5 + 1), "rejected": "no " * (n % 3 + 1)}

    paths = [write(f"{i}.jsonl", [pair(n) for n in range(i, 30, 2)]) for i in (0, 1)]
    options: dict[str, Any] = {"kind": kind, "seq_len": 80, "cache_dir": tmp_path / "c", "seed": 3}
    data, held = open_dataset([Source(p, 1.5) for p in paths], tokenizer, val_fraction=0.2, **options)
    assert held is not None
    for some in (data, held):
        rows = np.array([len(some) - 1, 0])
        row, shard, number = some.documents_of(rows)
        found = [one for row_of in documents(some.batch(rows)) for one in row_of]
        assert len(found) == len(number) and set(row.tolist()) == set(rows.tolist())
        for document, s, n in zip(found, shard, number, strict=True):
            offsets, tokens = some.shards[s].offsets, some.shards[s].tokens
            assert document.ids.tolist() == tokens[offsets[n] : offsets[n + 1]].tolist()


def test_rows_made_in_memory_are_those_of_files(tokenizer: Tokenizer, write: Write, tmp_path: Path) -> None:
    data = opened(write("j.jsonl", [judged(n, "good" * (1 + n % 5), True) for n in range(20)]), tokenizer, tmp_path)
    stored = data.batch(np.arange(len(data)))
    made = pack_documents([one for row in documents(stored) for one in row], data.seq_len, data.pad_id)
    assert sorted(_texts(made)) == sorted(_texts(stored))
    for batch in (made, stored):
        positions, docs = batch.position_ids_BT, batch.doc_ids_BT
        assert ((positions == 0) == (docs != torch.cat([docs[:, :1] - 7, docs[:, :-1]], 1))).all()
    assert made.doc_ids_BT.dtype == stored.doc_ids_BT.dtype and made.labels_BT.dtype == stored.labels_BT.dtype
    assert (pack_documents([], 16, 0).doc_ids_BT == -1).all(), "nothing makes a row of filler"


def _texts(batch: Any) -> list[tuple[list[int], list[int]]]:
    return [(one.ids.tolist(), one.labels.tolist()) for row in documents(batch) for one in row]


def test_groups_share_a_row_in_their_order() -> None:
    made = [Document.of([n] * 3, [n + 100] * (1 + n % 7)) for n in range(40)]
    batch = pack_documents(made, 32, 0, together=2)
    for row in documents(batch):
        numbers = [int(one.ids[0]) for one in row]
        assert len(numbers) % 2 == 0 and all(
            a % 2 == 0 and b == a + 1 for a, b in zip(numbers[::2], numbers[1::2], strict=True)
        )


def test_a_mismatch_is_the_question_with_the_answer_before() -> None:
    row = [Document.of([1, 2], [10, 11]), Document.of([3], [12, 13, 14]), Document.of([4, 5, 6], [15])]
    before = Document.of([9, 9], [20, 21, 22, 23])
    first, second, third = mismatched(before, row, 5)
    assert first.ids.tolist() == [1, 2, 20, 21, 22], "cut to a row"
    assert first.labels.tolist() == [IGNORE, 20, 21, 22, IGNORE]
    assert second.ids.tolist() == [3, 10, 11] and second.labels.tolist() == [10, 11, IGNORE]
    assert third.ids.tolist() == [4, 5, 6, 12, 13] and third.labels.tolist() == [IGNORE, IGNORE, 12, 13, IGNORE]
