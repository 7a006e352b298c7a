"""Requests as people send them, mixed at random: chats and texts, streamed or not, some hung up on, some wrong."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
SHARES = {"ask": 0.76, "cancel": 0.12, "bad": 0.12}
LONGEST = 512  # tokens of a prompt and its answers, or half of the context where that is less
FAMILIES = 4  # long texts that many prompts begin with


@dataclass(frozen=True)
class Plan:
    """One request. kind: of SHARES. number: of its body. patience: events (streamed) or seconds before hanging up."""

    kind: str
    path: str
    body: dict[str, Any] | bytes
    number: int = -1
    patience: float = 0.0
    streamed: bool = field(default=False)


class Traffic:
    """texts: what prompts are cut from. tokens: how many of them a text has. context: the model's, in tokens."""

    def __init__(self, texts: list[str], tokens: Any, context: int, model: str, seed: int, distinct: int) -> None:
        self.random, self.texts, self.tokens, self.model = random.Random(seed), texts, tokens, model
        self.longest = min(LONGEST, context // 2)
        self.context = context
        self.new = max(4, min(32, self.longest // 8))
        self.shared = [self.text(self.longest // 3) for _ in range(FAMILIES)]
        self.bodies = [self.body() for _ in range(distinct)]
        self.wrong = list(bad_bodies(model, context))

    def plans(self, count: int) -> list[Plan]:
        """Every body and every wrong body comes at least once where `count` allows it; then by chance."""
        kinds = self.random.choices(list(SHARES), list(SHARES.values()), k=count)
        asked = {kind: 0 for kind in SHARES}
        found = []
        for kind in kinds:
            turn = asked[kind]
            asked[kind] += 1
            if kind == "bad":
                path, body = self.wrong[turn % len(self.wrong)]
                found.append(Plan(kind, path, body))
                continue
            number = turn % len(self.bodies) if kind == "ask" else self.random.randrange(len(self.bodies))
            path, body = self.bodies[number]
            streamed = self.random.random() < 0.5
            if streamed:
                body = body | {"stream": True, "stream_options": {"include_usage": True}}
            patience = 0.0
            if kind == "cancel":
                patience = self.random.randrange(1, 8) if streamed else self.random.uniform(0.0, 0.2)
            found.append(Plan(kind, path, body, number, patience, streamed))
        return found

    def text(self, tokens: int) -> str:
        """Text of at most so many tokens."""
        words = ""
        while self.tokens(words) < tokens:
            words += self.random.choice(self.texts) + "\n"
        low, high = 0, len(words)  # the longest beginning that fits
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.tokens(words[:middle]) <= tokens else (low, middle - 1)
        return words[:low]

    def body(self) -> tuple[str, dict[str, Any]]:
        """One request that has one right answer: greedy, or with a seed."""
        chance = self.random.random
        own = self.text(self.random.randrange(4, max(5, self.longest // 4)))
        begin = self.random.choice(self.shared) if chance() < 0.5 else ""
        body: dict[str, Any] = {"model": self.model, "max_tokens": self.random.randrange(2, self.new + 1)}
        if chance() < 0.5:
            path = CHAT
            system = [{"role": "system", "content": begin}] if begin else []
            body["messages"] = [*system, {"role": "user", "content": own}]
        else:
            path = TEXT
            body["prompt"] = begin + own if chance() < 0.8 else [begin + own, own]
        return path, body | self.sampling()

    def sampling(self) -> dict[str, Any]:
        chance = self.random.random
        how: dict[str, Any] = {"temperature": 0}
        if chance() < 0.6:
            how = {"temperature": self.random.choice((0.5, 0.8, 1.0, 1.5)), "seed": self.random.randrange(2**31)}
            how |= self.random.choice(({}, {"top_p": 0.9}, {"top_k": 20}, {"min_p": 0.05}, {"top_k": 50, "top_p": 0.8}))
            if chance() < 0.3:
                how["n"] = self.random.randrange(2, 5)
        if chance() < 0.3:
            how |= self.random.choice(
                ({"presence_penalty": 0.7}, {"frequency_penalty": 0.9}, {"repetition_penalty": 1.3})
            )
        if chance() < 0.3:
            how["stop"] = self.random.choice((["."], ["e", "\n"], "的", [" the ", "qu", "z", "ing", "是"]))
        if chance() < 0.2:
            how["ignore_eos"] = True
        if chance() < 0.1:
            how["logit_bias"] = {"10": -100, "20": 5}
        return how


def bad_bodies(model: str, context: int) -> Iterator[tuple[str, dict[str, Any] | bytes]]:
    """What must be refused, (path, body): wrong types, out of range, missing, too long, no JSON at all."""
    chat: dict[str, Any] = {"model": model, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4}
    text: dict[str, Any] = {"model": model, "prompt": "Hi", "max_tokens": 4}
    wrong: list[dict[str, Any]] = [
        {"temperature": -1}, {"temperature": "warm"}, {"temperature": 10**9}, {"top_p": 0}, {"top_p": 2}, {"n": 0},
        {"n": 10**6}, {"max_tokens": -5}, {"max_tokens": "many"}, {"max_tokens": 1.5}, {"seed": "x"}, {"stop": [1]},
        {"stop": [""]}, {"presence_penalty": 9}, {"frequency_penalty": [1]}, {"repetition_penalty": 0},
        {"logit_bias": {"x": 1}}, {"logit_bias": [1]}, {"logit_bias": {"99999999": 1}}, {"stream": "yes"},
        {"stream_options": {"include_usage": True}}, {"model": "no-such-model"}, {"model": 5}, {"min_p": 2},
    ]  # fmt: skip
    for path, good in ((CHAT, chat), (TEXT, text)):
        for fault in wrong:
            yield path, good | fault
        for nothing in (b"", b"{", b"[]", b"null", b'"text"', b'{"model": }', b"\xff\xfe", b"{}"):
            yield path, nothing
    for messages in ([], "Hi", [{"role": "king", "content": "Hi"}], [{"content": "Hi"}], [5], None):
        yield CHAT, chat | {"messages": messages}
    yield CHAT, chat | {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}
    yield CHAT, chat | {"top_logprobs": 50, "logprobs": True}
    yield CHAT, chat | {"response_format": {"type": "xml"}}
    yield CHAT, chat | {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": 7}}}}
    yield CHAT, chat | {"tool_choice": "required"}
    prompts: list[Any] = [[], [[]], [[10**9]], [-1], 5, None, {"a": 1}]
    for prompt in prompts:
        yield TEXT, text | {"prompt": prompt}
    yield TEXT, text | {"logprobs": 99}
    yield TEXT, json.dumps(text).encode()[:-1]
    yield from too_long(model, context)


def too_long(model: str, context: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Prompts that do not fit in the context: no request costs the server more memory before it is refused."""
    yield CHAT, {"model": model, "messages": [{"role": "user", "content": "word " * (context + 1)}]}
    yield TEXT, {"model": model, "prompt": [1] * (context + 1)}
