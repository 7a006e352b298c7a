"""How do many requests share one model? Prompts in, answers out: batched prefill, then a token a step for all rows.

Rows of unequal length stand side by side in the cache, so no row waits for another to catch up, none is padded on the
left, and what a row answers does not depend on its neighbours.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from groundup.errors import UserError
from groundup.infer.params import Completion, SamplingParams
from groundup.infer.sampler import Settings, sample, settings
from groundup.infer.text import TextStream
from groundup.model.cache import KVCache

if TYPE_CHECKING:
    from groundup.model.transformer import Transformer
    from groundup.tokenizer import Tokenizer

MAX_ROWS = 128  # requests decoded side by side
MAX_PREFILL_TOKENS = 16384  # positions of one prefill, which bounds its activations
CACHE_SLACK = 64  # free slots after the longest prompt; the cache doubles when they are used up


class _Request:
    """One prompt on its way to an answer."""

    def __init__(self, prompt: Sequence[int], params: SamplingParams, tokenizer: Tokenizer, context: int) -> None:
        self.prompt, self.params = list(prompt), params
        self.limit = min(params.max_tokens, context - len(self.prompt))
        self.ends = set() if params.ignore_eos else set(tokenizer.stop_ids)
        self.ids: list[int] = []
        self.pieces: list[str] = []
        self.finish_reason = ""
        self._text = TextStream(tokenizer, params.stop)
        self._random = torch.Generator()
        if params.seed is None:
            self._random.seed()
        else:
            self._random.manual_seed(params.seed)

    def draw(self) -> float:
        return torch.rand((), generator=self._random).item() if self.params.temperature else 0.0

    def accept(self, token: int) -> None:
        """Take the next token; sets finish_reason when it is the last."""
        self.ids.append(token)
        if token in self.ends:
            self.finish_reason = "stop"
        else:
            self.pieces.append(self._text.add(token))
            if self._text.stopped:
                self.finish_reason = "stop"
            elif len(self.ids) >= self.limit:
                self.finish_reason = "length"
        if self.finish_reason:
            self.pieces.append(self._text.flush())

    def completion(self) -> Completion:
        return Completion(self.prompt, self.ids, "".join(self.pieces), self.finish_reason)


def generate(
    model: Transformer,
    tokenizer: Tokenizer,
    prompts: Sequence[str | Sequence[int]],
    params: SamplingParams | Sequence[SamplingParams],
) -> list[Completion]:
    """Answer all prompts, in their order.

    prompts: token ids, or text that starts a document ([bos] + encode(text)). params: for all, or one for each.
    Raises UserError on an empty prompt, or one that leaves no room in the model's context.
    """
    each = [params] * len(prompts) if isinstance(params, SamplingParams) else params
    requests = [
        _request(model, tokenizer, p, s, f"prompt {i}") for i, (p, s) in enumerate(zip(prompts, each, strict=True), 1)
    ]
    for batch in _batches(requests):
        for _ in _decode(model, batch):
            pass
    return [request.completion() for request in requests]


class Stream(Iterator[str]):
    """Pieces of one answer as they become final; afterwards `completion` is set."""

    def __init__(self, model: Transformer, request: _Request) -> None:
        self.completion: Completion | None = None
        self._request, self._shown = request, 0
        self._steps = _decode(model, [request])

    def __next__(self) -> str:
        while True:
            pieces = self._request.pieces
            if self._shown < len(pieces):
                self._shown += 1
                if pieces[self._shown - 1]:
                    return pieces[self._shown - 1]
            elif next(self._steps, None) is None:
                self.completion = self._request.completion()
                raise StopIteration


def stream(model: Transformer, tokenizer: Tokenizer, prompt_ids: str | Sequence[int], params: SamplingParams) -> Stream:
    """Answer one prompt piece by piece; the pieces join to the text that `generate` gives. Errors as there."""
    return Stream(model, _request(model, tokenizer, prompt_ids, params, "prompt"))


def _request(
    model: Transformer, tokenizer: Tokenizer, prompt: str | Sequence[int], params: SamplingParams, where: str
) -> _Request:
    ids = [tokenizer.bos_id, *tokenizer.encode(prompt)] if isinstance(prompt, str) else prompt
    context = model.config.max_position_embeddings
    if not ids:
        raise UserError(where, "is empty", "give at least one token")
    if len(ids) >= context:
        raise UserError(where, f"{len(ids)} tokens leave no room in the model's context of {context}", "shorten it")
    return _Request(ids, params, tokenizer, context)


def _batches(requests: Sequence[_Request]) -> Iterator[list[_Request]]:
    """Requests of similar length together, the longest first: what does not fit in memory fails at once."""
    waiting = sorted(requests, key=lambda r: -len(r.prompt))
    while waiting:
        rows = max(1, min(MAX_ROWS, MAX_PREFILL_TOKENS // len(waiting[0].prompt)))
        yield waiting[:rows]
        waiting = waiting[rows:]


def _decode(model: Transformer, requests: list[_Request]) -> Iterator[int]:
    """Run the requests to their ends; yields the number of live rows after each token."""
    device = model.head_weight.device
    with torch.no_grad():
        cache, logits_BV = _prefill(model, requests)
        chosen = settings([r.params for r in requests], model.config.vocab_size, device)
        seen_BV = _seen(requests, model.config.vocab_size, device) if chosen.penalised else None
    rows = list(requests)  # the request in each row of the cache; a finished one stays until the rows are gathered
    while True:
        with torch.no_grad():
            ids_B = _choose(rows, logits_BV, chosen, seen_BV)
        for request, token in zip(rows, ids_B.tolist(), strict=True):
            if not request.finish_reason:
                request.accept(token)
        keep = [i for i, request in enumerate(rows) if not request.finish_reason]
        yield len(keep)
        if not keep:
            return
        if 4 * len(keep) <= 3 * len(rows):  # gathering copies the cache: not for every single row
            cache.select(keep)
            index = torch.tensor(keep, device=device)
            rows, ids_B, chosen = [rows[i] for i in keep], ids_B[index], chosen.rows(index)
            seen_BV = None if seen_BV is None else seen_BV[index]
        with torch.no_grad():
            cache = _with_room(cache, model)
            logits_BV = model(ids_B[:, None], cache=cache)[:, -1]


def _prefill(model: Transformer, requests: Sequence[_Request]) -> tuple[KVCache, torch.Tensor]:
    """The cache of all prompts, and the logits of the token after each."""
    lengths = [len(r.prompt) for r in requests]
    longest, device = max(lengths), model.head_weight.device
    ids_BT = torch.zeros(len(requests), longest, dtype=torch.int64)
    for row, request in enumerate(requests):
        ids_BT[row, : lengths[row]] = torch.tensor(request.prompt)
    limit = min(longest + CACHE_SLACK, model.config.max_position_embeddings)
    cache = KVCache(model.config, len(requests), limit, device, model.head_weight.dtype)
    hidden_BTD = model.hidden(ids_BT.to(device), cache=cache)
    cache.truncate(lengths)
    last_B = torch.tensor(lengths, device=device) - 1
    return cache, F.linear(hidden_BTD[torch.arange(len(requests), device=device), last_B], model.head_weight)


def _with_room(cache: KVCache, model: Transformer) -> KVCache:
    """The cache, or one of twice its length when it is full. A finished row may ask for a slot past the context."""
    if max(cache.lengths) < cache.max_len:
        return cache
    grown = KVCache(model.config, len(cache.lengths), 2 * cache.max_len, cache.keys.device, cache.keys.dtype)
    grown.keys[:, :, : cache.max_len], grown.values[:, :, : cache.max_len] = cache.keys, cache.values
    grown.lengths = cache.lengths
    return grown


def _choose(
    rows: Sequence[_Request], logits_BV: torch.Tensor, chosen: Settings, seen_BV: torch.Tensor | None
) -> torch.Tensor:
    uniform_B = None if chosen.all_greedy else torch.tensor([r.draw() for r in rows], device=logits_BV.device)
    ids_B = sample(logits_BV, chosen, uniform_B, seen_BV)
    if seen_BV is not None:
        seen_BV[torch.arange(len(rows), device=ids_B.device), ids_B] = True
    return ids_B


def _seen(requests: Sequence[_Request], vocab_size: int, device: torch.device) -> torch.Tensor:
    """Bool [B, V]: tokens of each prompt."""
    seen_BV = torch.zeros(len(requests), vocab_size, dtype=torch.bool)
    for row, request in enumerate(requests):
        seen_BV[row, request.prompt] = True
    return seen_BV.to(device)
