"""What does an answer say in the end? Without thoughts and tool calls, and within its tags where it has them."""

from __future__ import annotations

from typing import Any, TypeAlias

Prompts: TypeAlias = "list[list[dict[str, Any]]]"  # each a list of messages
Scores: TypeAlias = "list[float | None]"  # None: this answer is not judged
Column: TypeAlias = "list[Any] | None"  # None: no row has it

ENDS = ("</think>", "</tool_call>")


def said(text: str) -> str:
    """What follows the last thought and the last tool call: "" where one of them never ends.

    The opening mark of a thought may be missing, because the prompt wrote it.
    """
    for end in ENDS:
        text = text.rpartition(end)[2]
    return "" if any(end.replace("/", "") in text for end in ENDS) else text


def between(text: str, tag: str) -> str | None:
    """What stands between the last `</tag>` and the `<tag>` before it; None where there is no such pair."""
    end = text.rfind(f"</{tag}>")
    start = text.rfind(f"<{tag}>", 0, max(end, 0))
    return text[start + len(tag) + 2 : end] if start >= 0 else None


def final(text: str, tag: str = "answer") -> str:
    """What is between `<answer>` and `</answer>` of what is said in the end, or all of that."""
    text = said(text)
    inside = between(text, tag)
    return (text if inside is None else inside).strip()


def alternatives(answer: Any) -> list[str]:
    """The right answers of a row, as text: one, or a list of them."""
    return [str(one) for one in (answer if isinstance(answer, (list, tuple)) else [answer]) if one is not None]


def column(values: Column, count: int) -> list[Any]:
    """A column, or as many None where no row has it."""
    return [None] * count if values is None else values
