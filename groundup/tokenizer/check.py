"""Would this chat, written by this template, teach what was meant?

Before each chat is trained on: an end-of-turn token is among what is trained, and nothing that people wrote is missing.
Before a run: `check_template` tries the template on a few chats and says what it can teach.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from groundup.errors import UserError
from groundup.tokenizer.prefix import (
    TEMPLATE_THAT_WRITES_IT,
    Message,
    Span,
    Turn,
    diff,
    fault,
    find_turns,
    holds,
    left_out,
    squeeze,
)  # fmt: skip
from groundup.tokenizer.template import View, has_generation_marks

if TYPE_CHECKING:
    from groundup.tokenizer.tokenizer import Tokenizer


def check_chat(
    text: str, chat: list[Message], tools: Any, view: View, turns: list[Turn], marked: list[Span] | None
) -> None:
    """UserError, with a diff, where training on this chat would go wrong.

    turns: those found by rendering. The last must be sound; an earlier one that was rewritten is context alone.
    marked: the spans of {% generation %}; None where the template has none.
    """
    if any(turn.fault and (not turn.rewritten or turn is turns[-1]) for turn in turns):
        raise next(turn.fault for turn in turns if turn.fault)
    if marked is not None:
        _check_ends(text, marked, view)
    known = {turn.index for turn in turns if turn.fault or marked is None}  # their words were compared already
    shown = squeeze(text, view.mark)
    for i, message in enumerate(chat):
        missing = None if i in known else left_out(message, i, text, view, shown)
        if missing:
            raise missing
    for tool in tools or []:
        name = (tool.get("function") or tool).get("name")
        if isinstance(name, str) and not holds(shown, name):
            raise fault(view, f"leaves out the tool {name}", f"put {TEMPLATE_THAT_WRITES_IT}")


def _check_ends(text: str, spans: list[Span], view: View) -> None:
    """UserError where {% generation %} closes before the token that ends the turn."""
    for number, (start, end) in enumerate(spans):
        until = spans[number + 1][0] if number + 1 < len(spans) else len(text)
        stop = view.end(text, start)
        if stop is not None and (stop <= end or stop > until):  # a turn may have several spans
            continue
        verb = "writes" if stop is None else "trains"
        wanted = text[start:end] + min(view.ends) if stop is None else text[start:stop]
        names = (f"answer {number + 1} with its end", "what is between {% generation %} and {% endgeneration %}")
        raise fault(
            view,
            f"{verb} no end-of-turn token after answer {number + 1}, so a model would never learn to stop",
            f"let {'{% generation %}'} in chat_template.jinja hold {' or '.join(sorted(view.ends))}, too",
            diff(wanted, text[start:end], names, view.mark),
        )


def _user(text: str) -> Message:
    return {"role": "user", "content": text}


def _assistant(text: str, **more: Any) -> Message:
    return {"role": "assistant", "content": text, **more}


_CALL = {"id": "call00001", "type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
_TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
_TWO = [_user("first question"), _assistant("first answer"), _user("second question"), _assistant("second answer")]
_THOUGHTS = [{**m, "reasoning_content": f"why {m['content']}"} if m["role"] == "assistant" else m for m in _TWO]
_CALLS = [
    _user("first question"),
    _assistant("", tool_calls=[_CALL]),
    {"role": "tool", "name": "weather", "tool_call_id": "call00001", "content": "snow"},
    _assistant("first answer"),
]
PROBES: dict[str, tuple[list[Message], list[dict[str, Any]] | None]] = {
    "a question": (_TWO[:2], None),
    "several questions": (_TWO, None),
    "a system message": ([{"role": "system", "content": "the rules"}, *_TWO], None),
    "reasoning": (_THOUGHTS[:2], None),
    "reasoning, several questions": (_THOUGHTS, None),
    "tool calls": (_CALLS, [_TOOL]),
    "tool calls, several questions": ([*_CALLS, *_TWO[2:]], [_TOOL]),
}


def keeps_past(tokenizer: Tokenizer) -> bool:
    """Does the template leave earlier turns, and what led to them, as they were when the chat goes on?"""
    from groundup.tokenizer.chat import look_at

    for messages, tools in PROBES.values():
        view, chat, _ = look_at(tokenizer, messages, tools)
        try:
            turns = find_turns(view.run(chat), chat, view)
        except UserError:  # a chat of a kind that this template does not take
            continue
        if any(turn.rewritten for turn in turns):
            return False
    return True


@dataclass
class TemplateReport:
    """What a chat template can teach.

    marked: whether it has {% generation %} marks; else answers are found by rendering parts of the chat.
    ends: the end-of-turn tokens. chats: a kind of chat -> "trained", "only the last answer is trained", or why not.
    diffs: of those that are not simply trained.
    """

    where: str
    marked: bool
    ends: list[str]
    chats: dict[str, str] = field(default_factory=dict)
    diffs: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The report as plain values."""
        return asdict(self)

    def lines(self) -> list[str]:
        """For a person, a line each."""
        how = "by {% generation %} marks" if self.marked else "by rendering parts of the chat"
        first = f"chat template: answers are found {how}, each ends in {' or '.join(self.ends)}"
        return [first, *(f"  {name}: {verdict}" for name, verdict in self.chats.items())]


def check_template(tokenizer: Tokenizer) -> TemplateReport:
    """Try the tokenizer's template on one chat of each kind. UserError: it has none."""
    from groundup.tokenizer.chat import look_at

    view, _, _ = look_at(tokenizer, [])
    report = TemplateReport(tokenizer.where, has_generation_marks(view.source), sorted(view.ends))
    for name, (messages, tools) in PROBES.items():
        faults: tuple[UserError, ...]
        try:
            faults = tokenizer.render(messages, tools).context
            verdict = "only the last answer is trained" if faults else "trained"
        except UserError as error:
            faults, verdict = (error,), f"not trained: {error.why}"
        report.chats[name] = verdict
        if faults:
            report.diffs[name] = faults[0].detail
    return report
