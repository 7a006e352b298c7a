"""A chat becomes ids, and a mask of what the assistant says, in one pass over the rendered template.

Who wrote each character decides. The template's own control tokens become their ids; the same spelling inside a
message, a tool or a tool's result is broken by a mark before rendering, so it can only come out as ordinary text. The
text is cut for encoding at the template's control tokens and where the assistant starts to speak, and nowhere else:
there generation starts too, so training and chatting see the same ids, and on ordinary text they are the ids of
transformers' apply_chat_template.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from groundup.errors import UserError
from groundup.tokenizer.check import check_chat
from groundup.tokenizer.prefix import Message, Span, Turn, find_turns
from groundup.tokenizer.template import View, has_generation_marks, render_text
from groundup.tokenizer.tokenizer import Rendered

if TYPE_CHECKING:
    from groundup.tokenizer.tokenizer import Tokenizer

ROLES = ("system", "user", "assistant", "tool")
PRIVATE_USE = range(0xF0000, 0xFFFFE)


def render(
    tokenizer: Tokenizer,
    messages: list[dict[str, Any]],
    tools: list[dict[str, Any]] | None = None,
    add_generation_prompt: bool = False,
    enable_thinking: bool | None = None,
) -> Rendered:
    """Render a chat with the tokenizer's template, as ids and a 0/1 mask of equal length.

    messages: dicts of role (system, user, assistant, tool), content, and optionally reasoning_content and tool_calls
        (a list of {"name", "arguments"}, flat or under "function"). tools: JSON schemas.
    add_generation_prompt: end where the assistant is to speak. enable_thinking: None lets the model decide, True and
        False start its turn with open or closed reasoning, where the template knows them.
    Raises UserError for a malformed message, a template that refuses the chat, and, where no prompt is asked for, one
    that would teach something else than the chat holds (check.py).
    """
    view, chat, marks = look_at(tokenizer, messages, tools, enable_thinking)
    text, spans = _take_spans(view.run(chat, add_generation_prompt, marks.begin, marks.end), marks)
    marked = has_generation_marks(view.source)
    turns: list[Turn] = []
    if not marked or not (add_generation_prompt or tokenizer.keeps_past):
        turns = find_turns(text, chat, view)
        sound = [turn.span for turn in turns if not turn.fault]
        spans = [(a, b) for a, b in spans if any(a < end and start < b for start, end in sound)] if marked else sound
    if not add_generation_prompt:
        check_chat(text, chat, tools, view, turns, spans if marked else None)
    faults = tuple(turn.fault for turn in turns if turn.fault)
    return _encode(tokenizer, marks.shield, text, spans, faults)


def look_at(
    tokenizer: Tokenizer, messages: list[Message], tools: Any = None, enable_thinking: bool | None = None
) -> tuple[View, list[Message], _Marks]:
    """The chat through the tokenizer's template: what renders it, its messages without any control token, its marks."""
    if not tokenizer.chat_template:
        raise UserError(tokenizer.where, "has no chat template", "put a chat_template.jinja into the folder")
    if not all(isinstance(tool, dict) for tool in tools or []):
        raise UserError("tools", "are not a list of JSON objects", 'give [{"type": "function", "function": {...}}]')
    marks = _Marks.absent_from(json.dumps([messages, tools], ensure_ascii=False) + tokenizer.chat_template)
    protect = tokenizer.plain.shield.protect
    chat = [protect(_checked(message, i), marks.shield) for i, message in enumerate(messages)]
    variables = {**tokenizer.special, "tools": protect(tools, marks.shield) or None, "documents": None}
    variables["enable_thinking"] = enable_thinking
    ends = frozenset(token for token, number in tokenizer.plain.control.items() if number in tokenizer.stop_ids)
    found = tokenizer.plain.shield.found
    return View(tokenizer.chat_template, variables, found, ends, marks.shield, tokenizer.where), chat, marks


def turn_end(tokenizer: Tokenizer) -> set[int]:
    """The id that the chat template writes after what the assistant says; empty where it cannot be told."""
    if not tokenizer.chat_template:
        return set()
    said = "\U000f0000"
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": said}]
    try:
        text = render_text(tokenizer.chat_template, {**tokenizer.special, "messages": messages})
    except Exception:  # a template may refuse this chat for reasons of its own: then it says nothing about its end
        return set()
    after = tokenizer.plain.shield.found.search(text, text.rfind(said))
    return {tokenizer.plain.control[after[0].strip()]} if after and said in text else set()


