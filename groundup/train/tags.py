"""Which words count more? The marks around a thought and an answer are few tokens among many, and all depends on them.

MiniMind-R1 weighs their loss 10 times. A mark that is a token of its own is found by its id; one that the tokenizer
spells in pieces (<answer> mostly is) by its text, wherever its pieces begin and end.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from dataclasses import replace
from functools import cached_property
from itertools import accumulate
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from groundup.data.batch import IGNORE, Batch

if TYPE_CHECKING:
    from groundup.tokenizer import Tokenizer

TAGS = ("<think>", "</think>", "<answer>", "</answer>")
NOTHING = "\0"  # stands where nothing is trained, so that no mark reaches over it


class TagWeights:
    """Gives a batch loss weights: `weight` on the trained tokens of the marks, 1 on all others."""

    def __init__(self, tokenizer: Tokenizer, weight: float) -> None:
        self.tokenizer, self.weight = tokenizer, weight
        known = {tag: tokenizer.backend.token_to_id(tag) for tag in TAGS}
        self.ids = torch.tensor([number for number in known.values() if number is not None])
        self.spelled = re.compile("|".join(re.escape(tag) for tag, number in known.items() if number is None) or "(?!)")

    def __call__(self, batch: Batch) -> Batch:
        if self.weight == 1:
            return batch
        marked_BT = torch.isin(batch.labels_BT, self.ids)
        for row, labels_T in enumerate(batch.labels_BT):
            marked_BT[row, self._spelled(labels_T)] = True
        weights_BT = torch.where(marked_BT, self.weight, 1.0)
        return replace(batch, weights_BT=weights_BT if batch.weights_BT is None else batch.weights_BT * weights_BT)

    @cached_property
    def pieces(self) -> list[str]:
        """The text of each id by itself. Parts of a character are no part of a mark."""
        decode = self.tokenizer.backend.decode_batch
        return decode([[number] for number in range(self.tokenizer.vocab_size)], skip_special_tokens=False)

    def _spelled(self, labels_T: Tensor) -> list[int]:
        """Places of the labels that are pieces of a mark."""
        words = [NOTHING if label == IGNORE else self.pieces[label] or NOTHING for label in labels_T.tolist()]
        ends = list(accumulate(map(len, words)))
        found = self.spelled.finditer("".join(words))
        spans = ((bisect_right(ends, mark.start()), bisect_right(ends, mark.end() - 1)) for mark in found)
        return [place for first, last in spans for place in range(first, last + 1)]
