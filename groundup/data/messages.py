"""How the messages of every format become ours: roles, tool calls, tool lists, reasoning, hh-rlhf strings."""

from __future__ import annotations

import json
import re
from typing import Any

from groundup.data.rows import Message, Tools, message


class RowError(ValueError):
    """A row breaks its format. `why` and `fix` as in UserError; the reader adds the file and the line."""

    def __init__(self, why: str, fix: str = "") -> None:
        self.why, self.fix = why, fix
        super().__init__(why)


ROLES = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user",
    "assistant": "assistant", "gpt": "assistant", "bot": "assistant", "model": "assistant",
    "function_call": "assistant",
    "tool": "tool", "observation": "tool", "function": "tool", "function_response": "tool",
}  # fmt: skip

# Reasoning models' own rows hold the thought inside the answer; left there it would be encoded as plain text.
_THOUGHT = re.compile(r"\s*<think>\n?(.*?)\n?</think>\n*(.*)", re.DOTALL)
_HH_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")


def conversation(value: Any, what: str = "conversations") -> tuple[list[Message], Tools]:
    """A list of messages in any spelling (or the JSON of one) as (our messages, the tools named inside them).

    A system message without content is left out; its tools are kept.
    """
    items = decoded(value, what)
    if isinstance(items, dict):
        items = [items]
    if not isinstance(items, list) or not items:
        raise RowError(f"`{what}` is {_kind(value)}", "it must be a list of at least one message")
    messages: list[Message] = []
    tools: list[dict[str, Any]] = []
    for number, item in enumerate(items, 1):
        if not isinstance(item, dict):
            raise RowError(f"message {number} of `{what}` is {_kind(item)}", "it must be an object with role + content")
        one = _message(item, f"message {number} of `{what}`")
        if item.get("tools"):
            tools.extend(tool_list(item["tools"]) or [])
        if one["role"] != "system" or one["content"]:
            messages.append(one)
    return messages, tools or None


def _message(item: dict[str, Any], what: str) -> Message:
    tag = item.get("role", item.get("from"))
    role = ROLES.get(tag) if isinstance(tag, str) else None
    if role is None:
        if tag is None:
            raise RowError(f"{what} has the keys {', '.join(item)}", "it needs role + content, or from + value")
        raise RowError(f"{what} has the unknown role {tag!r}", f"known: {', '.join(ROLES)}")
    content = _content(item.get("content", item.get("value")), what)
    if tag == "function_call":
        calls = _spoken_calls(content)
        return {"role": role, "content": "", "tool_calls": calls} if calls else message(role, content)
    one = message(role, content)
    if role != "assistant":
        return one
    reasoning = item.get("reasoning_content")
    if reasoning:
        one["reasoning_content"] = _string(reasoning, f"reasoning_content in {what}")
    elif "</think>" in content and (found := _THOUGHT.fullmatch(content)):
        one["content"] = found[2]
        if found[1].strip():
            one["reasoning_content"] = found[1]
    if item.get("tool_calls"):
        calls = tool_calls(item["tool_calls"])
        if calls:
            one["tool_calls"] = calls
    return one


def _content(value: Any, what: str) -> str:
    """OpenAI's list of parts becomes one string, in which `<image>` stands for each picture of the `images` column."""
    if value is None:
        return ""
    if not isinstance(value, list):
        return _string(value, f"the content of {what}")
    text = []
    for part in value:
        if isinstance(part, dict) and part.get("type") == "image" and not part.get("image"):
            text.append("<image>")
        elif isinstance(part, dict) and "text" not in part:
            raise RowError(f"{what} holds a part of type {part.get('type')!r}", "list pictures in an `images` column")
        else:
            text.append(_string(part["text"] if isinstance(part, dict) else part, f"a part of {what}"))
    return "".join(text)


def tool_calls(value: Any) -> list[dict[str, Any]]:
    """Calls as [{"name", "arguments": dict}], from a list or its JSON, items flat or nested under "function"."""
    items = decoded(value, "tool_calls")
    if isinstance(items, dict):
        items = [items]
    if items is None:
        return []
    if not isinstance(items, list):
        raise RowError(f"`tool_calls` is {_kind(items)}", 'it must be a list of {"name", "arguments"}')
    calls = []
    for item in items:
        inner = item.get("function", item) if isinstance(item, dict) else None
        if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
            raise RowError(f"a tool call without a name: {_short(item)}", 'write {"name": .., "arguments": {..}}')
        arguments = inner.get("arguments")
        arguments = decoded(arguments, "arguments") if arguments else {}
        if not isinstance(arguments, dict):
            raise RowError(f"the arguments of {inner['name']} are {_kind(arguments)}", "they must be a JSON object")
        calls.append({"name": inner["name"], "arguments": arguments})
    return calls


def _spoken_calls(content: str) -> list[dict[str, Any]]:
    """The calls in a sharegpt function_call turn; none when it is plain words (no quote, no JSON), which stay words."""
    try:
        return tool_calls(content)
    except RowError:
        if '"' in content:
            raise
        return []


def tool_list(value: Any) -> Tools:
    """Tools as a list of schemas, from a list or its JSON; None when there are none. Schemas are left as written.

    A string without a single letter or digit ("[..]", as documentation elides it) names no tool.
    """
    if isinstance(value, str) and not any(map(str.isalnum, value)):
        return None
    items = decoded(value, "tools")
    if isinstance(items, dict):
        items = [items]
    if not items:
        return None
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise RowError(f"`tools` is {_kind(items)}", "it must be a list of tool schemas")
    return items


def turns(value: Any, what: str, role: str) -> list[Message]:
    """A prompt, completion, chosen or rejected, written as a string or as messages.

    A string is hh-rlhf's turns where it begins with "Human:" or "Assistant:", else one message of `role`.
    """
    if isinstance(value, str):
        if is_hh(value):
            return hh_turns(value)
        return [message(role, value)] if value else []
    return conversation(value, what)[0] if value else []


def is_hh(text: str) -> bool:
    """Is the string written as hh-rlhf's turns?"""
    return text.lstrip().startswith(("Human:", "Assistant:"))


def hh_turns(text: str) -> list[Message]:
    """Anthropic's "\\n\\nHuman: ..\\n\\nAssistant: .." as messages; a last "Assistant:" without words is no turn."""
    pieces = _HH_TURN.split("\n\n" + text.lstrip())
    found = [message(ROLES[who.lower()], said.strip()) for who, said in zip(pieces[1::2], pieces[2::2], strict=True)]
    if found and found[-1]["role"] == "assistant" and not found[-1]["content"]:
        found.pop()
    return found


def decoded(value: Any, what: str) -> Any:
    """The value of a JSON string; anything else as it is; None for an empty string."""
    if not isinstance(value, str):
        return value
    if not value.strip():
        return None
    try:
        return json.loads(value)
    except (json.JSONDecodeError, RecursionError):
        raise RowError(f"`{what}` is not JSON: {_short(value)}", "write a list, or the JSON of one") from None


def _string(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise RowError(f"{what} is {_kind(value)}", "it must be a string")
    return value


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", int: "a number",
             float: "a number", type(None): "missing"}  # fmt: skip
    if value in ([], {}, ""):
        return "empty"
    return names.get(type(value), type(value).__name__)


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
