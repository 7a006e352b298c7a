"""How does a policy speak with its tools? Its calls are answered, and the tokens of the answers added to its own.

What the policy said stays as it was sampled, token for token: it is never written anew from its text, which could come
out as other tokens (a line break at the start, an unusual split), of which no probability is known.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from groundup.data.rows import Message, Prompt, Tools
from groundup.errors import UserError
from groundup.infer.thinking import CLOSE, OPEN, split_thinking
from groundup.infer.toolcalls import OPEN as CALL
from groundup.infer.toolcalls import parse_tool_calls
from groundup.rewards.tools import Tool
from groundup.tokenizer.chat import turn_end

if TYPE_CHECKING:
    from groundup.tokenizer import Tokenizer

MOST_CALLS = 8  # of one turn
SAID = "\U000f5a1d"  # a character that nobody writes, for what the policy said
_PARTS = ("reasoning_content", "tool_calls")  # of a message, which a template may not know


class ToolUse:
    """An environment of tools: turn by turn, until the policy calls none. calls, failed: how often so far."""

    def __init__(self, tools: Sequence[Tool]) -> None:
        self.tools = {tool.name: tool for tool in tools}
        self.calls = self.failed = 0

    @property
    def schemas(self) -> list[dict[str, Any]]:
        return [tool.schema for tool in self.tools.values()]

    def offer(self, prompt: Prompt) -> Prompt:
        """The prompt with the tools in it, unless it names its own."""
        return prompt if prompt.tools else replace(prompt, tools=self.schemas)

    def reply(self, prompt: Prompt, messages: list[Message], text: str) -> tuple[Message, list[Message]] | None:
        """(the policy's turn as a message, what its calls gave), or None where it called nothing: the episode ends.

        messages: those of the prompt and of the turns before. A block that is no call is told so, and may be mended.
        """
        spoken = as_message(text)
        calls = spoken.get("tool_calls", [])
        if not calls and CALL not in spoken["content"]:
            return None
        heard = [{"role": "tool", "name": call["name"], "content": self._call(call)} for call in calls[:MOST_CALLS]]
        if len(calls) > MOST_CALLS:
            heard[-1]["content"] += f"\n(of {len(calls)} calls the first {MOST_CALLS} were made)"
        if not calls:
            self.calls, self.failed = self.calls + 1, self.failed + 1
            what = 'error: this is no call; write {"name": NAME, "arguments": OBJECT}'
            heard = [{"role": "tool", "content": what}]
        return spoken, heard

    def close(self) -> None:
        for tool in self.tools.values():
            tool.close()

    def _call(self, call: dict[str, Any]) -> str:
        tool = self.tools.get(call["name"])
        if tool is None:
            said = f"error: there is no tool {call['name']}, only {', '.join(self.tools) or 'none'}"
        else:
            said = tool.call(call["arguments"])
        self.calls, self.failed = self.calls + 1, self.failed + said.startswith("error: ")
        return said


def as_message(text: str, tokenizer: Tokenizer | None = None) -> Message:
    """What a policy said as a message: thought, words and calls apart. A thought may have been opened by the prompt.

    tokenizer: where its template knows no thoughts or no calls, they stay among the words.
    """
    knows = [name for name in _PARTS if tokenizer is None or name in tokenizer.chat_template]
    message: Message = {"role": "assistant", "content": text}
    if "reasoning_content" in knows:
        begun = CLOSE in text and OPEN not in text.partition(CLOSE)[0]
        thought, message["content"] = split_thinking(text, begun)
        if thought.strip():
            message["reasoning_content"] = thought
    if "tool_calls" in knows:
        message["content"], calls = parse_tool_calls(message["content"])
        if calls:
            message["tool_calls"] = [{"name": call.name, "arguments": json.loads(call.arguments)} for call in calls]
    return message


def next_prompt_ids(
    tokenizer: Tokenizer, ids_so_far: Sequence[int], heard: Sequence[Message], tools: Tools = None,
    enable_thinking: bool | None = None,
) -> list[int]:  # fmt: skip
    """What the policy reads next: all that it read and said so far, as it is, then what it heard, then its turn.

    ids_so_far: they end with what the policy said; where it did not end its turn itself, that is done for it. All that
    is added is context, to be masked 0.
    """
    ends = turn_end(tokenizer)
    closed = not ends or (bool(ids_so_far) and ids_so_far[-1] in ends)
    return [*ids_so_far, *([] if closed else [min(ends)]), *observation_ids(tokenizer, heard, tools, enable_thinking)]


def observation_ids(
    tokenizer: Tokenizer, heard: Sequence[Message], tools: Tools = None, enable_thinking: bool | None = None
) -> list[int]:
    """What the chat template writes from the end of the policy's turn to the start of its next one.

    It does not depend on what was said before, so it is read from a chat of a mark's length. UserError: the template
    cannot write such a chat.
    """
    refused: UserError | None = None
    for with_calls in (True, False):  # some templates want a call before a tool's answer, others know no calls
        try:
            after = _ends_after(tokenizer, _around(heard, with_calls, hidden=True), tools, enable_thinking)
            ids = tokenizer.render(_around(heard, with_calls), tools, True, enable_thinking=enable_thinking).ids
        except UserError as error:
            refused = refused or error
            continue
        ends = [at for at, number in enumerate(ids) if number in _ends(tokenizer)]
        if after:
            return ids[ends[-after] + 1 :]
    why = "does not show where the policy's turn ends before a tool answers"
    raise refused or UserError(f"chat template of {tokenizer.where}", why, "use a template that knows tools")


def _around(heard: Sequence[Message], with_calls: bool, hidden: bool = False) -> list[Message]:
    """A chat with a turn of the policy, then what was heard. hidden: without the words of those who were heard."""
    numbers = [f"call{number:05}" for number in range(len(heard))]  # nine characters, as Mistral wants them
    calls = [{"id": number, "name": SAID, "arguments": {}} for number in numbers]
    spoken = {"role": "assistant", "content": SAID, **({"tool_calls": calls} if with_calls else {})}
    words = [{**one, "content": "x"} if hidden else one for one in heard]
    named = [
        {"tool_call_id": n, **one} if one["role"] == "tool" else one for n, one in zip(numbers, words, strict=True)
    ]
    return [{"role": "user", "content": "?"}, spoken, *named]


def _ends_after(tokenizer: Tokenizer, chat: list[Message], tools: Tools, enable_thinking: bool | None) -> int:
    """How many ends of turns the template writes from the policy's turn on, its own included."""
    text = tokenizer.render(chat, tools, True, enable_thinking=enable_thinking).text
    control, ends = tokenizer.plain.control, _ends(tokenizer)
    found = tokenizer.plain.shield.found.finditer(text, max(text.rfind(SAID), 0))
    return sum(control[match[0].strip()] in ends for match in found) if SAID in text else 0


def _ends(tokenizer: Tokenizer) -> set[int]:
    """Ids of control tokens that end a turn."""
    return set(tokenizer.stop_ids) & set(tokenizer.plain.control.values())
