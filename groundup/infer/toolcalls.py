"""Which part of an answer calls a tool? Splits streamed text at the marks, and makes the grammar that forces a call.

The form is that of our chat template, Qwen and Hermes, one block a call:

    <tool_call>
    {"name": "get_weather", "arguments": {"city": "北京"}}
    </tool_call>
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from groundup.errors import UserError
from groundup.infer.params import Grammar
from groundup.infer.text import partial_suffix

OPEN, CLOSE = "<tool_call>", "</tool_call>"
# Forced arguments stand on one line, as the template writes them (llguidance's options for a JSON schema).
ONE_LINE = {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?"}


@dataclass(frozen=True)
class TextPiece:
    """What the answer says beside its calls."""

    text: str


@dataclass(frozen=True)
class CallStart:
    """Call number `index` (from 0) begins."""

    index: int
    name: str


@dataclass(frozen=True)
class CallArguments:
    """The next piece of the arguments, in the words of the model; together they are a JSON object."""

    index: int
    text: str


@dataclass(frozen=True)
class CallEnd:
    """The call is over. malformed: "", or the text of the whole block where its arguments turned out to be no JSON."""

    index: int
    malformed: str = ""


Event = TextPiece | CallStart | CallArguments | CallEnd


@dataclass(frozen=True)
class ToolCall:
    """A whole call; arguments is the text of a JSON object, as OpenAI sends it."""

    name: str
    arguments: str


class ToolCallSplitter:
    """Feed pieces of text, get events; marks, names and arguments may be cut anywhere.

    A call starts as soon as its name and the brace of its arguments are there, and its arguments come out as they come
    in. A block that is no call comes out as text, mark and all. Only when the arguments break later on has the call
    been announced already: what the model wrote goes on as arguments, and CallEnd holds the block. The line breaks
    around blocks, which the template adds, are taken off.
    """

    def __init__(self) -> None:
        self._state: Callable[[list[Event], bool], bool] = self._text
        self._held = ""  # came in and is not decided yet
        self._block = ""  # what the present block has used up so far
        self._index = -1
        self._trim = False  # drop line breaks until the first other character
        self._object = _ObjectEnd()
        self._arguments = ""

    def feed(self, piece: str) -> list[Event]:
        self._held += piece
        return self._run(final=False)

    def flush(self) -> list[Event]:
        """What is still held when the answer ends; a call cut short ends here."""
        return self._run(final=True)

    def _run(self, final: bool) -> list[Event]:
        out: list[Event] = []
        while self._state(out, final):  # each state says whether the next one can go on with what is left
            pass
        return out

    def _text(self, out: list[Event], final: bool) -> bool:
        """Outside of all blocks."""
        at = self._held.find(OPEN)
        if at >= 0:
            said = self._held[:at].rstrip("\n")
            self._say(out, said)
            self._held, self._block = self._held[len(said) :], ""
            self._take(self._held.index(OPEN) + len(OPEN))
            self._state = self._head
            return True
        if final:
            said = self._held
        else:
            said = self._held[: len(self._held) - partial_suffix(self._held, OPEN)].rstrip("\n")
        self._held = self._held[len(said) :]
        self._say(out, said)
        return False

    def _head(self, out: list[Event], final: bool) -> bool:
        """From the mark to the brace of the arguments; unusual blocks are awaited whole."""
        head = _HEAD.match(self._held)
        if head:
            self._take(head.end())
            self._start(out, json.loads(head[1]))
            self._state = self._inside
            return True
        at = self._held.find(CLOSE)
        hopeless = not "{".startswith(self._held.lstrip()[:1])
        if at < 0 and not hopeless and not final:
            return False
        body = "" if hopeless else self._take(len(self._held) if at < 0 else at)
        call = _whole_call(body)
        if at >= 0 and not hopeless:
            self._take(len(CLOSE))
        if call is None:
            self._say(out, self._block)
        else:
            self._start(out, call.name)
            self._pass(out, call.arguments)
            self._end(out)
        self._state = self._text
        return True

    def _inside(self, out: list[Event], final: bool) -> bool:
        """In the arguments."""
        self._pass(out, self._take(self._object.scan(self._held)))
        if self._object.closed:
            self._state = self._tail
        elif self._object.broken:
            self._state = self._broken
        elif final:
            self._end(out)
        else:
            return False
        return True

    def _broken(self, out: list[Event], final: bool) -> bool:
        """In arguments that are no JSON: they go on to the closing mark."""
        at = self._held.find(CLOSE)
        keep = 0 if final else partial_suffix(self._held, CLOSE)
        self._pass(out, self._take(at if at >= 0 else len(self._held) - keep))
        if at < 0 and not final:
            return False
        self._take(len(CLOSE))
        self._end(out)
        return True

    def _tail(self, out: list[Event], final: bool) -> bool:
        """From the end of the arguments to that of the block, which some models forget to mark."""
        at = self._held.find(CLOSE)
        rest = self._held.lstrip("} \n")
        more_keys = rest.startswith(",")  # of no use to us
        unfinished = more_keys or CLOSE.startswith(rest)
        if at >= 0 and (more_keys or rest.startswith(CLOSE)):
            self._take(at + len(CLOSE))
        elif unfinished and not final:
            return False
        else:
            self._take(len(self._held) - (0 if unfinished else len(rest)))
        self._end(out)
        return True

    def _take(self, count: int) -> str:
        taken, self._held = self._held[:count], self._held[count:]
        self._block += taken
        return taken

    def _say(self, out: list[Event], text: str) -> None:
        if self._trim:
            text = text.lstrip("\n")
        if text:
            self._trim = False
            out.append(TextPiece(text))

    def _start(self, out: list[Event], name: str) -> None:
        self._index += 1
        self._arguments, self._object = "", _ObjectEnd()
        out.append(CallStart(self._index, name))

    def _pass(self, out: list[Event], text: str) -> None:
        if text:
            self._arguments += text
            out.append(CallArguments(self._index, text))

    def _end(self, out: list[Event]) -> None:
        out.append(CallEnd(self._index, "" if _is_object(self._arguments) else self._block))
        self._trim, self._state = True, self._text


def parse_tool_calls(text: str) -> tuple[str, list[ToolCall]]:
    """(content, calls) of a whole answer. A block that is no call, or one with malformed arguments, stays content."""
    splitter = ToolCallSplitter()
    content, name, arguments = "", "", ""
    calls: list[ToolCall] = []
    for event in splitter.feed(text) + splitter.flush():
        if isinstance(event, TextPiece):
            content += event.text
        elif isinstance(event, CallStart):
            name, arguments = event.name, ""
        elif isinstance(event, CallArguments):
            arguments += event.text
        elif event.malformed:
            content += event.malformed
        else:
            calls.append(ToolCall(name, arguments))
    return content, calls


def tool_grammar(
    tools: Sequence[dict[str, Any]], choice: str | dict[str, Any] | None, parallel: bool = True, thinking: bool = False
) -> Grammar | None:
    """The grammar for OpenAI's `tool_choice`; None where the model is free ("auto", "none", None).

    tools: [{"type": "function", "function": {"name", "parameters"}}]. choice: "required" forces one call or more (one
    only, unless parallel) of any tool; {"type": "function", "function": {"name"}} exactly one of that tool. Arguments
    keep to the tool's JSON schema. thinking: the prompt has opened a thought, which may be thought to its end first.
    Raises UserError for a choice that is unknown or names no tool, and for a tool whose parameters are no object.
    """
    if choice in (None, "auto", "none"):
        return None
    functions = [_function(tool, f"tools[{i}]") for i, tool in enumerate(tools)]
    if isinstance(choice, dict):
        named = choice.get("function", choice)
        functions = [f for f in functions if isinstance(named, dict) and f[0] == named.get("name")]
        parallel = False
    elif choice != "required":
        raise UserError("tool_choice", f"{choice!r} is unknown", "one of none, auto, required, or a function")
    if not functions:
        raise UserError("tool_choice", "asks for a tool that is not among the tools", "add it to tools")
    lines = [
        'start: call ("\\n" call)*' if parallel else "start: call",
        f'call: begin "\\n" ({" | ".join(f"call_{i}" for i in range(len(functions)))}) "\\n" end',
        f"begin: {OPEN}",  # grammar.py spells the marks out for a tokenizer that has no token for them
        f"end: {CLOSE}",
    ]
    for i, (name, schema) in enumerate(functions):
        head = f'{{"name": {json.dumps(name, ensure_ascii=False)}, "arguments": '  # as the chat template writes it
        lines += [f'call_{i}: {json.dumps(head)} arguments_{i} "}}"', f"arguments_{i}: %json {json.dumps(schema)}"]
    return Grammar("lark", "\n".join(lines), thinking, "tools")


_STRING = r'"(?:[^"\\\x00-\x1f]|\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4}))+"'
_HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*(' + _STRING + r')\s*,\s*"arguments"\s*:\s*(?=\{)')
_BRACKETS = {"{": 1, "[": 1, "}": -1, "]": -1}


class _ObjectEnd:
    """Finds the end of a JSON object that arrives in pieces, by counting brackets outside of strings."""

    def __init__(self) -> None:
        self.closed = self.broken = False
        self._depth, self._in_string, self._escaped = 0, False, False

    def scan(self, text: str) -> int:
        """How many characters of text, which follows all scanned before, belong to the object."""
        for place, char in enumerate(text):
            if self._in_string:
                if char == "\n":  # never raw in a string: its quote was forgotten
                    self.broken = True
                    return place
                self._in_string = self._escaped or char != '"'
                self._escaped = char == "\\" and not self._escaped
            elif char == "<":  # no JSON, and perhaps the closing mark
                self.broken = True
                return place
            elif char == '"':
                self._in_string = True
            else:
                self._depth += _BRACKETS.get(char, 0)
                if self._depth == 0:
                    self.closed = True
                    return place + 1
        return len(text)


def _whole_call(block: str) -> ToolCall | None:
    """A block that is there as a whole: keys in any order, arguments absent, or an object written as a string."""
    try:
        call = json.loads(block)
    except (ValueError, RecursionError):
        return None
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        return None
    arguments = call.get("arguments", {})
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return ToolCall(call["name"], text) if _is_object(text) else None


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


def _function(tool: dict[str, Any], where: str) -> tuple[str, dict[str, Any]]:
    """Name and schema of the arguments; a tool without parameters takes none."""
    function = tool.get("function", tool)
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str) or not name:
        raise UserError(where, "has no name", 'give {"type": "function", "function": {"name": ..., "parameters": ...}}')
    schema = function.get("parameters")
    if schema is None:
        schema = {"properties": {}, "additionalProperties": False}
    if not isinstance(schema, dict) or schema.get("type", "object") != "object":
        raise UserError(f"{where}.function.parameters", "are not the JSON schema of an object", 'use "type": "object"')
    return name, {"x-guidance": ONE_LINE, **schema, "type": "object"}
