"""Who is computed next? Continuous batching: every step takes one more token of each running answer, and fills what is
left of its budget with pieces of prompts (chunked prefill, arXiv 2308.16369), so no answer waits for a long prompt.

When blocks run out the youngest sequence gives up its own and is computed again later (recomputation, arXiv 2309.06180,
section 4.5).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from groundup.infer.blocks import BlockManager, OutOfBlocks
from groundup.infer.sequence import Sequence


@dataclass(frozen=True)
class Work:
    """`count` tokens of a sequence from its first uncomputed one on; with its draft behind them when `last`: then the
    logits after its last token, and after each guess, are wanted."""

    sequence: Sequence
    count: int
    last: bool

    @property
    def start(self) -> int:
        return self.sequence.computed

    def __len__(self) -> int:
        return self.count + (len(self.sequence.draft) if self.last else 0)

    @property
    def tokens(self) -> list[int]:
        """To be read before the scheduler is told that they are computed."""
        ids = self.sequence.ids[self.start : self.start + self.count]
        return ids + self.sequence.draft if self.last else ids


class Scheduler:
    """copy(source, target): copies a block's keys and values, called when a shared block must be written to."""

    def __init__(
        self, blocks: BlockManager, max_batch_tokens: int, max_sequences: int, copy: Callable[[int, int], None]
    ) -> None:
        self.blocks, self.copy = blocks, copy
        self.max_batch_tokens, self.max_sequences = max_batch_tokens, max_sequences
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.preemptions = 0

    def schedule(self) -> list[Work]:
        """The work of one step; every token in it has a slot. Empty only when nothing is left to do."""
        budget, work, preempted = self.max_batch_tokens, [], self.preemptions
        for sequence in sorted(self.running, key=lambda s: s.pending > 1):  # answers first; stable: oldest first
            if budget <= 0:
                break
            item = self._fit(sequence, budget)
            if item is not None:
                work.append(item)
                budget -= len(item)
        # A sequence that was to run may have been pushed out by a later one's need.
        work = [item for item in work if item.sequence.blocks]
        while self.waiting and budget > 0 and len(self.running) < self.max_sequences and self.preemptions == preempted:
            item = self._admit(self.waiting[0], budget)
            if item is None:
                break
            self.running.append(self.waiting.popleft())
            work.append(item)
            budget -= len(item)
        return work

    def computed(self, sequence: Sequence, count: int) -> None:
        """`count` more tokens of the sequence lie in the cache: name the blocks that became full."""
        sequence.computed += count
        while (held := self.blocks.held(len(sequence.names))).stop <= sequence.computed:
            before = sequence.names[-1] if sequence.names else sequence.request.root
            block = sequence.blocks[len(sequence.names)]
            sequence.names.append(self.blocks.seal(block, before, sequence.ids[held]))

    def fork(self, parent: Sequence, child: Sequence) -> None:
        """The child goes on from the parent's prompt, in the parent's blocks."""
        child.blocks, child.names = list(parent.blocks), list(parent.names)
        child.computed, child.draft_computed = parent.computed, parent.draft_computed
        self.blocks.share(child.blocks)
        self.running.append(child)

    def drop(self, sequence: Sequence) -> None:
        """The sequence is done, or given up: its blocks are free at once."""
        if sequence in self.running:
            self.running.remove(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
        self._forget(sequence)

    def _admit(self, sequence: Sequence, budget: int) -> Work | None:
        """Begin a waiting sequence where there is room for all of it that is known, beside the running ones' next
        block; what the cache already holds is not computed again."""
        if not sequence.blocks:
            known = sequence.ids if sequence.output_ids or not sequence.request.reads_prompt else []
            sequence.blocks, sequence.names = self.blocks.match(known, sequence.request.root)
            sequence.computed = sequence.draft_computed = self.blocks.held(len(sequence.names)).start
            if not sequence.output_ids:
                sequence.request.cached_tokens = sequence.computed
        missing = self.blocks.count(len(sequence.ids)) - len(sequence.names)
        if missing + len(self.running) > self.blocks.available and self.running:
            self._forget(sequence)
            return None
        count = min(sequence.pending, budget)
        try:
            self._reserve(sequence, sequence.computed + count)
        except OutOfBlocks:
            self._forget(sequence)
            return None
        sequence.draft = []
        return Work(sequence, count, count == sequence.pending)

    def _fit(self, sequence: Sequence, budget: int) -> Work | None:
        """Work of a running sequence, pushing out the youngest while blocks are missing; None: it is itself out."""
        count = min(sequence.pending, budget)
        last = count == sequence.pending
        if not last or count + len(sequence.draft) > budget:
            sequence.draft = []
        while sequence in self.running:
            try:
                self._reserve(sequence, sequence.computed + count + (len(sequence.draft) if last else 0))
                return Work(sequence, count, last)
            except OutOfBlocks:
                if sequence.draft:
                    sequence.draft = []  # a guess is not worth another's blocks
                else:
                    self._preempt(self.running[-1])
        return None

    def _reserve(self, sequence: Sequence, tokens: int) -> None:
        """Slots for the first `tokens` tokens, none of them in a block that another sequence reads. OutOfBlocks."""
        at = self.blocks.count(sequence.computed + 1) - 1
        if at < len(sequence.blocks) and self.blocks.references[sequence.blocks[at]] > 1:
            shared, own = sequence.blocks[at], self.blocks.take()
            self.copy(shared, own)
            sequence.blocks[at] = own
            self.blocks.release([shared])
        while len(sequence.blocks) < self.blocks.count(tokens):
            sequence.blocks.append(self.blocks.take())

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._forget(sequence)
        self.waiting.appendleft(sequence)
        self.preemptions += 1

    def _forget(self, sequence: Sequence) -> None:
        self.blocks.release(sequence.blocks)
        sequence.blocks, sequence.names, sequence.draft = [], [], []
        sequence.computed = sequence.draft_computed = 0
