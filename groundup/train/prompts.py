"""What is asked? The prompts of a recipe's files, and those of each round: a pure function of seed and round."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from groundup.config import Recipe
from groundup.data.mix import Index, Source, choose, permutation
from groundup.data.read import Reader
from groundup.data.rows import Chat, Preference, Prompt, Row, Unpaired, as_prompt
from groundup.errors import UserError
from groundup.rewards.episode import ToolUse
from groundup.tokenizer import Tokenizer

log = logging.getLogger(__name__)
MAX_LONG = 0.01  # share of prompts that may be too long before the run is refused
HEADER = 64  # bytes that a template may put around each message; more only means that a prompt is measured


@dataclass(frozen=True)
class Prompts:
    """Those to train on and those held out. longest: tokens of the longest one that is left."""

    train: list[Prompt]
    val: list[Prompt]
    longest: int

    @property
    def characters(self) -> int:
        """Of the training prompts: another number means other prompts."""
        return sum(len(message["content"]) for prompt in self.train for message in prompt.messages)


def open_prompts(recipe: Recipe, tokenizer: Tokenizer, tools: ToolUse | None = None) -> Prompts:
    """The prompts of the recipe's data. Of a conversation or a pair what comes before the answer in question.

    tools: those that a prompt offers, where it names none of its own.

    One that leaves no room for max_tokens in a row is left out and counted. UserError: more than 1 % of them are such,
    no row is a prompt.
    """
    room = recipe.train.seq_len - recipe.rl.max_tokens
    if room < 1:
        why = f"rows of {recipe.train.seq_len} tokens leave no prompt beside rl.max_tokens={recipe.rl.max_tokens}"
        raise UserError("train.seq_len", why, "make it the longest prompt and max_tokens together")
    measure = _Measure(recipe, tokenizer, room, tools)
    train: list[Prompt] = []
    val: list[Prompt] = []
    for given in recipe.data:
        source = Source(given.path, given.weight, given.split)
        rows = measure.fitting(given.path)
        fraction = 0.0 if recipe.eval.data else recipe.eval.fraction
        for into, chosen in zip((train, val), choose(len(rows), source, recipe.seed, fraction), strict=True):
            into += [rows[i] for i in chosen]
    for path in recipe.eval.data:
        val += measure.fitting(path)
    return Prompts(train, val, measure.longest)


class _Measure:
    def __init__(self, recipe: Recipe, tokenizer: Tokenizer, room: int, tools: ToolUse | None) -> None:
        self.recipe, self.tokenizer, self.room, self.tools, self.longest = recipe, tokenizer, room, tools, 1

    def fitting(self, path: str) -> list[Prompt]:
        """The prompts of a file that leave room for an answer."""
        found: list[Prompt] = []
        long: list[tuple[str, int]] = []
        reader = Reader(path, placeholders=self.recipe.fill)
        for row in reader:
            prompt = _prompt(row, reader.where)
            prompt = prompt if self.tools is None else self.tools.offer(prompt)
            tokens = self.tokens(prompt, reader.where)
            self.longest = max(self.longest, min(tokens, self.room))
            if tokens > self.room:
                long.append((reader.where, tokens))
            else:
                found.append(prompt)
        if long:
            where, tokens = long[0]
            why = f"{tokens} tokens leave no room for rl.max_tokens={self.recipe.rl.max_tokens} in a row"
            if len(long) > MAX_LONG * (len(long) + len(found)):
                counted = f"{len(long)} of {len(long) + len(found)} prompts are too long, the first is here"
                raise UserError(where, f"{counted}: {why}", "raise train.seq_len, or leave them out")
            log.warning("%s: %d prompts left out; the first, at %s: %s", path, len(long), where, why)
        return found

    def tokens(self, prompt: Prompt, where: str) -> int:
        """How many; of a short one only a bound: a token is a byte at least, and templates add little."""
        if not prompt.tools:
            bound = sum(len(message["content"].encode()) + HEADER for message in [*prompt.messages, {"content": ""}])
            if bound <= self.room and all(set(message) == {"role", "content"} for message in prompt.messages):
                return bound
        try:
            thinking = self.recipe.rl.enable_thinking
            return len(self.tokenizer.render(prompt.messages, prompt.tools, True, enable_thinking=thinking).ids)
        except UserError as error:
            raise UserError(where, f"{error.where}: {error.why}", error.fix) from error


def _prompt(row: Row, where: str) -> Prompt:
    if isinstance(row, Prompt):
        return row
    if isinstance(row, Preference):
        return Prompt(row.prompt, tools=row.tools)
    if isinstance(row, (Chat, Unpaired)):
        prompt = as_prompt(Chat(row.messages, row.tools))
        if prompt.messages:
            return prompt
    why = f"a row of kind {type(row).__name__} where a prompt is needed"
    raise UserError(where, why, "give rows with `prompt`, or with `conversations` and `gt`")


class Stream:
    """Prompts by number, without end: epoch after epoch, each in an order of its own, as data/batch.Loader has rows."""

    def __init__(self, prompts: int, *key: int) -> None:
        self.prompts, self.key = prompts, key
        self._epochs: dict[int, Index] = {}

    def at(self, places: Sequence[int]) -> list[int]:
        """Numbers of the prompts at these places of the stream."""
        return [int(self._epoch(place // self.prompts)[place % self.prompts]) for place in places]

    def _epoch(self, epoch: int) -> Index:
        if epoch not in self._epochs:
            while len(self._epochs) > 1:
                self._epochs.pop(min(self._epochs))
            self._epochs[epoch] = permutation(self.prompts, *self.key, epoch)
        return self._epochs[epoch]


def shares(prompts: int, parts: int, *key: int) -> list[set[int]]:
    """The round's prompt numbers 0.. in `parts` minibatches of one size, at random."""
    return [set(part.tolist()) for part in np.split(permutation(prompts, *key), parts)]


def columns_of(prompts: Iterable[Prompt]) -> dict[str, list[object]]:
    """What graders get beside prompts and answers: `answer`, and every further key of any row (absent ones None)."""
    prompts = list(prompts)
    names = {name: None for prompt in prompts for name in prompt.extra}
    return {"answer": [p.answer for p in prompts], **{name: [p.extra.get(name) for p in prompts] for name in names}}
