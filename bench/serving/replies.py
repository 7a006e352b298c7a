"""What came back, in a form in which two answers can be compared, however they travelled."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

# index -> (text, thinking, why it ended); and the tokens that the server counted
Answer = tuple[dict[int, tuple[str, str, str]], int]


class BadReply(Exception):
    """An answer that does not keep to OpenAI's shape; the text says where."""


def whole(body: str) -> Answer:
    """An answer in one piece."""
    reply = json.loads(body)
    found = {}
    for choice in reply["choices"]:
        message = choice.get("message") or {"content": choice.get("text")}
        thinking = message.get("reasoning_content") or ""
        found[choice["index"]] = (message["content"] or "", thinking, choice["finish_reason"])
    return found, reply["usage"]["completion_tokens"]


def streamed(events: Iterable[str]) -> Answer:
    """An answer in events. BadReply: two ends of a choice, none, text after the end, no usage, no [DONE]."""
    pieces: dict[int, list[str]] = {}
    thoughts: dict[int, list[str]] = {}
    ends: dict[int, str] = {}
    tokens, done = None, False
    for event in events:
        if done:
            raise BadReply("something came after [DONE]")
        if event == "[DONE]":
            done = True
            continue
        chunk = json.loads(event)
        if "error" in chunk:
            raise BadReply(f"an error inside the stream: {chunk['error']}")
        if chunk.get("usage"):
            tokens = chunk["usage"]["completion_tokens"]
        for choice in chunk["choices"]:
            index, delta = choice["index"], choice.get("delta") or {"content": choice.get("text")}
            if index in ends:
                raise BadReply(f"choice {index} went on after its end")
            pieces.setdefault(index, []).append(delta.get("content") or "")
            thoughts.setdefault(index, []).append(delta.get("reasoning_content") or "")
            if choice.get("finish_reason"):
                ends[index] = choice["finish_reason"]
    if not done or tokens is None or ends.keys() != pieces.keys():
        raise BadReply(f"[DONE] {done}, usage {tokens}, ends {sorted(ends)} of choices {sorted(pieces)}")
    return {i: ("".join(pieces[i]), "".join(thoughts[i]), ends[i]) for i in pieces}, tokens


def fault_of_error(status: int, body: str) -> str | None:
    """What is wrong with the answer to a wrong body; None: a 4xx in OpenAI's shape."""
    if not 400 <= status < 500:
        return f"status {status}"
    try:
        error: Any = json.loads(body)["error"]
        fine = isinstance(error["message"], str) and error["message"] and isinstance(error["type"], str)
        fine = fine and "param" in error and "code" in error
    except (ValueError, KeyError, TypeError):
        return f"not in OpenAI's shape: {body[:200]}"
    if not fine:
        return f"not in OpenAI's shape: {body[:200]}"
    return "tells a traceback" if "Traceback" in error["message"] else None
