"""What is an answer worth? Finished conversations in, a number each out: for rewards, best-of-n, and POST /score.

Conversations of any length lie end to end in one row, as far as `tokens` goes, without padding. On a CPU the row goes
through the engine's kernels, which sum in one order whatever the batch, so a score is the same bits whoever else is
scored; elsewhere, and for models that transformers computes, neighbours may change its last bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, cast

import torch

from groundup.adapt.open import open_tokenizer
from groundup.adapt.scored import open_scorer
from groundup.data.steps import render_steps, steps_of
from groundup.device import pick_device
from groundup.errors import UserError
from groundup.infer.fused import fuse
from groundup.infer.paged import PagedCache, PagedRows
from groundup.model.scored import STEP_RIGHT, Scored
from groundup.model.transformer import Transformer
from groundup.tokenizer import Tokenizer

Message = dict[str, Any]
Tools = list[dict[str, Any]] | None
Read = tuple[list[int], list[int]]  # a conversation's ids, and the places whose scores are wanted
BLOCK = 16  # tokens of a block of keys and values
SHORTEST = 256  # of a row on a GPU, whose attention is compiled anew for each length


class Scorer:
    """A reward model that is asked. model: its folder (or an adapter's), or the model itself with its tokenizer.

    A model of steps gives a conversation the lowest of the scores of its answer's lines (Lightman et al. 2023, arXiv
    2305.20050, section 2.6, compare ways to sum up). tokens: computed together. Not for two threads at once.
    """

    def __init__(
        self, model: Scored | str | Path, tokenizer: Tokenizer | None = None, device: str = "auto", tokens: int = 4096
    ) -> None:
        if not isinstance(model, Scored):
            tokenizer = tokenizer or open_tokenizer(model)
            model = open_scorer(model, pick_device(device))
        if tokenizer is None:
            raise ValueError("a model without a folder needs its tokenizer")
        if len(model.labels) != 1:
            why = f"has {len(model.labels)} numbers ({', '.join(model.labels)}), not one score"
            raise UserError("reward model", why, "use a reward model: recipes/reward.yaml trains one")
        self.model, self.tokenizer, self.tokens = model.eval(), tokenizer, tokens
        self.stepwise = model.labels == (STEP_RIGHT,)
        self.context: int = model.config.max_position_embeddings
        self.device = model.head_weight.device
        native = isinstance(model.trunk, Transformer)
        self._fused = fuse(cast(Transformer, model), None) if native else None  # it has all that `fuse` looks at
        self._cache: PagedCache | None = None

    def score(self, conversations: Sequence[Sequence[Message]], tools: Tools = None) -> list[float]:
        """How good each conversation's last answer is: comparable among answers to one question, and where the model
        learnt right and wrong, log odds. UserError: one that cannot be rendered, or is longer than the context."""
        return [min(scores) for scores in self._scores([self._read(said, tools) for said in conversations])]

    def score_fitting(self, conversations: Sequence[Sequence[Message]], tools: Tools = None) -> list[float | None]:
        """As `score`; None for a conversation that is longer than the context."""
        read = [self._read(said, tools) for said in conversations]
        fits = [len(ids) <= self.context for ids, _ in read]
        scores = iter(self._scores([one for one, good in zip(read, fits, strict=True) if good]))
        return [min(next(scores)) if good else None for good in fits]

    def score_steps(
        self, solutions: Sequence[tuple[Sequence[Message], Sequence[str]]], tools: Tools = None
    ) -> list[list[float]]:
        """Of (prompt, steps) each: every step's score, given those before it."""
        return self._scores([render_steps(self.tokenizer, list(prompt), steps, tools) for prompt, steps in solutions])

    @torch.inference_mode()
    def score_ids(self, documents: Sequence[Sequence[int]], places: Sequence[Sequence[int]]) -> list[list[float]]:
        """The scores at these places of token ids."""
        for number, ids in enumerate(documents, 1):
            if not ids or len(ids) > self.context:
                why = f"{len(ids)} tokens, and the reward model takes 1 to {self.context}"
                raise UserError(f"conversation {number}", why, "shorten it")
        found: list[list[float]] = []
        for batch in _batches(documents, self.tokens):
            hidden_ND = self._hidden([documents[i] for i in batch])
            starts = accumulate((len(documents[i]) for i in batch), initial=0)
            wanted = [start + place for i, start in zip(batch, starts, strict=False) for place in places[i]]
            # row by row, not as a product of matrices, whose order of summation would depend on their number
            read_SD = hidden_ND[torch.tensor(wanted, dtype=torch.long, device=self.device)].cpu().double()
            values = (read_SD * self.model.head_weight[0].cpu().double()).sum(1).tolist()
            for i in batch:
                found.append(values[: len(places[i])])
                values = values[len(places[i]) :]
        return found

    def _read(self, said: Sequence[Message], tools: Tools) -> Read:
        """A conversation's ids, and where its scores stand: at its last token, or at the end of each step."""
        if self.stepwise:
            return render_steps(self.tokenizer, list(said[:-1]), steps_of(said[-1]) or [""], tools)
        ids = self.tokenizer.render(list(said), tools).ids
        return ids, [len(ids) - 1]

    def _scores(self, read: Sequence[Read]) -> list[list[float]]:
        return self.score_ids([ids for ids, _ in read], [places for _, places in read])

    def _hidden(self, documents: Sequence[Sequence[int]]) -> torch.Tensor:
        """What the score head reads of these documents' tokens, end to end, [N, D]."""
        lengths = [len(ids) for ids in documents]
        ids_N = torch.tensor([token for ids in documents for token in ids], device=self.device)
        if self._fused is None:
            return self._packed(ids_N, lengths)
        counts = [-(-length // BLOCK) for length in lengths]
        tables = [range(end - count, end) for end, count in zip(accumulate(counts), counts, strict=True)]
        rows = PagedRows(self._pages(sum(counts)), tables, [0] * len(lengths), lengths)
        return self._fused.hidden(ids_N, rows)

    def _pages(self, blocks: int) -> PagedCache:
        if self._cache is None or self._cache.keys.shape[1] < blocks:
            self._cache = PagedCache(self.model.config, blocks, BLOCK, self.device, torch.float32)
        return self._cache

    def _packed(self, ids_N: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
        """Through the blocks that training uses."""
        used = len(ids_N)
        whole = max(SHORTEST, 1 << (used - 1).bit_length()) if self.device.type == "cuda" else used
        ids_1T = ids_N.new_zeros(1, whole)
        docs_1T = torch.full((1, whole), -1, dtype=torch.int32)
        positions_1T = torch.arange(whole)[None] - used
        ids_1T[0, :used] = ids_N
        docs_1T[0, :used] = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
        positions_1T[0, :used] = torch.cat([torch.arange(length) for length in lengths])
        return self.model.hidden(ids_1T, positions_1T.to(self.device), docs_1T.to(self.device))[0, :used]


def _batches(documents: Sequence[Sequence[int]], tokens: int) -> Iterator[list[int]]:
    """Numbers of neighbours that fit together; a longer one alone."""
    batch: list[int] = []
    size = 0
    for i, ids in enumerate(documents):
        if batch and size + len(ids) > tokens:
            yield batch
            batch, size = [], 0
        batch.append(i)
        size += len(ids)
    if batch:
        yield batch
