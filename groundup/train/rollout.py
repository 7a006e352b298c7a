"""What does the policy say now? Answers of the model that is being trained, by the engine that serves it.

The engine computes with the very parameters that the optimizer moves (infer/fused.py makes them views of joined
matrices; no copy is made), so after a step it answers as the model then is. What is said is a pure function of
(weights, seed, round, number of the prompt): every answer draws from random numbers of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from groundup.adapt.soft import SoftPrompted
from groundup.config import RLConfig
from groundup.data.mix import hash64
from groundup.data.rows import Message, Prompt
from groundup.errors import UserError
from groundup.infer.engine import Engine, EngineSettings
from groundup.infer.params import Completion, SamplingParams
from groundup.infer.thinking import OPEN
from groundup.rewards.episode import next_prompt_ids
from groundup.tokenizer import Tokenizer

BLOCK = 16  # tokens of a block of the engine's cache
LONGEST = 2048  # tokens of a prompt with its answer, where nobody says how many there may be
ROLLOUT = 7  # so that one seed makes unrelated choices


@dataclass
class Answer:
    """One answer of the policy. ids, logprobs and mask have one entry a token, the stop token included.

    prompt: its place among the prompts that were asked. logprobs: the engine's, of the distribution that was drawn
    from. mask: 1 where the policy spoke, 0 where a tool did. text: without special tokens, thoughts included (a thought
    that the prompt opened, too); of several turns the policy's own words, a line each. messages: what an environment
    and the policy said in turn, where there is one. truncated: it had no room to end.
    """

    prompt: int
    prompt_ids: list[int]
    ids: list[int]
    logprobs: list[float]
    mask: list[int]
    text: str
    truncated: bool
    messages: list[Message]


class Environment(Protocol):
    """What a policy can call between its turns."""

    def reply(self, prompt: Prompt, messages: list[Message], text: str) -> tuple[Message, list[Message]] | None:
        """(the assistant's turn as a message, what the tools answer), or None where the conversation ends with `text`.
        messages: those of the prompt and of the turns before."""


class Sampler:
    """Answers of `model` (a Transformer, a Foreign, a SoftPrompted) at the recipe's temperature.

    longest: tokens of a prompt and its answer for which the cache has room at once; longer ones are waited for. dtype:
    of products, as in training. environment, turns: tools, and how often the policy may speak.
    """

    def __init__(
        self, model: nn.Module, tokenizer: Tokenizer, config: RLConfig, seed: int, *, longest: int = LONGEST,
        dtype: torch.dtype = torch.float32, environment: Environment | None = None, turns: int = 1,
    ) -> None:  # fmt: skip
        self.model, self.tokenizer, self.config, self.seed, self.dtype = model, tokenizer, config, seed, dtype
        self.inner: Any = model.model if isinstance(model, SoftPrompted) else model
        self.longest, self.environment, self.turns = longest, environment, turns
        self._engine: Engine | None = None

    def render(self, prompt: Prompt) -> list[int]:
        """The ids that a prompt's answers begin after."""
        return self._render(prompt)[0]

    def _render(self, prompt: Prompt) -> tuple[list[int], str]:
        """Its ids, and the opening of a thought if it ends in one: that is the beginning of the answer's text."""
        thinking = self.config.enable_thinking
        shown = self.tokenizer.render(prompt.messages, prompt.tools, True, enable_thinking=thinking)
        end = shown.text.rstrip()
        return shown.ids, shown.text[len(end) - len(OPEN) :] if end.endswith(OPEN) else ""

    def sample(
        self, prompts: Sequence[Prompt], round: int, numbers: Sequence[int] | None = None, n: int | None = None,
        temperature: float | None = None, top_p: float | None = None,
    ) -> list[Answer]:  # fmt: skip
        """n answers to each prompt (the recipe's group_size by default), one prompt's after another's.

        numbers: of the prompts in the round, over all ranks: what is said to a prompt depends on its number alone.
        temperature, top_p: other than the recipe's. UserError: the model's logits are no numbers.
        """
        numbers = range(len(prompts)) if numbers is None else numbers
        talks = []
        for place, (prompt, number) in enumerate(zip(prompts, numbers, strict=True)):
            ids, opened = self._render(prompt)
            talks += [_Talk(place, number, prompt, ids, opened) for _ in range(n or self.config.group_size or 1)]
        params = {"temperature": self.config.temperature if temperature is None else temperature,
                  "top_p": self.config.top_p if top_p is None else top_p, "top_k": self.config.top_k}  # fmt: skip
        was = self.model.training
        self.model.eval()
        try:
            with torch.no_grad(), self._as_in_training():
                self._first(talks, round, params)
                for turn in range(1, self.turns if self.environment is not None else 1):
                    self._next([talk for talk in talks if talk.going], round, turn, params)
        finally:
            self.model.train(was)
            if isinstance(self.model, SoftPrompted):
                self.inner.soft_prefix = None  # it learns on, and this one would not
        return [talk.answer() for talk in talks]

    @contextmanager
    def _as_in_training(self) -> Iterator[None]:
        """Products in training's type, and no compiled block: an engine's steps have shapes of their own."""
        with ExitStack() as stack:
            if self.dtype != torch.float32:  # no cache: a recorded step must not hold on to a cast of old weights
                device = self.inner.head_weight.device.type
                stack.enter_context(torch.autocast(device, self.dtype, cache_enabled=False))
            if any(block._compiled_call_impl is not None for block in self.inner.blocks):
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            yield

    def _first(self, talks: list[_Talk], round: int, params: dict[str, Any]) -> None:
        """The first turn: all answers to a prompt are one request, so that it is read once."""
        groups: dict[int, list[_Talk]] = {}
        for talk in talks:
            groups.setdefault(talk.place, []).append(talk)
        asked = [(group[0].ids, self._params(group[0], len(group), round, 0, params)) for group in groups.values()]
        answers = iter(self._ask(asked))
        for group in groups.values():
            for talk in group:
                talk.say(next(answers))

    def _next(self, talks: list[_Talk], round: int, turn: int, params: dict[str, Any]) -> None:
        """One more turn of those whose last words called a tool, and who have room left to hear it and to speak."""
        assert self.environment is not None
        asked = []
        for talk in talks:
            heard = self.environment.reply(talk.prompt, talk.messages, talk.texts[-1])
            observed = [] if heard is None else self._observed(talk, heard[1])
            talk.going = heard is not None and len(talk.said) + len(observed) < self.config.max_tokens
            talk.truncated = heard is not None and not talk.going
            if heard is not None and talk.going:
                talk.hear(observed, [heard[0], *heard[1]])
                params_of = self._params(talk, 1, round, turn, params)
                asked.append((talk, (talk.ids + talk.said, params_of)))
        for (talk, _), answer in zip(asked, self._ask([each for _, each in asked]), strict=True):
            talk.say(answer)

    def _observed(self, talk: _Talk, heard: list[Message]) -> list[int]:
        """What stands between the policy's turn and its next one; what it said stays token for token as it is."""
        ids, tools = talk.ids + talk.said, talk.prompt.tools
        return next_prompt_ids(self.tokenizer, ids, heard, tools, self.config.enable_thinking)[len(ids) :]

    def _params(self, talk: _Talk, n: int, round: int, turn: int, params: dict[str, Any]) -> SamplingParams:
        key = (self.seed, ROLLOUT, round, turn, *((talk.index,) if turn else ()))
        seed = int(hash64(np.array([talk.number]), *key)[0] >> np.uint64(1))
        room = self.config.max_tokens - len(talk.said)
        return SamplingParams(max_tokens=room, n=n, seed=seed, logprobs=0, logprobs_mode="processed_logprobs", **params)

    def _ask(self, asked: Sequence[tuple[list[int], SamplingParams]]) -> list[Completion]:
        """Answers in the order of the requests."""
        if not asked:
            return []
        engine = self.engine()
        requests = [engine.add(ids, params, where=f"prompt {i}") for i, (ids, params) in enumerate(asked, 1)]
        while engine.has_work:
            engine.step()
        for request in requests:
            if request.error:
                fix = "the weights hold no numbers: try a lower optim.lr in another output"
                raise UserError("rollout", f"the policy cannot be sampled ({request.error})", fix)
        return [completion for request in requests for completion in request.completions()]

    def engine(self) -> Engine:
        """Over the parameters as they are now."""
        if isinstance(self.model, SoftPrompted):
            self.inner.soft_prefix = [(k.detach().clone(), v.detach().clone()) for k, v in self.model.prefix()]
        if self._engine is None:
            context = self.inner.config.max_position_embeddings
            at_once = max(self.config.max_sequences, self.config.group_size or 1)
            blocks = (at_once + 1) * -(-min(self.longest, context) // BLOCK)  # one more: for a soft prompt
            settings = EngineSettings(BLOCK, num_blocks=blocks, max_sequences=at_once)
            self._engine = Engine(self.inner, self.tokenizer, settings)
        else:
            self._engine.forget()
        return self._engine


class _Talk:
    """One answer on its way, turn by turn."""

    def __init__(self, place: int, number: int, prompt: Prompt, ids: list[int], opened: str) -> None:
        self.place, self.number, self.prompt, self.ids, self.opened = place, number, prompt, ids, opened
        self.index = 0
        self.said: list[int] = []
        self.logprobs: list[float] = []
        self.mask: list[int] = []
        self.texts: list[str] = []
        self.messages = list(prompt.messages)
        self.going, self.truncated = True, False

    def say(self, completion: Completion) -> None:
        self.index, self.said = completion.index if not self.texts else self.index, self.said + completion.ids
        self.logprobs += [each.logprob for each in completion.logprobs or []]
        self.mask += [1] * len(completion.ids)
        self.texts.append(self.opened + completion.text)
        self.truncated = completion.finish_reason == "length"
        self.going = not self.truncated

    def hear(self, ids: list[int], messages: list[Message]) -> None:
        self.said, self.logprobs = self.said + ids, self.logprobs + [0.0] * len(ids)
        self.mask += [0] * len(ids)
        self.messages += messages

    def answer(self) -> Answer:
        text = "\n".join(self.texts)
        return Answer(self.place, self.ids, self.said, self.logprobs, self.mask, text, self.truncated, self.messages)
