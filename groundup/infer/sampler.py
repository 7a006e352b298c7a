"""Which token comes next? Each row of logits on its own, so that no request ever changes another's answer.

From logits to a token, in transformers' order:

    logits -> repetition, frequency and presence penalty -> logit_bias -> grammar
           -> temperature -> top_k -> top_p -> min_p -> softmax -> one draw

A row goes through as a vector of V values, never as part of a batch, which makes its result the same bits beside any
neighbours. Rows that take the plain argmax, most of them in practice, share one maximum over the batch; those that draw
from the whole distribution (rollouts) share operators that go along each row by itself.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from random import Random
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from groundup.errors import UserError
from groundup.infer.params import SamplingParams, TokenLogprob

if TYPE_CHECKING:
    from groundup.infer.grammar import GrammarCompiler, Matcher

NO_TOKEN = -1  # what a row gets whose logits are no numbers
SLAB = 1 << 22  # numbers of a batch of distributions that are drawn from together


class SamplingState:
    """Everything about choosing the tokens of one sequence: its settings, its random numbers, what it said so far.

    params: the request's. prompt_ids: they count for the repetition penalty. vocab_size: width V of the logits, which
    may be wider than the tokenizer. compiler: needed when params hold a grammar. index: which of the request's n
    answers this is.
    Raises UserError for a bias on a token that does not exist, and for a grammar that does not compile.
    """

    def __init__(
        self,
        params: SamplingParams,
        prompt_ids: Sequence[int],
        vocab_size: int,
        compiler: GrammarCompiler | None = None,
        index: int = 0,
    ) -> None:
        beyond = max(params.logit_bias, default=0)
        if beyond >= vocab_size:
            raise UserError("logit_bias", f"token {beyond} is outside the vocabulary of {vocab_size}", "leave it out")
        self.params, self.vocab_size = params, vocab_size
        self._random = Random() if params.seed is None else Random((params.seed + index) % 2**64)
        self._matcher: Matcher | None = None
        if params.grammar is not None:
            if compiler is None:
                raise ValueError("a grammar needs the engine's GrammarCompiler")
            self._matcher = compiler.start(params.grammar)
        # numpy notes a token in 0.1 us, in whatever mode torch is in.
        self._seen_V: NDArray[np.bool_] | None = None
        self._counts_V: NDArray[np.float32] | None = None
        if params.repetition_penalty != 1:
            self._seen_V = np.zeros(vocab_size, dtype=np.bool_)
            self._seen_V[np.asarray(prompt_ids, dtype=np.int64)] = True
        if params.frequency_penalty or params.presence_penalty:
            self._counts_V = np.zeros(vocab_size, dtype=np.float32)
        self._bias_ids = torch.tensor(list(params.logit_bias), dtype=torch.int64)
        self._bias = torch.tensor(list(params.logit_bias.values()), dtype=torch.float32)

    @property
    def plain(self) -> bool:
        """Whether logits are used as the model gives them, and only their largest counts."""
        changed = self._seen_V is not None or self._counts_V is not None or len(self._bias) > 0
        return self.params.greedy and not changed and self._matcher is None

    @property
    def free(self) -> bool:
        """Whether a token is drawn from all of the model's distribution at some temperature, as rollouts want it."""
        params = self.params
        changed = self._seen_V is not None or self._counts_V is not None or len(self._bias) > 0
        cut = params.top_k > 0 or params.top_p < 1 or params.min_p > 0
        return not (params.greedy or changed or cut or self._matcher is not None)

    @property
    def grammar_done(self) -> bool:
        """The grammar allows nothing more: the answer ends here, with finish_reason "stop"."""
        return self._matcher is not None and self._matcher.done

    def accept(self, token: int) -> None:
        """Note the token that was chosen. UserError when the grammar has become too complex: end this request."""
        if self._seen_V is not None:
            self._seen_V[token] = True
        if self._counts_V is not None:
            self._counts_V[token] += 1
        if self._matcher is not None:
            self._matcher.accept(token)

    def draw(self) -> float:
        """The sequence's next random number, uniform in [0, 1)."""
        return self._random.random()

    def scores(self, logits_V: Tensor) -> Tensor:
        """Logits of the model (V,) after penalties, bias and grammar: fp32, -inf where a token is not allowed."""
        params, device = self.params, logits_V.device
        logits_V = logits_V.float()
        if self._seen_V is not None:
            ids_K = torch.from_numpy(np.flatnonzero(self._seen_V)).to(device)
            logits_V = logits_V.index_copy(0, ids_K, repetition_penalty(logits_V[ids_K], params.repetition_penalty))
        if self._counts_V is not None:
            said = np.flatnonzero(self._counts_V)
            counts_K = torch.from_numpy(self._counts_V[said])
            less_K = count_penalties(counts_K, params.frequency_penalty, params.presence_penalty)
            logits_V = logits_V.index_add(0, torch.from_numpy(said).to(device), -less_K.to(device))
        if len(self._bias):
            logits_V = logits_V.index_add(0, self._bias_ids.to(device), self._bias.to(device))
        if self._matcher is not None:
            allowed = self._matcher.allowed()  # one for each token of the tokenizer; logits may be padded beyond
            allowed_V = F.pad(allowed, (0, self.vocab_size - len(allowed))).to(device)
            logits_V = logits_V.masked_fill(~allowed_V, -torch.inf)
        return logits_V


