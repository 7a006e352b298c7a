"""What the world hands out. A message is a dict: role, content, and where needed reasoning_content and tool_calls."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

Message = dict[str, Any]


@dataclass(frozen=True)
class Question:
    """A prompt whose answer is graded exactly.

    language: of the question (`en` or `zh`). kind: what reports group by. messages: ends with the user's turn.
    follow_ups: further (question, answer) pairs about what this question tells; chats ask them in later turns.
    """

    id: str
    language: str
    kind: str
    messages: list[Message]
    answer: str
    follow_ups: list[tuple[str, str]] = field(default_factory=list)


@dataclass(frozen=True)
class Chat:
    """A finished conversation to learn from; tools as OpenAI writes them, or None."""

    messages: list[Message]
    tools: list[dict[str, Any]] | None = None


@dataclass(frozen=True)
class Preference:
    """Two replies to one prompt; the chosen one is better by construction (right, brief, in the asked language)."""

    prompt: list[Message]
    chosen: list[Message]
    rejected: list[Message]


@dataclass(frozen=True)
class ReasoningPrompt:
    """A prompt with a verifiable answer, and one correct way to think it through."""

    id: str
    language: str
    kind: str
    messages: list[Message]
    reasoning: str
    answer: str


@dataclass(frozen=True)
class ToolEpisode:
    """A conversation that needs a tool: messages with tool_calls and tool results, ending with the final answer."""

    messages: list[Message]
    tools: list[dict[str, Any]]
    answer: str


def user(content: str) -> Message:
    return {"role": "user", "content": content}


def assistant(content: str, **more: Any) -> Message:
    return {"role": "assistant", "content": content, **more}
