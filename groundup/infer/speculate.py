"""Guess a few tokens, let the model check them all in one step (speculative decoding, arXiv 2211.17192).

A step for one token reads every weight; a step for five reads them once as well. The engine draws each token as it
would without guesses and keeps a guess only where the draw agrees (engine.py, _choose): the text is the same, greedy or
sampled. A guess d is kept with probability p(d), the model's own.
"""

from __future__ import annotations

from collections.abc import Sequence as Ids
from typing import Protocol
from weakref import WeakKeyDictionary

import torch

from groundup.errors import UserError
from groundup.infer.blocks import BlockManager
from groundup.infer.prefix import draft_prefix
from groundup.infer.runner import Runner
from groundup.infer.scheduler import Work
from groundup.infer.sequence import Sequence
from groundup.model.transformer import Transformer


class Drafter(Protocol):
    """tokens: most guesses a step."""

    tokens: int

    def prepare(self, vocab_size: int, blocks: BlockManager) -> None:
        """Called once by the engine. UserError where the two do not fit together."""

    def propose(self, sequences: Ids[Sequence]) -> None:
        """Replace each sequence's draft, which is as long as there is room, by guesses, as many or fewer."""

    def copy(self, source: int, target: int) -> None:
        """A block was copied."""


class NgramDrafter:
    """What followed the last time the text ended like this (prompt lookup): for quoting, code, repeated forms.

    longest, shortest: tokens of the ending that is looked for.
    """

    def __init__(self, tokens: int = 4, longest: int = 4, shortest: int = 2) -> None:
        self.tokens, self.lengths = tokens, range(longest, shortest - 1, -1)
        self._places: WeakKeyDictionary[Sequence, tuple[int, dict[tuple[int, ...], int]]] = WeakKeyDictionary()

    def prepare(self, vocab_size: int, blocks: BlockManager) -> None:
        """Nothing to prepare."""

    def propose(self, sequences: Ids[Sequence]) -> None:
        for sequence in sequences:
            sequence.draft = self._guess(sequence)[: len(sequence.draft)]

    def copy(self, source: int, target: int) -> None:
        """Nothing to copy."""

    def _guess(self, sequence: Sequence) -> list[int]:
        ids = sequence.ids
        done, places = self._places.get(sequence, (0, {}))
        for end in range(done, len(ids)):  # every ending but the present one, with the place that follows it
            for n in self.lengths:
                if end >= n:
                    places[tuple(ids[end - n : end])] = end
        self._places[sequence] = (len(ids), places)
        for n in self.lengths:
            at = places.get(tuple(ids[-n:])) if len(ids) >= n else None
            if at is not None:
                return ids[at : at + self.tokens]
        return []


class ModelDrafter:
    """A smaller model of the same vocabulary, over a cache of its own in the same blocks; its guesses are its argmax.

    It reads a text when it first guesses on it. Where a block was filled without it the guesses are poor, not wrong.
    """

    def __init__(self, model: Transformer, tokens: int = 4, max_batch_tokens: int = 512) -> None:
        self.model, self.tokens, self.max_batch_tokens = model, tokens, max_batch_tokens

    def prepare(self, vocab_size: int, blocks: BlockManager) -> None:
        own = self.model.config.vocab_size
        if own != vocab_size:
            raise UserError("draft model", f"has {own} tokens, the model {vocab_size}", "use one of the same tokenizer")
        self.runner = Runner(self.model, blocks.num_blocks, blocks.block_size)
        if blocks.prefix:
            self.runner.hold(draft_prefix(self.model, blocks.prefix), blocks.prefix_blocks)

    def copy(self, source: int, target: int) -> None:
        self.runner.cache.copy(source, target)

    def propose(self, sequences: Ids[Sequence]) -> None:
        room = {sequence: len(sequence.draft) for sequence in sequences}
        for sequence in sequences:
            sequence.draft = []
        while sequences:
            best = self._read(sequences)
            for sequence, token in zip(sequences, best, strict=True):
                sequence.draft.append(token)
            sequences = [s for s in sequences if len(s.draft) < room[s]]

    def _read(self, sequences: Ids[Sequence]) -> list[int]:
        """The likeliest token after each sequence and its guesses so far."""
        best: dict[Sequence, int] = {}
        while len(best) < len(sequences):
            work, budget = [], self.max_batch_tokens
            for sequence in sequences:
                unread = len(sequence.ids) + len(sequence.draft) - sequence.draft_computed
                if unread and budget:
                    work.append(_Reading(sequence, min(unread, budget)))
                    budget -= work[-1].count
            hidden_ND = self.runner.hidden(work)
            ends = torch.tensor([item.count for item in work]).cumsum(0) - 1
            for item, token in zip(work, self.runner.logits(hidden_ND[ends]).argmax(-1).tolist(), strict=True):
                item.sequence.draft_computed += item.count
                if item.sequence.draft_computed == len(item.sequence.ids) + len(item.sequence.draft):
                    best[item.sequence] = token
        return [best[sequence] for sequence in sequences]


class _Reading(Work):
    """Work of the draft model: its own place in the text, its own guesses behind it."""

    def __init__(self, sequence: Sequence, count: int) -> None:
        super().__init__(sequence, count, False)

    @property
    def start(self) -> int:
        return self.sequence.draft_computed

    @property
    def tokens(self) -> list[int]:
        text = self.sequence.ids + self.sequence.draft
        return text[self.start : self.start + self.count]
