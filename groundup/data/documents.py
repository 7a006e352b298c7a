"""How do documents that are made while a run goes on become rows? As those of files, without a disk.

KTO gives answers to other questions than their own; on-policy stages hand in what the policy has just said.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from groundup.data.batch import IGNORE, Batch
from groundup.data.mix import Index
from groundup.data.pack import pack


@dataclass(frozen=True)
class Document:
    """ids, and for each the label: the token after it, or -100 where that is not trained."""

    ids: Index
    labels: Index

    @classmethod
    def of(cls, prompt: Sequence[int], answer: Sequence[int]) -> Document:
        """A prompt with an answer, which alone is trained."""
        ids = np.array([*prompt, *answer], np.int64)
        labels = np.full(len(ids), IGNORE, np.int64)
        labels[len(prompt) - 1 : -1] = ids[len(prompt) :]
        return cls(ids, labels)

    @property
    def begin(self) -> int:
        """Where the first trained token stands: the prompt's length."""
        return int(np.argmax(self.labels != IGNORE)) + 1


def documents(batch: Batch) -> list[list[Document]]:
    """What stands in a batch, row by row."""
    found = []
    columns = (batch.input_ids_BT, batch.labels_BT, batch.doc_ids_BT)
    for ids_T, labels_T, docs_T in zip(*(column.numpy() for column in columns), strict=True):
        ends = np.flatnonzero(np.diff(docs_T, append=-2)) + 1
        begins = np.concatenate([[0], ends[:-1]])
        runs = [(b, e) for b, e in zip(begins.tolist(), ends.tolist(), strict=True) if docs_T[b] >= 0]
        found.append([Document(ids_T[b:e], labels_T[b:e]) for b, e in runs])
    return found


def mismatched(before: Document, row: Sequence[Document], seq_len: int) -> list[Document]:
    """Each question of a row with the answer to the question before it; the first one's is that of `before`."""
    made = []
    for asked, said in zip(row, [before, *row], strict=False):
        ids = np.concatenate([asked.ids[: asked.begin], said.ids[said.begin :]])
        labels = np.concatenate([np.full(asked.begin - 1, IGNORE, np.int64), said.labels[said.begin - 1 :]])
        made.append(Document(ids[:seq_len], _ended(labels[:seq_len], len(ids) > seq_len)))
    return made


def pack_documents(made: Sequence[Document], seq_len: int, pad_id: int, together: int = 1) -> Batch:
    """Rows that hold these documents, each of at most seq_len tokens; groups of `together` share a row, in order.

    Without any document: a row of filler.
    """
    groups = [made[i : i + together] for i in range(0, len(made), together)]
    packing = pack(np.array([sum(len(one.ids) for one in group) for group in groups], np.int64), seq_len)
    rows = [
        [one for unit in packing.order[begin:end] for one in groups[unit]]
        for begin, end in zip(packing.offsets[:-1].tolist(), packing.offsets[1:].tolist(), strict=True)
    ] or [[]]
    return Batch(
        _laid((([one.ids for one in row]) for row in rows), seq_len, pad_id),
        _laid((([one.labels for one in row]) for row in rows), seq_len, IGNORE),
        _laid((([np.arange(len(one.ids)) for one in row]) for row in rows), seq_len, None),
        _laid((([np.full(len(one.ids), n) for n, one in enumerate(row)]) for row in rows), seq_len, -1).int(),
    )


def _laid(rows: Iterable[list[NDArray[np.integer]]], seq_len: int, filler: int | None) -> torch.Tensor:
    """One row a list, end to end, filled up; None: counting from 0."""
    laid = []
    for row in rows:
        tokens = np.concatenate([np.zeros(0, np.int64), *row])
        left = seq_len - len(tokens)
        rest = np.arange(left) if filler is None else np.full(left, filler)
        laid.append(np.concatenate([tokens, rest]))
    return torch.from_numpy(np.stack(laid).astype(np.int64))


def _ended(labels: Index, cut: bool) -> Index:
    """The last token of a document that was cut has nothing to foresee."""
    return np.concatenate([labels[:-1], [IGNORE]]) if cut else labels
