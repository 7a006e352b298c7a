"""Which part of an answer is what? Its text becomes reasoning_content, content and tool_calls, piece by piece."""

from __future__ import annotations

import uuid
from collections.abc import Iterable
from typing import Any

from groundup.infer.thinking import ThinkSplitter
from groundup.infer.toolcalls import CallArguments, CallStart, Event, TextPiece, ToolCallSplitter


class Speaker:
    """One choice of a chat. feed() gives OpenAI's "delta" objects for a piece of text; message() is the whole.

    thinking: whether the prompt opened the thinking. tools: whether calls may come.
    """

    def __init__(self, thinking: bool = False, tools: bool = False) -> None:
        self.reasoning, self.content = "", ""
        self.calls: list[dict[str, Any]] = []
        self._think = ThinkSplitter(thinking)
        self._tools = ToolCallSplitter() if tools else None

    def feed(self, text: str) -> list[dict[str, Any]]:
        return self._say(self._think.feed(text))

    def finish(self) -> list[dict[str, Any]]:
        """What was held back when the answer ends."""
        deltas = self._say(self._think.flush())
        return deltas if self._tools is None else deltas + self._call(self._tools.flush())

    def message(self) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": self.content, "refusal": None}
        if self.reasoning:
            message["reasoning_content"] = self.reasoning
        if self.calls:
            message |= {"content": self.content or None, "tool_calls": self.calls}
        return message

    def finish_reason(self, reason: str) -> str:
        return "tool_calls" if reason == "stop" and self.calls else reason

    def _say(self, parts: Iterable[tuple[bool, str]]) -> list[dict[str, Any]]:
        deltas: list[dict[str, Any]] = []
        for thinking, text in parts:
            if thinking:
                self.reasoning += text
                deltas.append({"reasoning_content": text})
            elif self._tools is None:
                deltas += self._text(text)
            else:
                deltas += self._call(self._tools.feed(text))
        return deltas

    def _text(self, text: str) -> list[dict[str, Any]]:
        self.content += text
        return [{"content": text}]

    def _call(self, events: Iterable[Event]) -> list[dict[str, Any]]:
        deltas: list[dict[str, Any]] = []
        for event in events:
            if isinstance(event, TextPiece):
                deltas += self._text(event.text)
            elif isinstance(event, CallStart):
                call = {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function"}
                self.calls.append({**call, "function": {"name": event.name, "arguments": ""}})
                function = {"name": event.name, "arguments": ""}
                deltas.append({"tool_calls": [{"index": event.index, **call, "function": function}]})
            elif isinstance(event, CallArguments):
                self.calls[event.index]["function"]["arguments"] += event.text
                deltas.append({"tool_calls": [{"index": event.index, "function": {"arguments": event.text}}]})
            # CallEnd: arguments that are no JSON stay as the model wrote them, since they have been sent
        return deltas
