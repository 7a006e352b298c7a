"""How do many requests share one model? Open this first: add requests, call step() until nothing is left.

A step is: who is computed (scheduler.py), through the model (runner.py, paged.py), which token (sampler.py), is it the
last (sequence.py). Blocks of the cache are counted in blocks.py. One thread owns an engine; worker.py gives it one.
"""

from __future__ import annotations

from collections.abc import Hashable
from collections.abc import Sequence as Ids
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import psutil
import torch
import torch.nn.functional as F

from groundup.errors import UserError
from groundup.infer.blocks import BlockManager
from groundup.infer.grammar import GrammarCompiler
from groundup.infer.paged import PagedCache
from groundup.infer.params import SamplingParams, TokenLogprob
from groundup.infer.prefix import check_prefix
from groundup.infer.runner import Runner
from groundup.infer.sampler import NO_TOKEN, SamplingState, sample, token_logprob
from groundup.infer.scheduler import Scheduler, Work
from groundup.infer.sequence import Delta, Request, Sequence
from groundup.infer.speculate import Drafter
from groundup.model.prefix import prefix_length
from groundup.model.transformer import Transformer
from groundup.tokenizer import Tokenizer


@dataclass(frozen=True)
class EngineSettings:
    """block_size: tokens a block. memory: bytes for keys and values; None: a share of what is free (kv_memory).
    num_blocks: instead of memory. max_batch_tokens: tokens of a step. max_sequences: answers written at once.
    prefix_sharing: find again what was computed before. quantize: a scheme of linear.py, which uses the model up: it
    keeps no other matrices. truncate_prompt: a prompt too
    long for the context loses its beginning; else it is refused.
    """

    block_size: int = 16
    memory: float | None = None
    num_blocks: int | None = None
    max_batch_tokens: int = 512
    max_sequences: int = 128
    prefix_sharing: bool = True
    quantize: str | None = None
    truncate_prompt: bool = False