def _checked(message: dict[str, Any], index: int) -> dict[str, Any]:
    """The message in the shape that stock templates expect: no nulls, no empty reasoning (some write an empty block for
    it), calls under "function", arguments as objects."""
    where = f"message {index + 1}"
    if not isinstance(message, dict) or message.get("role") not in ROLES:
        role = message.get("role") if isinstance(message, dict) else message
        raise UserError(where, f"has role {role!r}", f"use one of {', '.join(ROLES)}")
    message = {key: value for key, value in message.items() if value is not None}
    message.setdefault("content", "")
    for key in ("content", "reasoning_content"):
        if not isinstance(message.get(key, ""), str):
            raise UserError(where, f"its {key} is {type(message[key]).__name__}", "give text")
    for key in ("reasoning_content", "tool_calls"):
        if not message.get(key):
            message.pop(key, None)
    if "tool_calls" in message:
        message["tool_calls"] = [_checked_call(call, where) for call in message["tool_calls"]]
    return message


def _checked_call(call: Any, where: str) -> dict[str, Any]:
    function = (call.get("function") or call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise UserError(where, f"has a tool call without a name ({call!r})", 'give {"name": ..., "arguments": {...}}')
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError as error:
            raise UserError(where, f"has tool call arguments that are no JSON ({arguments!r})", "mend them") from error
    label = {"id": call["id"]} if "id" in call else {}  # Mistral's templates ask for it
    return {**label, "type": "function", "function": {"name": function["name"], "arguments": arguments}}


@dataclass(frozen=True)
class _Marks:
    """Three characters that occur nowhere in the chat: they carry what we know through Jinja, and are then removed."""

    shield: str
    begin: str
    end: str

    @staticmethod
    def absent_from(text: str) -> _Marks:
        free = (chr(code) for code in PRIVATE_USE if chr(code) not in text)
        return _Marks(next(free), next(free), next(free))


def _take_spans(text: str, marks: _Marks) -> tuple[str, list[Span]]:
    """Remove the begin and end marks; return where they stood in what is left."""
    pieces = re.split(f"([{marks.begin}{marks.end}])", text)
    spans: list[Span] = []
    kept, length, begun = [], 0, 0
    for piece in pieces:
        if piece == marks.begin:
            begun = length
        elif piece == marks.end:
            spans.append((begun, length))
        else:
            kept.append(piece)
            length += len(piece)
    return "".join(kept), spans


def _encode(tokenizer: Tokenizer, mark: str, text: str, spans: list[Span], context: tuple[UserError, ...]) -> Rendered:
    """Ids and mask of a protected text whose spans [start, end) the assistant said."""
    ids: list[int] = []
    mask: list[int] = []
    for start, end, token, place in _pieces(text, tokenizer.plain.shield.found, [start for start, _ in spans]):
        span_end = next((b for a, b in spans if a <= start < b), start)
        if token:
            ids.append(tokenizer.plain.control[token])
            mask.append(int(start < span_end))
            continue
        encoding = tokenizer.plain.encode(text[start:end].replace(mark, ""), place)
        ids += encoding.ids
        if span_end in (start, end) or span_end > end:
            mask += [int(start < span_end)] * len(encoding)
        else:  # a template that ends its span inside ordinary text
            said = len(text[start:span_end].replace(mark, ""))
            mask += [int(first < said) for first, _ in encoding.offsets]
    return Rendered(ids, mask, text.replace(mark, ""), context)


def _pieces(text: str, found: re.Pattern[str], starts: list[int]) -> Iterator[tuple[int, int, str, str]]:
    """Cut at control tokens and at `starts`: (start, end, control token or "", what stands before, as in Plain)."""
    at = 0
    for match in [*found.finditer(text), None]:
        until = match.start() if match else len(text)
        edges = [at, *(cut for cut in starts if at < cut < until), until]
        for first, last in pairwise(edges):
            if first < last:
                yield first, last, "", "inside" if first > at else "after" if at else "start"
        if match:
            yield until, match.end(), match[0].strip(), ""
            at = match.end()
