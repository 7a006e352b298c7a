"""What has been asked and answered on the page? Turns of one question and an answer a column; no streamlit here."""

from __future__ import annotations

import base64
import json
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

# OpenAI's protocol wants a result for every call before the chat goes on, and this page runs none.
NOT_RUN = "(the call was shown to the user, not run)"


class Fault(Exception):
    """Why the server did not answer. kind: a label of page_text; detail: what the server said, one line."""

    def __init__(self, kind: str, detail: str = "") -> None:
        self.kind, self.detail = kind, " ".join(detail.split())
        super().__init__(kind, self.detail)


@dataclass(frozen=True)
class Model:
    """What /v1/models says of one: its id, the model it is an adapter of, whether it takes pictures."""

    id: str
    parent: str = ""
    sees: bool = False


@dataclass(frozen=True)
class Picture:
    data: bytes
    type: str  # MIME

    @property
    def url(self) -> str:
        return f"data:{self.type};base64,{base64.b64encode(self.data).decode()}"


@dataclass(frozen=True)
class Settings:
    """How to answer. None: not sent, so the server's own setting holds."""

    system: str = ""
    thinking: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    max_tokens: int | None = None
    seed: int | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    tools: tuple[dict[str, Any], ...] = ()

    def request(self) -> dict[str, Any]:
        """Arguments of chat.completions.create; what OpenAI's own API does not know goes in as vLLM spells it."""
        plain = ("temperature", "top_p", "max_tokens", "seed", "presence_penalty", "frequency_penalty")
        values = {name: value for name, value in asdict(self).items() if value is not None}
        request = {name: values[name] for name in plain if name in values}
        extra: dict[str, Any] = {
            name: values[name] for name in ("top_k", "min_p", "repetition_penalty") if name in values
        }
        if self.thinking is not None:
            extra["chat_template_kwargs"] = {"enable_thinking": self.thinking}
        if self.tools:
            request["tools"] = list(self.tools)
        return request | ({"extra_body": extra} if extra else {})


@dataclass
class ToolCall:
    id: str = ""
    name: str = ""
    arguments: str = ""  # JSON, possibly still incomplete

    @property
    def pretty(self) -> str:
        """The arguments indented, or as they came while they are not (yet) JSON."""
        try:
            return json.dumps(json.loads(self.arguments), ensure_ascii=False, indent=2)
        except ValueError:
            return self.arguments


@dataclass(eq=False)
class Answer:
    """One model's answer, filled by the client's thread while the page reads it.

    stop: ends it early; the client sets it. news: raised at every change.
    finish_reason: OpenAI's, or "stopped" by the person.
    """

    model: str
    news: threading.Event = field(default_factory=threading.Event, repr=False)
    reasoning: str = ""
    content: str = ""
    calls: list[ToolCall] = field(default_factory=list)
    finish_reason: str = ""
    fault: Fault | None = None
    tokens: int | None = None
    thought_seconds: float = 0.0
    seconds: float = 0.0
    done: bool = False
    stop: Callable[[], object] = field(default=lambda: None, repr=False)
    started: float = field(default_factory=time.monotonic, repr=False)

    def take(self, chunk: Any) -> None:
        """Add one chunk of a stream (openai's ChatCompletionChunk)."""
        if chunk.usage:
            self.tokens = chunk.usage.completion_tokens
        for choice in chunk.choices:
            delta = choice.delta
            thought = getattr(delta, "reasoning_content", None) or getattr(delta, "reasoning", None)
            if thought:
                self.reasoning += thought
                self.thought_seconds = time.monotonic() - self.started
            self.content += delta.content or ""
            for piece in delta.tool_calls or ():
                self._take_call(piece)
            self.finish_reason = choice.finish_reason or self.finish_reason
        self.news.set()

    def _take_call(self, piece: Any) -> None:
        while len(self.calls) <= piece.index:
            self.calls.append(ToolCall())
        call = self.calls[piece.index]
        call.id = piece.id or call.id
        if piece.function:
            call.name = piece.function.name or call.name
            call.arguments += piece.function.arguments or ""

    def end(self, finish_reason: str = "", fault: Fault | None = None) -> None:
        """The first end counts: what comes after a stop is the echo of it."""
        if self.done:
            return
        self.finish_reason = finish_reason or self.finish_reason
        self.fault, self.seconds, self.done = fault, time.monotonic() - self.started, True
        self.news.set()

    @property
    def useful(self) -> bool:
        """Is there something in it that a later question can build on?"""
        return bool(self.content or self.calls)

    def messages(self, reasoning: bool = False) -> list[dict[str, Any]]:
        """The assistant's message, with its calls and a result for each as the protocol wants it."""
        one: dict[str, Any] = {"role": "assistant", "content": self.content}
        if reasoning and self.reasoning:
            one["reasoning_content"] = self.reasoning
        if not self.calls:
            return [one]
        one["tool_calls"] = [
            {"id": c.id, "type": "function", "function": {"name": c.name, "arguments": c.arguments}} for c in self.calls
        ]
        return [one, *({"role": "tool", "tool_call_id": c.id, "content": NOT_RUN} for c in self.calls)]


