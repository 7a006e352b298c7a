"""What is being answered? A request asks for n answers; each of them is a sequence of tokens with blocks of its own."""

from __future__ import annotations

from collections.abc import Hashable
from collections.abc import Sequence as Ids
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from groundup.infer.params import Completion, SamplingParams, TokenLogprob
from groundup.infer.sampler import SamplingState
from groundup.infer.text import TextStream

if TYPE_CHECKING:
    from groundup.tokenizer import Tokenizer


class Sequence:
    """One answer on its way. ids: prompt and answer; computed: how many of them have keys and values in `blocks`."""

    def __init__(self, request: Request, index: int, sampling: SamplingState, tokenizer: Tokenizer) -> None:
        self.request, self.index, self.sampling = request, index, sampling
        self.ids = list(request.prompt_ids)
        self.computed = 0
        self.blocks: list[int] = []
        self.names: list[Hashable] = []  # of the full blocks among them
        self.draft: list[int] = []  # guesses at the next tokens
        self.draft_computed = 0  # tokens that the draft model has read
        self.logprobs: list[TokenLogprob] = []
        self.finish_reason = ""
        self.stop_reason: int | str | None = None
        self.pieces: list[str] = []
        self._text = TextStream(tokenizer, request.params.stop)

    @property
    def output_ids(self) -> list[int]:
        return self.ids[len(self.request.prompt_ids) :]

    @property
    def pending(self) -> int:
        """Tokens still to be computed: 1 while answering, more at first and after a preemption."""
        return len(self.ids) - self.computed

    def accept(self, token: int, logprob: TokenLogprob | None) -> str:
        """Take the next token; returns the text that is certain now, and sets finish_reason with the last."""
        self.ids.append(token)
        self.sampling.accept(token)
        if logprob is not None:
            self.logprobs.append(logprob)
        piece = ""
        if token in self.request.stop_ids:
            self.finish_reason, self.stop_reason = "stop", token
        else:
            piece = self._text.add(token)
            if self._text.stopped:
                self.finish_reason, self.stop_reason = "stop", self._text.stopped_by
            elif self.sampling.grammar_done:
                self.finish_reason = "stop"
            elif len(self.ids) - len(self.request.prompt_ids) >= self.request.limit:
                self.finish_reason = "length"
        if self.finish_reason:
            piece += self._text.flush()
        self.pieces.append(piece)
        return piece

    def completion(self) -> Completion:
        logprobs = self.logprobs if self.request.params.logprobs is not None else None
        ids, text = self.output_ids, "".join(self.pieces)
        return Completion(
            self.request.prompt_ids, ids, text, self.finish_reason, logprobs, self.index, self.stop_reason
        )


@dataclass(eq=False)
class Request:
    """A prompt and what is wanted of it. sequences: its n answers; the first computes the prompt for all.

    limit: most new tokens. root: who may share its blocks. cached_tokens: prompt tokens found in the cache.
    prompt_logprobs: for each prompt token but the first, where asked for. embedding: the sum of the prompt's hidden
    states, where wanted. error: why, when it ended so.
    """

    id: int
    prompt_ids: list[int]
    params: SamplingParams
    limit: int
    stop_ids: frozenset[int]
    root: Hashable
    adapter: str | None = None
    sequences: list[Sequence] = field(default_factory=list)
    cached_tokens: int = 0
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    embedding: torch.Tensor | None = None
    error: str = ""

    @property
    def reads_prompt(self) -> bool:
        """Something is wanted of every prompt token, so none may come from the cache."""
        return self.params.prompt_logprobs is not None or self.embedding is not None

    @property
    def finished(self) -> bool:
        return all(sequence.finish_reason for sequence in self.sequences)

    def completions(self) -> list[Completion]:
        return [sequence.completion() for sequence in self.sequences]


@dataclass(frozen=True)
class Delta:
    """What one step added to one answer. finish_reason: "" while it goes on."""

    request: Request
    index: int
    text: str
    ids: Ids[int]
    logprobs: list[TokenLogprob] | None
    finish_reason: str
