"""The assistant's turns under a template without {% generation %} marks, found by rendering parts of the chat."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from groundup.errors import UserError

Span = tuple[int, int]
Run = Callable[[list[dict[str, Any]], bool], str]


def spans_by_prefix(
    text: str, messages: list[dict[str, Any]], run: Run, control: re.Pattern[str], ends: set[str], where: str
) -> list[Span]:
    """Spans [start, end) of `text`, the whole chat, that the assistant says.

    A turn starts where the chat before it, rendered with a generation prompt, agrees with the whole; it ends with the
    first of `ends` (end-of-turn tokens, which only the template can write). run(messages, prompt) renders.
    Raises UserError where the chat before a turn is no prefix of the whole, or a turn has no end.
    """
    spans: list[Span] = []
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        head, prompt = run(messages[:i], False) if i else "", run(messages[:i], True)
        start, opener = _agreement(text, head, prompt, control)
        if start is None:
            why = f"renders the chat before message {i + 1} differently once that message is there"
            raise UserError(f"chat template of {where}", f"{why}, so its turns cannot be told apart", _FIX)
        tokens = ((match[0].strip(), match.end()) for match in control.finditer(text, start))
        spelling, end = next(((token, at) for token, at in tokens if token in ends or token == opener), ("", 0))
        if spelling not in ends:
            why = f"writes no end-of-turn token after message {i + 1}"
            raise UserError(f"chat template of {where}", f"{why}, so a model would never learn to stop", _FIX)
        spans.append((start, end))
    return spans


_FIX = (
    "put {% generation %} and {% endgeneration %} around what the assistant says, in chat_template.jinja, "
    "or make each user turn a chat of its own"
)


def _agreement(text: str, head: str, prompt: str, control: re.Pattern[str]) -> tuple[int | None, str]:
    """Where the assistant starts to speak, and the control token that opens its turn ("" if none does).

    The prompt may end in more than every turn has (an open <think>), so the start is the last place up to which prompt
    and text agree that is the prompt's end or an edge of one of its later control tokens.
    """
    shorter = min(len(text), len(prompt))
    agreed = next((i for i in range(shorter) if text[i] != prompt[i]), shorter)
    opening = list(control.finditer(prompt, len(head)))
    opener = opening[0][0].strip() if opening else ""
    edges = {len(prompt), *(edge for match in opening[1:] for edge in match.span())}
    start = max((edge for edge in edges if edge <= agreed), default=None)
    return (start if text.startswith(head) else None), opener
