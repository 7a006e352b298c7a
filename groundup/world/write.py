"""The world as files in the formats that people own: {"text"}, {"conversations"}, {"chosen", "rejected"}."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from groundup.world.rows import Chat, Message, Preference, Question, ReasoningPrompt


def conversation(messages: list[Message], tools: list[dict[str, Any]] | None = None) -> list[dict[str, str]]:
    """Messages as MiniMind's files spell them: tools on the system message and tool_calls, both as JSON text."""
    rows: list[dict[str, str]] = []
    if tools and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": ""}, *messages]
    for message in messages:
        row = dict(message)
        if "tool_calls" in row:
            row["tool_calls"] = json.dumps(row["tool_calls"], ensure_ascii=False)
        if tools and message["role"] == "system":
            row["tools"] = json.dumps(tools, ensure_ascii=False)
        rows.append(row)
    return rows


def text_row(text: str) -> dict[str, Any]:
    return {"text": text}


def chat_row(chat: Chat) -> dict[str, Any]:
    return {"conversations": conversation(chat.messages, chat.tools)}


def question_row(question: Question | ReasoningPrompt) -> dict[str, Any]:
    """A prompt with its right answer under `gt`, an empty assistant turn last, as MiniMind's agent rows have it."""
    messages = [*conversation(question.messages), {"role": "assistant", "content": ""}]
    row = {
        "id": question.id,
        "language": question.language,
        "kind": question.kind,
        "conversations": messages,
        "gt": [question.answer],
    }
    if isinstance(question, ReasoningPrompt):
        row["reasoning"] = question.reasoning
    return row


def thought_row(prompt: ReasoningPrompt) -> dict[str, Any]:
    """The prompt answered, with its right thought."""
    answered = {"role": "assistant", "content": prompt.answer, "reasoning_content": prompt.reasoning}
    return {"conversations": conversation([*prompt.messages, answered])}


def preference_row(preference: Preference) -> dict[str, Any]:
    return {side: preference.prompt + getattr(preference, side) for side in ("chosen", "rejected")}


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> int:
    """Write one JSON object a line; the number of rows. The file has its name when it is whole."""
    part = path.with_name(f"{path.name}.part")
    with part.open("w", encoding="utf-8") as file:
        count = sum(1 for row in rows if file.write(json.dumps(row, ensure_ascii=False) + "\n"))
    part.replace(path)
    return count
