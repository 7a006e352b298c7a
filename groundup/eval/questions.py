"""Which questions, and who grades the answers? The built-in world's, its prompts to think, or rows of a file."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from groundup.config.rl import RewardSpec
from groundup.data.language import language
from groundup.data.read import Reader
from groundup.data.rows import Prompt
from groundup.errors import UserError
from groundup.eval.prompts import Item, Message, PromptStyle, choose, put
from groundup.eval.world import normalise
from groundup.infer.answers import final_answer

if TYPE_CHECKING:
    from groundup.world import World

LANGUAGES = ("zh", "en")
OWN_REWARDS = {"countdown": "countdown", "knights-knaves": "knights_knaves"}  # by format
LOOK = 200  # rows that decide what kind of answers a file has
NUMBER = r"[-+]?[$€£¥]?[\d.,]*\d%?(?:/\d+)?"
Grade = Callable[[Sequence[Item], Sequence[list[Message]], Sequence[str]], list[float]]


@dataclass(frozen=True)
class QuestionSet:
    """name: what reports call it. grade: (questions, messages as they were put, replies) -> 1 for right, 0 for wrong,
    or what lies between. examples: what few-shot prompts are made of; no question is among them."""

    name: str
    items: list[Item]
    grade: Grade
    examples: list[Item] = field(default_factory=list)

    def put(self, style: PromptStyle) -> list[list[Message]]:
        kinds = {(item.language, item.kind) for item in self.items}
        shots = {kind: choose(*kind, style, self.examples) for kind in kinds}
        return [put(item, style, shots[item.language, item.kind]) for item in self.items]


def exact(items: Sequence[Item], messages: Sequence[list[Message]], replies: Sequence[str]) -> list[float]:
    """Is the whole reply the answer, thoughts, white space and final punctuation aside?"""
    return [float(normalise(reply) == normalise(item.right)) for item, reply in zip(items, replies, strict=True)]


def world_questions(world: World, style: PromptStyle | None = None, kinds: Sequence[str] = ()) -> QuestionSet:
    """The built-in world's held-out questions in both languages, of these kinds (default: all). style: how they will be
    put; few-shot examples are train questions, with chain of thought prompts to think."""
    from groundup.world.reasoning import THINK

    def items(side: str) -> list[Item]:
        return [
            Item(q.messages, q.answer, q.language, q.kind, think_first=THINK[q.language])
            for spoken in LANGUAGES
            for q in world.questions(side, spoken)
            if not kinds or q.kind in kinds
        ]

    if unknown := next((kind for kind in kinds if kind not in world.kinds), None):
        raise UserError("--kind", f"{unknown!r} is unknown", f"one of {', '.join(world.kinds)}")
    shots, cot = (style.shots, style.cot) if style else (0, False)
    examples = (_thoughts(world, "train", 200) if cot else items("train")) if shots else []
    return QuestionSet("world", items("heldout"), exact, examples)


def world_reasoning(world: World, split: str = "heldout", count: int = 200) -> QuestionSet:
    """The built-in world's prompts that ask to think first: sums of three numbers, relations in two steps."""
    return QuestionSet("reasoning", _thoughts(world, split, count), exact, _thoughts(world, "train", 200, seed=1))


def _thoughts(world: World, split: str, count: int, seed: int = 0) -> list[Item]:
    from groundup.world.reasoning import THINK

    return [
        Item(p.messages, p.answer, p.language, p.kind, p.reasoning, THINK[p.language])
        for p in world.reasoning_prompts(split, count, seed)
    ]


def file_questions(
    path: str | Path, reward: str | None = None, shots: int = 0, limit: int | None = None
) -> QuestionSet:
    """Rows with answers, graded by a reward of groundup/rewards (a name, or FILE.py:function; default: by the format).

    The first `shots` rows are the examples, and are not asked. limit: at most so many questions.
    """
    items = read_items(path, None if limit is None else limit + shots)
    if len(items) <= shots:
        raise UserError(path, f"holds {len(items)} rows, {shots} of which would be examples", "give fewer shots")
    grade = grader([RewardSpec(name=reward)] if reward else [], path)
    return QuestionSet(Path(path).name, items[shots:], grade, items[:shots])


def read_items(path: str | Path, limit: int | None = None) -> list[Item]:
    """The rows of a file as questions. UserError: a row that is none."""
    reader = Reader(path)
    return [_item(row, reader) for row in islice(reader, limit)]


def _item(row: Any, reader: Reader) -> Item:
    if not isinstance(row, Prompt):
        fix = "give rows with a question and its answer"
        raise UserError(reader.where, f"a {type(row).__name__} row cannot be asked and graded", fix)
    said = row.messages[-1]["content"]
    worked = next((row.extra[key] for key in ("solution", "reasoning") if isinstance(row.extra.get(key), str)), "")
    return Item(row.messages, row.answer, language(said), str(row.extra.get("kind", "")), worked,
                columns=row.extra, tools=row.tools)  # fmt: skip


def grader(rewards: Sequence[RewardSpec], path: str | Path) -> Grade:
    """The rewards as a grader: their weighted sum, 0 for what nobody can judge.

    Without any, what the rows of `path` ask for: countdown, and knights and knaves, have graders of their own; numbers
    are compared where all answers are such, else the words of the final answer (infer/answers.py).
    """
    from groundup.rewards.build import build_rewards

    specs = list(rewards) or [RewardSpec(name=_reward_for(path))]
    bare = not rewards and specs[0].name == "exact"
    built = build_rewards(specs)

    def grade(items: Sequence[Item], messages: Sequence[list[Message]], replies: Sequence[str]) -> list[float]:
        names = {name: None for item in items for name in item.columns}
        columns: dict[str, list[Any]] = {"answer": [item.answer for item in items]}
        columns |= {name: [item.columns.get(name) for item in items] for name in names}
        texts = [final_answer(reply) for reply in replies] if bare else list(replies)
        totals, _ = built(list(messages), texts, columns)
        return [0.0 if math.isnan(total) else float(total) for total in totals]

    return grade


def _reward_for(path: str | Path) -> str:
    reader = Reader(path)
    answers = [row.answer for row in islice(reader, LOOK) if isinstance(row, Prompt)]
    if reader.format in OWN_REWARDS:
        return OWN_REWARDS[reader.format]
    told = [str(one) for answer in answers for one in (answer if isinstance(answer, list) else [answer])]
    return "number" if told and all(re.fullmatch(NUMBER, one.strip()) for one in told) else "exact"
