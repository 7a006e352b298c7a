"""What a file is read into: a few typed rows, whatever format the file was in.

A message is a dict `{"role": "system"|"user"|"assistant"|"tool", "content": str}` with, on assistant turns only where
they say something, `"reasoning_content": str` and `"tool_calls": [{"name": str, "arguments": dict}]`. Keys that say
nothing are absent, so a template may test for presence.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, TypeAlias

Message: TypeAlias = dict[str, Any]
Tools: TypeAlias = "list[dict[str, Any]] | None"


@dataclass(frozen=True)
class Text:
    """A document to continue: pretraining."""

    text: str


@dataclass(frozen=True)
class Chat:
    """A conversation whose assistant turns are learned: SFT. `tools` are JSON schemas as OpenAI writes them."""

    messages: list[Message]
    tools: Tools = None


@dataclass(frozen=True)
class Preference:
    """Two continuations of one prompt, the better one first: DPO, reward model. All three are lists of messages."""

    prompt: list[Message]
    chosen: list[Message]
    rejected: list[Message]
    tools: Tools = None


@dataclass(frozen=True)
class Unpaired:
    """A conversation and whether its last answer is wanted: KTO."""

    messages: list[Message]
    label: bool
    tools: Tools = None


@dataclass(frozen=True)
class Prompt:
    """A question without its answer: on-policy training and evaluation.

    answer: what a grader compares with (a string, a list of strings, or None when a model judges).
    extra: everything else that a grader needs, under the names the file gave it.
    """

    messages: list[Message]
    answer: Any = None
    extra: dict[str, Any] = field(default_factory=dict)
    tools: Tools = None


@dataclass(frozen=True)
class Choice:
    """A multiple-choice question. answer: index into choices, or None where the file keeps it secret (test splits)."""

    question: str
    choices: list[str]
    answer: int | None
    context: str = ""


@dataclass(frozen=True)
class Stepwise:
    """A solution in steps, each judged right or wrong: process reward models."""

    prompt: list[Message]
    completions: list[str]
    labels: list[bool]


@dataclass(frozen=True)
class ImageChat:
    """A conversation about pictures: every `<image>` in its contents is one of `images` (a path, or encoded bytes)."""

    messages: list[Message]
    images: list[str | bytes]
    tools: Tools = None


Row: TypeAlias = "Text | Chat | Preference | Unpaired | Prompt | Choice | Stepwise | ImageChat"


def message(role: str, content: str) -> Message:
    """One plain message."""
    return {"role": role, "content": content}


def as_prompt(row: Chat) -> Prompt:
    """The conversation before its last answer, for stages that answer themselves (an RLAIF file's own is a filler)."""
    messages = list(row.messages)
    while messages and messages[-1]["role"] == "assistant":
        messages.pop()
    return Prompt(messages, tools=row.tools)


def row_text(row: Row) -> str:
    """Everything a person would read in the row, joined by line ends: for language counts, filters and duplicates."""
    return "\n".join(part for part in _parts(row) if part)


def _parts(row: Row) -> Iterable[str]:
    if isinstance(row, Text):
        return [row.text]
    if isinstance(row, Choice):
        return [row.context, row.question, *row.choices]
    if isinstance(row, Preference):
        return _said([*row.prompt, *row.chosen, *row.rejected])
    if isinstance(row, Stepwise):
        return [*_said(row.prompt), *row.completions]
    return _said(row.messages)


def _said(messages: list[Message]) -> Iterable[str]:
    for one in messages:
        yield one.get("reasoning_content", "")
        yield one["content"]
        for call in one.get("tool_calls", []):
            yield f"{call['name']} {call['arguments']}"
