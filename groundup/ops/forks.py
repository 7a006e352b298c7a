"""A row in which a document forks: a prompt once, then several answers that see it, and not each other.

A group's answers share their prompt; computed once, it costs what one of them would pay (Prefix Grouper, arXiv
2506.05433, does it with two attention calls; here it is a question of who sees whom). A document's number says it all:
number + BRANCH * b, b = 1, 2, ... are the branches of the document `number`, which stands right before the first.
"""

from __future__ import annotations

import torch

BRANCH = 1 << 16  # documents of a row, at most; a row has no more tokens


def trunk_ids(doc_ids_BT: torch.Tensor) -> torch.Tensor:
    """Each token's document without its branch; no document's number in filler."""
    return doc_ids_BT & (BRANCH - 1)


def forked(doc_ids_BT: torch.Tensor) -> torch.Tensor:
    """Where branches stand."""
    return doc_ids_BT >= BRANCH


def starts(doc_ids_BT: torch.Tensor) -> torch.Tensor:
    """The column where each token's document, or its branch of one, starts."""
    return _latest(_fresh(doc_ids_BT))


def trunks(doc_ids_BT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The columns from which and up to which each branch's trunk goes; 0 and 0 for what is no branch."""
    fresh_BT, branch_BT = _fresh(doc_ids_BT), forked(doc_ids_BT)
    first_BT = fresh_BT & branch_BT
    first_BT[:, 1:] &= ~branch_BT[:, :-1]
    begin_BT, end_BT = _latest(fresh_BT & ~branch_BT), _latest(first_BT)
    return begin_BT.masked_fill(~branch_BT, 0), end_BT.masked_fill(~branch_BT, 0)


def _fresh(doc_ids_BT: torch.Tensor) -> torch.Tensor:
    fresh_BT = torch.ones_like(doc_ids_BT, dtype=torch.bool)
    fresh_BT[:, 1:] = doc_ids_BT[:, 1:] != doc_ids_BT[:, :-1]
    return fresh_BT


def _latest(marks_BT: torch.Tensor) -> torch.Tensor:
    """The column of the last mark at or before each token, 0 if there is none."""
    return torch.where(marks_BT, torch.arange(marks_BT.shape[1]), 0).cummax(1).values