def sample(logits_BV: Tensor, states: Sequence[SamplingState]) -> tuple[list[int], list[TokenLogprob | None]]:
    """Choose the next token of each row.

    logits_BV: the model's, any float type, on any device. states: one a row; the chosen tokens are not yet accepted.
    Returns ids (B), NO_TOKEN where logits are nan or infinite, which only that row's request suffers from; and
    logprobs (B), None for a row that did not ask for them.
    """
    # Three times as fast as argmax; the first of equals, and a nan if there is one.
    largest_B, best_B = logits_BV.max(-1)
    finite = largest_B.isfinite().tolist()
    own: dict[int, float] = {}  # logprobs of the distributions that were drawn from
    free = [row for row, state in enumerate(states) if finite[row] and state.free]
    if free:
        best_B[free], drawn = _draw_free(logits_BV, free, states)
        own.update(zip(free, drawn, strict=True))
    for row, state in enumerate(states):
        if finite[row] and not state.plain and row not in own:
            best_B[row], own[row] = _choose(logits_BV[row], state)
    ids = [token if fine else NO_TOKEN for token, fine in zip(best_B.tolist(), finite, strict=True)]
    logprobs: list[TokenLogprob | None] = [None] * len(ids)
    for row, (token, state) in enumerate(zip(ids, states, strict=True)):
        if state.params.logprobs is None or token == NO_TOKEN:
            continue
        if state.params.logprobs_mode == "processed_logprobs":
            logprobs[row] = TokenLogprob(token, own.get(row, 0.0))  # 0: greedy, all on one token
        else:
            logprobs[row] = token_logprob(logits_BV[row], token, state.params.logprobs)
    return ids, logprobs


def probabilities(logits_BV: Tensor, states: Sequence[SamplingState]) -> Tensor:
    """The distributions (B, V), fp32, that `sample` draws from; for a greedy row all on one token."""
    probs_BV = torch.zeros(logits_BV.shape, dtype=torch.float32, device=logits_BV.device)
    for probs_V, logits_V, state in zip(probs_BV, logits_BV, states, strict=True):
        scores_V = state.scores(logits_V)
        if state.params.greedy:
            probs_V[scores_V.max(-1).indices] = 1
        else:
            ids_K, probs_K = kept(scores_V, state.params)
            probs_V[ids_K] = probs_K
    return probs_BV


def token_logprob(logits_V: Tensor, token: int, top: int = 0) -> TokenLogprob:
    """How likely the model held `token` and the `top` likeliest: log softmax of its raw logits (V,), in fp32."""
    logprobs_V = logits_V.float().log_softmax(-1)
    likeliest = logprobs_V.topk(min(top, len(logprobs_V)))
    pairs = zip(likeliest.indices.tolist(), likeliest.values.tolist(), strict=True)
    return TokenLogprob(token, logprobs_V[token].item(), tuple(pairs))


def repetition_penalty(logits_K: Tensor, penalty: float) -> Tensor:
    """The logits of seen tokens: positive ones are divided by the penalty, negative ones multiplied.

    Keskar et al. 2019, CTRL (arXiv 1909.05858), section 4.1, in the form that holds for logits of either sign.
    """
    return torch.where(logits_K > 0, logits_K / penalty, logits_K * penalty)


def count_penalties(counts_K: Tensor, frequency: float, presence: float) -> Tensor:
    """What is taken off the logits of tokens that the answer has counts_K times: c * frequency + (c > 0) * presence.

    OpenAI's API reference, "Frequency and presence penalties".
    """
    return counts_K * frequency + (counts_K > 0) * presence


