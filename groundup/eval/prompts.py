"""How is a question put? Bare (zero-shot), after solved examples (few-shot), asked to think first (chain of thought).

Examples are earlier turns of the chat, as Brown et al. 2020 (arXiv 2005.14165) have them in the text; with `cot` they
show how they were solved (Wei et al. 2022, arXiv 2201.11903), and the question asks for it (Kojima et al. 2022, arXiv
2205.11916).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

from groundup.errors import UserError

Message = dict[str, Any]

# Asked for after the question; where the question says itself how to answer, only the first sentence.
THINK = {"en": "Let's think step by step.", "zh": "请一步一步地思考。"}
END = {"en": "Then write: The answer is ...", "zh": "最后写：答案是……"}
ANSWER = {"en": "The answer is {}.", "zh": "答案是{}。"}
_NAMED = re.compile(r"<answer>|\\boxed|####")
_CALCULATED = re.compile(r"<<[^<>]*>>")  # GSM8K's notes for a calculator


@dataclass(frozen=True)
class Item:
    """A question with its answer. worked: how it is solved, where the data tells. think_first: words before a question
    that ask this set's readers to think (the built-in world has its own). columns: what graders need besides."""

    messages: list[Message]
    answer: Any
    language: str = "en"
    kind: str = ""
    worked: str = ""
    think_first: str = ""
    columns: dict[str, Any] = field(default_factory=dict)
    tools: list[dict[str, Any]] | None = None

    @property
    def right(self) -> str:
        """The answer as text; the first where several are right."""
        return str(self.answer[0] if isinstance(self.answer, list) and self.answer else self.answer)


@dataclass(frozen=True)
class PromptStyle:
    """shots: solved examples before each question. cot: chain of thought. seed: which examples."""

    shots: int = 0
    cot: bool = False
    seed: int = 0


def put(item: Item, style: PromptStyle, shots: Sequence[Item] = ()) -> list[Message]:
    """The messages that ask this question in this style, after the solved examples."""
    system = [m for m in item.messages[:1] if m["role"] == "system"]
    asked = item.messages[len(system) :]
    if style.cot:
        asked = _with_wish(item, asked)
    return [*system, *(m for one in shots for m in _solved(one, style.cot)), *asked]


def choose(language: str, kind: str, style: PromptStyle, examples: Sequence[Item]) -> list[Item]:
    """The examples of all questions of a language and kind: of their own kind, if there are enough."""
    if not style.shots:
        return []
    near = [one for one in examples if one.language == language] or list(examples)
    same = [one for one in near if one.kind == kind]
    pool = same if len(same) >= style.shots else near
    if len(pool) < style.shots:
        raise UserError("--shots", f"{style.shots} examples of {len(pool)} that there are", "give fewer")
    return Random(f"{style.seed}/{language}/{kind}").sample(pool, style.shots)


def _solved(item: Item, cot: bool) -> list[Message]:
    """An example: its question, and the right answer, worked out where thoughts are asked for."""
    asked = [m for m in item.messages if m["role"] != "system"]
    if not cot:
        return [*asked, {"role": "assistant", "content": item.right}]
    if not item.worked:
        raise UserError(
            "--cot", "with --shots needs examples with a worked solution, and these rows have none",
            "leave out one of the two",
        )  # fmt: skip
    asked = _with_wish(item, asked)
    if item.think_first:  # a reader who thinks in its template's own way
        return [*asked, {"role": "assistant", "content": item.right, "reasoning_content": item.worked}]
    return [*asked, {"role": "assistant", "content": worked_answer(item)}]


def worked_answer(item: Item) -> str:
    """The solution as a model shall write it: without a calculator's notes, and with its answer named in the end."""
    text = _CALCULATED.sub("", item.worked).rstrip()
    if "####" in text:
        text = text[: text.rindex("####")].rstrip()
    elif _NAMED.search(text):
        return text
    return f"{text}\n{ANSWER[_spoken(item)].format(item.right)}"


def _with_wish(item: Item, asked: list[Message]) -> list[Message]:
    """The last turn with the wish to think: before it in the set's own words, else after it."""
    last = asked[-1]
    if item.think_first:
        content = last["content"]
        content = content if content.startswith(item.think_first) else item.think_first + content
    else:
        spoken = _spoken(item)
        wish = THINK[spoken] if _NAMED.search(last["content"]) else f"{THINK[spoken]} {END[spoken]}"
        content = f"{last['content']}\n{wish}"
    return [*asked[:-1], {**last, "content": content}]


def _spoken(item: Item) -> str:
    return item.language if item.language in THINK else "en"