class Engine:
    """drafter: guesses the next tokens (speculate.py); what is answered is the same with and without.

    A model's soft prompt stands before every request, in blocks that all share (prefix.py); no count includes it.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        settings: EngineSettings | None = None,
        drafter: Drafter | None = None,
    ) -> None:
        self.tokenizer, self.settings = tokenizer, settings or EngineSettings()
        self.model, self.drafter = model, drafter
        prefix = check_prefix(model)
        self.context = model.config.max_position_embeddings - prefix
        size = self.settings.block_size
        num_blocks = self.settings.num_blocks or _num_blocks(model, self.settings)
        if -(-prefix // size) >= num_blocks:
            raise UserError("memory", f"the soft prompt of {prefix} tokens fills the cache", "give it more memory")
        self.blocks = BlockManager(num_blocks, size, self.settings.prefix_sharing, prefix)
        self.runner = Runner(model, num_blocks, size, self.settings.quantize)
        if model.soft_prefix:
            self.runner.hold(model.soft_prefix, self.blocks.prefix_blocks)
        self.scheduler = Scheduler(
            self.blocks, self.settings.max_batch_tokens, self.settings.max_sequences, self._copy_block
        )
        if drafter is not None:
            drafter.prepare(model.config.vocab_size, self.blocks)
        self._compiler = GrammarCompiler(tokenizer)
        self._numbers = count()
        self._held: list[Delta] = []  # of others, while one caller waits for its own
        self._totals = {"prompt_tokens": 0, "cached_tokens": 0, "generated_tokens": 0, "drafted": 0, "accepted": 0}

    def add(
        self,
        prompt: str | Ids[int],
        params: SamplingParams,
        adapter: str | None = None,
        tenant: Hashable = None,
        where: str = "prompt",
    ) -> Request:
        """Queue a prompt: token ids, or text that starts a document ([bos] + encode(text)).

        tenant: requests of different tenants share nothing. where: what messages call the prompt.
        Raises UserError: an empty prompt, ids that are no tokens, no room in the context, a grammar that is wrong.
        """
        ids = self._prompt(prompt, where)
        if adapter is not None and adapter not in self.runner.adapters:
            raise UserError("adapter", f"{adapter!r} is not loaded", "start with --adapter NAME=PATH")
        if params.n > self.settings.max_sequences:
            raise UserError("n", f"{params.n} answers at once", f"at most {self.settings.max_sequences}")
        capacity = min(self.context, self.blocks.capacity)
        ends = frozenset() if params.ignore_eos else frozenset(self.tokenizer.stop_ids)
        request = Request(
            next(self._numbers),
            ids,
            params,
            limit=min(params.max_tokens, capacity - len(ids)),
            stop_ids=ends | frozenset(params.stop_token_ids),
            root=(adapter, tenant),
            adapter=adapter,
        )
        for index in range(params.n):
            state = SamplingState(params, ids, self.model.config.vocab_size, self._compiler, index)
            request.sequences.append(Sequence(request, index, state, self.tokenizer))
        self.scheduler.waiting.append(request.sequences[0])
        return request

    def abort(self, request: Request) -> None:
        """Stop answering; its blocks are free at once. Nothing happens to a finished one."""
        self._end(request, "abort")

    def load_adapter(self, name: str, path: str | Path) -> None:
        """Let requests name this LoRA adapter, a folder as PEFT saves it. UserError where it does not fit."""
        self.runner.load_adapter(name, path)

    def forget(self) -> None:
        """The model's parameters have new values: answer with those, and use nothing that was computed before."""
        if self.scheduler.waiting or self.scheduler.running:
            raise RuntimeError("forget() while requests are being answered")
        self.blocks.forget()
        self.runner.refresh(self.blocks.prefix_blocks)

    @property
    def has_work(self) -> bool:
        return bool(self.scheduler.waiting or self.scheduler.running or self._held)

    @torch.inference_mode()
    def step(self) -> list[Delta]:
        """Compute what is due, once; what it added to each answer. A request that fails ends with "error", alone."""
        held, self._held = self._held, []
        return held + self._step()

    def _step(self) -> list[Delta]:
        if self.drafter is not None:
            for sequence in self.scheduler.running:
                if sequence.pending == 1:  # room for guesses, as far as they can be used
                    room = sequence.request.limit - len(sequence.output_ids) - 1
                    sequence.draft = [0] * min(self.drafter.tokens, room)
        work = self.scheduler.schedule()
        if not work:
            return []
        if self.drafter is not None:
            self.drafter.propose([item.sequence for item in work if item.last and item.sequence.draft])
        return self._answer(work, self.runner.hidden(work))

    @torch.inference_mode()
    def embed(self, prompts: Ids[Ids[int]]) -> torch.Tensor:
        """The mean of each prompt's last hidden states, of unit length, [B, D]. Other requests go on meanwhile."""
        requests = [self.add(ids, SamplingParams(max_tokens=1)) for ids in prompts]
        for request in requests:
            request.embedding = torch.zeros(self.model.config.hidden_size)
        try:
            while not all(request.finished for request in requests):
                self._held += [delta for delta in self._step() if delta.request not in requests]
        finally:
            for request in requests:
                self.abort(request)
        sums = [request.embedding for request in requests if request.embedding is not None]
        return F.normalize(torch.stack(sums), dim=-1)

    def stats(self) -> dict[str, int]:
        """Gauges of now and totals since the start."""
        return {
            "running": len(self.scheduler.running),
            "waiting": len(self.scheduler.waiting),
            "blocks_used": self.blocks.used,
            "blocks_total": self.blocks.num_blocks,
            "preemptions": self.scheduler.preemptions,
            **self._totals,
        }

    def _answer(self, work: Ids[Work], hidden_ND: torch.Tensor) -> list[Delta]:
        """Choose the next tokens of every piece of work that reached its sequence's end."""
        ends, rows, at = [], [], 0
        for item in work:
            self._read_prompt(item, hidden_ND[at : at + item.count])
            self.scheduler.computed(item.sequence, item.count)
            if item.last:
                ends.append(item.sequence)
                rows.append(range(at + item.count - 1, at + len(item)))
            at += len(item)
        if not ends:
            return []
        logits_RV = self.runner.logits(hidden_ND[[row for each in rows for row in each]])
        firsts, at = {}, 0
        for sequence, each in zip(ends, rows, strict=True):
            firsts[sequence] = at
            at += len(each)
            if not sequence.output_ids:
                self._totals["prompt_tokens"] += len(sequence.request.prompt_ids)
                self._totals["cached_tokens"] += sequence.request.cached_tokens
                for sibling in sequence.request.sequences[1:]:
                    self.scheduler.fork(sequence, sibling)
                    firsts[sibling] = firsts[sequence]
        return self._choose(firsts, logits_RV)

    def _choose(self, firsts: dict[Sequence, int], logits_RV: torch.Tensor) -> list[Delta]:
        """Draw a token for each sequence, and go on along its draft as long as the draws agree with it.

        The draw is the one that would be made without a draft, so the draft changes how soon a text comes and nothing
        else: exact for greedy, and for sampling it accepts a guess as often as the model itself would say it.
        """
        texts = dict.fromkeys(firsts, "")
        begun = {sequence: len(sequence.ids) for sequence in firsts}
        alive, depth = list(firsts), 0
        while alive:
            places = torch.tensor([firsts[sequence] + depth for sequence in alive], device=logits_RV.device)
            ids, logprobs = sample(logits_RV[places], [sequence.sampling for sequence in alive])
            following = []
            for sequence, token, logprob in zip(alive, ids, logprobs, strict=True):
                texts[sequence] += self._accept(sequence, token, logprob)
                agreed = depth < len(sequence.draft) and sequence.draft[depth] == token
                if agreed:
                    self.scheduler.computed(sequence, 1)
                    self._totals["accepted"] += 1
                if agreed and not sequence.finish_reason:
                    following.append(sequence)
            alive, depth = following, depth + 1
        deltas = []
        for sequence, text in texts.items():
            new = sequence.ids[begun[sequence] :]
            self._totals["generated_tokens"] += len(new)
            self._totals["drafted"] += len(sequence.draft)
            sequence.draft, sequence.draft_computed = [], min(sequence.draft_computed, sequence.computed)
            wanted = sequence.request.params.logprobs is not None
            logprobs_of_new = sequence.logprobs[-len(new) :] if wanted else None
            deltas.append(Delta(sequence.request, sequence.index, text, new, logprobs_of_new, sequence.finish_reason))
            if sequence.finish_reason:
                self.scheduler.drop(sequence)
        return deltas

    def _accept(self, sequence: Sequence, token: int, logprob: TokenLogprob | None) -> str:
        """Give the sequence its next token; a fault that is its own ends it alone."""
        try:
            if token == NO_TOKEN:
                raise UserError("logits", "are no numbers", "check the model's weights")
            return sequence.accept(token, logprob)
        except UserError as error:
            sequence.finish_reason, sequence.request.error = "error", str(error)
            return ""

    def _read_prompt(self, item: Work, hidden_CD: torch.Tensor) -> None:
        """What is wanted of the prompt itself: its tokens' logprobs, or the sum of its hidden states."""
        sequence, request = item.sequence, item.sequence.request
        start, end = sequence.computed, min(sequence.computed + item.count, len(request.prompt_ids))
        if sequence.output_ids or not request.reads_prompt:
            return
        if start == 0:  # once more from the start, after a preemption
            request.prompt_logprobs.clear()
        if request.embedding is not None:
            plain_CD = hidden_CD[: end - start, : self.model.config.hidden_size]  # without what a head's bias needs
            request.embedding = plain_CD.float().sum(0).cpu() + (request.embedding if start else 0)
        if request.params.prompt_logprobs is not None:
            targets = request.prompt_ids[start + 1 : end + 1]
            if targets:
                logits_CV = self.runner.logits(hidden_CD[: len(targets)])
                top = request.params.prompt_logprobs
                request.prompt_logprobs += [token_logprob(*pair, top) for pair in zip(logits_CV, targets, strict=True)]

    def _prompt(self, prompt: str | Ids[int], where: str) -> list[int]:
        ids = [self.tokenizer.bos_id, *self.tokenizer.encode(prompt)] if isinstance(prompt, str) else list(prompt)
        if not ids:
            raise UserError(where, "is empty", "give at least one token")
        vocab = self.model.config.vocab_size
        wrong = next((i for i in ids if not 0 <= i < vocab), None)
        if wrong is not None:
            raise UserError(where, f"{wrong} is no token id", f"the vocabulary is 0 to {vocab - 1}")
        capacity = self.blocks.capacity
        if self.settings.truncate_prompt and len(ids) >= min(self.context, capacity):
            ids = ids[-min(self.context, capacity) + 1 :]
        if len(ids) >= self.context:
            raise UserError(
                where, f"{len(ids)} tokens leave no room in the model's context of {self.context}", "shorten it"
            )
        if len(ids) >= capacity:
            raise UserError(where, f"{len(ids)} tokens do not fit the cache of {capacity}", "give it more memory")
        return ids

    def _end(self, request: Request, reason: str) -> None:
        for sequence in request.sequences:
            if not sequence.finish_reason:
                sequence.finish_reason = reason
                self.scheduler.drop(sequence)

    def _copy_block(self, source: int, target: int) -> None:
        self.runner.cache.copy(source, target)
        if self.drafter is not None:
            self.drafter.copy(source, target)


def _num_blocks(model: Transformer, settings: EngineSettings) -> int:
    """As many as the memory holds; never more than max_sequences of the longest context want."""
    dtype, device = model.head_weight.dtype, model.head_weight.device
    memory = settings.memory
    if memory is None:
        free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
        memory = free * (0.8 if device.type == "cuda" else 0.25)
    each, prefix = model.config.max_position_embeddings, prefix_length(model.soft_prefix)
    most = settings.max_sequences * -(-each // settings.block_size) + -(-prefix // settings.block_size)
    found = int(memory // PagedCache.bytes_per_block(model.config, settings.block_size, dtype))
    if found < 1:
        raise UserError("memory", f"{memory:.0f} bytes hold no block of keys and values", "give the cache more memory")
    return min(found, most)


__all__ = ["Delta", "Engine", "EngineSettings", "Request", "TokenLogprob"]