@dataclass(eq=False)
class Turn:
    """A question, and the answers of all columns to it."""

    text: str
    pictures: list[Picture] = field(default_factory=list)
    answers: list[Answer] = field(default_factory=list)

    @property
    def done(self) -> bool:
        return all(answer.done for answer in self.answers)

    def stop(self) -> None:
        for answer in self.answers:
            answer.stop()

    def question(self, sees: bool) -> dict[str, Any]:
        """The user's message; pictures are left out for a model that does not see."""
        if not (self.pictures and sees):
            return {"role": "user", "content": self.text}
        parts: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": p.url}} for p in self.pictures]
        text = [{"type": "text", "text": self.text}] if self.text else []
        return {"role": "user", "content": parts + text}

    def answer(self, column: int) -> Answer | None:
        """A column's answer; a column that was not there then has heard the first one's."""
        if not self.answers:
            return None
        return self.answers[column] if column < len(self.answers) else self.answers[0]


@dataclass(eq=False)
class Chat:
    turns: list[Turn] = field(default_factory=list)

    @property
    def running(self) -> bool:
        return bool(self.turns) and not self.turns[-1].done

    def stop(self) -> None:
        for turn in self.turns:
            turn.stop()

    def messages(self, column: int, system: str, sees: bool) -> list[dict[str, Any]]:
        """What a column's model is sent: the system text, its past, the last question. Failed turns are left out."""
        asked = self.turns[-1]
        return [*self._past(column, system, sees, self.turns[:-1], reasoning=False), asked.question(sees)]

    def _past(self, column: int, system: str, sees: bool, turns: list[Turn], reasoning: bool) -> list[dict[str, Any]]:
        said: list[dict[str, Any]] = [{"role": "system", "content": system}] if system.strip() else []
        for turn in turns:
            answer = turn.answer(column)
            if answer is not None and answer.useful:
                said += [turn.question(sees), *answer.messages(reasoning)]
        return said

    def to_json(self, settings: Settings) -> str:
        """A list of rows of chat data, a row a column, that training can read."""
        columns = max((len(turn.answers) for turn in self.turns), default=0)
        kept = {k: v for k, v in asdict(settings).items() if v is not None and k not in ("system", "tools")}
        rows = []
        for column in range(columns):
            last = self.turns[-1].answer(column)
            row: dict[str, Any] = {"model": last.model if last else "", "settings": kept}
            row["messages"] = self._past(column, settings.system, True, self.turns, reasoning=True)
            rows.append(row | ({"tools": list(settings.tools)} if settings.tools else {}))
        return json.dumps(rows, ensure_ascii=False, indent=1) + "\n"