def kept(scores_V: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor]:
    """The tokens that temperature and cuts leave to draw from: ids (K) in rising order, probabilities (K) of sum 1.

    top_k keeps those as likely as the k-th or more. top_p keeps the likeliest whose sum reaches p (Holtzman et al.
    2020, arXiv 1904.09751). min_p keeps those with min_p times the largest probability or more (Nguyen et al. 2024,
    arXiv 2407.01082). Each cut looks at what the one before it left; tokens of equal probability stay or go together.
    """
    logits_K, ids_K = scores_V / params.temperature, torch.arange(len(scores_V), device=scores_V.device)
    if 0 < params.top_k < len(logits_K):
        least = logits_K.topk(params.top_k).values[-1]
        logits_K, ids_K = _only(logits_K >= least, logits_K, ids_K)
    if params.top_p < 1:
        probs_K = logits_K.softmax(-1)
        logits_K, ids_K = _only(probs_K >= nucleus_floor(probs_K, params.top_p), logits_K, ids_K)
    if params.min_p > 0:  # p >= min_p * max(p), by logarithms
        logits_K, ids_K = _only(logits_K >= logits_K.max() + math.log(params.min_p), logits_K, ids_K)
    return ids_K, logits_K.softmax(-1)


def nucleus_floor(probs_K: Tensor, top_p: float) -> Tensor:
    """The smallest probability inside the nucleus: a token stays while those before it sum to less than top_p.

    Only what may be inside is sorted. K tokens below (1 - top_p) / K hold less than 1 - top_p together, so the others
    hold more than top_p; half of that bound leaves room for rounding.
    """
    candidates = probs_K[probs_K >= (1 - top_p) / (2 * len(probs_K))]
    falling = _falling(candidates)
    before = falling.cumsum(0, dtype=torch.float64) - falling
    return falling[(before < top_p).sum() - 1]


def _choose(logits_V: Tensor, state: SamplingState) -> tuple[Tensor, float]:
    """The row's token id, a tensor of no dimensions, and its logprob where one was drawn."""
    scores_V = state.scores(logits_V)
    if state.params.greedy:
        return scores_V.max(-1).indices, 0.0
    ids_K, probs_K = kept(scores_V, state.params)
    # Inverse CDF: the first place whose cumulative probability exceeds u, so a probability of 0 is never chosen. The
    # product is below the sum for every u < 1, in rounded arithmetic too.
    cumulative_K = probs_K.cumsum(0, dtype=torch.float64)
    place = torch.searchsorted(cumulative_K, state.draw() * cumulative_K[-1], right=True)
    asked = state.params.logprobs is not None and state.params.logprobs_mode == "processed_logprobs"
    return ids_K[place], float(probs_K[place].log()) if asked else 0.0


def _draw_free(logits_BV: Tensor, rows: Sequence[int], states: Sequence[SamplingState]) -> tuple[Tensor, list[float]]:
    """_choose for all rows that are free, a slab of them at a time: ids (R) and logprobs (R). The same tokens: softmax
    and cumsum go along each row by itself."""
    ids_R, logprobs = torch.empty(len(rows), dtype=torch.int64, device=logits_BV.device), []
    slab = max(1, SLAB // logits_BV.shape[1])
    for begin in range(0, len(rows), slab):
        here = [states[row] for row in rows[begin : begin + slab]]
        temperatures_S1 = torch.tensor([[float(state.params.temperature)] for state in here], device=logits_BV.device)
        draws_S1 = torch.tensor([[state.draw()] for state in here], dtype=torch.float64, device=logits_BV.device)
        probs_SV = (logits_BV[rows[begin : begin + slab]].float() / temperatures_S1).softmax(-1)
        cumulative_SV = probs_SV.cumsum(-1, dtype=torch.float64)
        ids_S1 = torch.searchsorted(cumulative_SV, draws_S1 * cumulative_SV[:, -1:], right=True)
        ids_R[begin : begin + slab] = ids_S1[:, 0]
        logprobs += probs_SV.gather(1, ids_S1)[:, 0].log().tolist()
    return ids_R, logprobs


def _falling(values_K: Tensor) -> Tensor:
    """Sorted, the largest first."""
    if values_K.is_cuda:
        return values_K.sort(descending=True).values
    return torch.from_numpy(np.sort(values_K.numpy())).flip(0)  # 0.1 ms where torch's sort takes 3, at 49,152


def _only(keep_K: Tensor, logits_K: Tensor, ids_K: Tensor) -> tuple[Tensor, Tensor]:
    places = keep_K.nonzero().squeeze(-1)
    return logits_K[places], ids_K[places]
