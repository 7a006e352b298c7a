"""What can be typed in a chat beside a question? The `/` commands."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable

from groundup.errors import UserError
from groundup.serve.conversation import Conversation

HELP = {
    "/help": "this list",
    "/reset": "forget what was said (the system text stays)",
    "/system TEXT": "set the system text and start anew; without TEXT: remove it",
    "/think on|off|auto": "ask for thinking, forbid it, or leave it to the model",
    "/think": "show the thinking behind the last answer",
    "/think show|fold": "print thinking as it comes, or fold it to one line",
    "/temperature X": "0 always takes the likeliest token; 0.7 varies",
    "/save FILE": "write the conversation (one row of chat data)",
    "/load FILE": "go on with a saved conversation",
    "/undo": "take back the last question and its answer",
    "/exit": "leave (also Ctrl-D)",
}
NAMES = sorted({line.split()[0] for line in HELP})


class Leave(Exception):
    """The user asked to leave."""


def run_command(line: str, chat: Conversation) -> str:
    """Carry out a line that begins with `/` and return what to say. Raises UserError (chat unchanged) or Leave."""
    name, _, argument = line.strip().partition(" ")
    argument = argument.strip()
    action = _ACTIONS.get(name.lower())
    if action is None:
        near = difflib.get_close_matches(name.lower(), NAMES, 1, cutoff=0.5)
        raise UserError(name, "unknown command", f"did you mean {near[0]}?" if near else "/help lists them")
    return action(chat, argument)


def _help(chat: Conversation, argument: str) -> str:
    return "\n".join(f"  {name:<20} {text}" for name, text in HELP.items())


def _reset(chat: Conversation, argument: str) -> str:
    chat.turns.clear()
    return "forgotten"


def _system(chat: Conversation, argument: str) -> str:
    chat.system = argument or None
    chat.turns.clear()
    return "system text set; started anew" if argument else "system text removed; started anew"


def _think(chat: Conversation, argument: str) -> str:
    if argument in ("on", "off", "auto"):
        chat.thinking = {"on": True, "off": False, "auto": None}[argument]
        return {"on": "thinking is asked for", "off": "no thinking", "auto": "the model decides"}[argument]
    if argument in ("show", "fold"):
        chat.show_thinking = argument == "show"
        return "thinking is printed" if chat.show_thinking else "thinking is folded"
    if argument:
        raise UserError(f"/think {argument}", "unknown setting", "use on, off, auto, show or fold")
    last = chat.turns[-1].get("reasoning_content") if chat.turns else None
    return last or "the last answer has no thinking"


def _temperature(chat: Conversation, argument: str) -> str:
    try:
        value = float(argument)
    except ValueError:
        raise UserError(f"/temperature {argument}", "wants a number", "e.g. /temperature 0.7") from None
    chat.params = dataclasses.replace(chat.params, temperature=value)
    return f"temperature {value:g}"


def _save(chat: Conversation, argument: str) -> str:
    chat.save(_file("/save", argument))
    return f"saved {len(chat.turns)} turns to {argument}"


def _load(chat: Conversation, argument: str) -> str:
    chat.load(_file("/load", argument))
    return f"loaded {len(chat.turns)} turns from {argument}"


def _file(name: str, argument: str) -> str:
    if not argument:
        raise UserError(name, "wants a file", f"e.g. {name} talk.jsonl")
    return argument


def _undo(chat: Conversation, argument: str) -> str:
    return "taken back" if chat.undo() else "nothing to take back"


def _exit(chat: Conversation, argument: str) -> str:
    raise Leave


_ACTIONS: dict[str, Callable[[Conversation, str], str]] = {
    "/help": _help,
    "/reset": _reset,
    "/system": _system,
    "/think": _think,
    "/temperature": _temperature,
    "/save": _save,
    "/load": _load,
    "/undo": _undo,
    "/exit": _exit,
}
