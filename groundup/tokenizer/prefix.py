"""Where does the assistant speak, and would it learn there what it will be asked? Found by rendering parts of the chat.

A turn is trained where the whole chat goes on as its prompt began, shows the turn as it was said, word for word, and
closes it with an end-of-turn token. Some templates rewrite the past: Qwen3 takes the reasoning out of earlier answers,
Mistral moves the system message to the last question. What no prompt would lead to is context, and is not trained.
"""

from __future__ import annotations

import difflib
import json
import re
from dataclasses import dataclass
from typing import Any, TypeAlias

from groundup.errors import UserError
from groundup.tokenizer.template import View

Span: TypeAlias = tuple[int, int]
Message: TypeAlias = dict[str, Any]


@dataclass(frozen=True)
class Turn:
    """Where message `index` stands in the text of the chat, end-of-turn token included, or why it is not trained.

    rewritten: that is because the template shows a turn, or what led to it, otherwise once others follow.
    """

    index: int
    span: Span = (0, 0)
    fault: UserError | None = None
    rewritten: bool = False


def find_turns(text: str, messages: list[Message], view: View) -> list[Turn]:
    """Every turn of the assistant in `text`, the whole chat."""
    turns = []
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            try:
                turns.append(_turn(text, messages, i, view))
            except UserError as error:  # the template takes the whole chat, but not this part of it
                turns.append(Turn(i, fault=error, rewritten=True))
    return turns


def _turn(text: str, messages: list[Message], i: int, view: View) -> Turn:
    before = messages[:i]
    prompt = view.run(before, True)
    start = _start(text, prompt, before, view)
    if start is None:
        return Turn(i, fault=_asked_otherwise(prompt, text, i + 1, view), rewritten=True)
    end = view.end(text, start)
    alone = view.run(messages[: i + 1]) if i + 1 < len(messages) else text  # nothing follows the turn there
    alone_start = _start(alone, prompt, before, view)
    alone_end = None if alone_start is None else view.end(alone, alone_start)
    if end is None or (alone_start is not None and alone_end is None):
        wanted = alone[: alone_start or start] + messages[i]["content"] + min(view.ends)
        return Turn(i, fault=_endless(wanted, alone, i + 1, view))
    if _bare(alone[alone_start:alone_end], view) != _bare(text[start:end], view):
        return Turn(i, fault=_shown_otherwise(alone, text, i + 1, view), rewritten=True)
    return Turn(i, (start, end), left_out(messages[i], i, text[start:end], view))


TEMPLATE_THAT_WRITES_IT = (
    "a chat_template.jinja that writes it into the folder (with ChatML's tokens: groundup/tokenizer/template.jinja)"
)
_KEEP = "mend chat_template.jinja so that it leaves the past as it was, or cut each chat after its first answer"


def _asked_otherwise(prompt: str, text: str, number: int, view: View) -> UserError:
    at = agreed(prompt, text)
    at = next((m.start() for m in view.control.finditer(prompt) if m.start() < at < m.end()), at)
    fix = _KEEP
    if not _bare(prompt[at:], view):  # the prompt opens the reasoning
        fix = f"have chat_template.jinja begin every answer with {prompt[at:]!r}, as its prompt ends"
    why = f"renders the chat before message {number} differently once that message is there, so a model would learn to "
    why += "answer what it is never asked"
    names = (f"the prompt of message {number}", "the whole chat")
    return fault(view, why, fix, diff(prompt, text, names, view.mark))


def _endless(wanted: str, text: str, number: int, view: View) -> UserError:
    why = f"writes no end-of-turn token after message {number}, so a model would never learn to stop"
    fix = f"have chat_template.jinja write {' or '.join(sorted(view.ends))} there"
    return fault(view, why, fix, diff(wanted, text, (f"message {number} with its end", "the chat"), view.mark))


def _shown_otherwise(alone: str, text: str, number: int, view: View) -> UserError:
    why = f"shows message {number} otherwise once another follows it, so a model would learn what it should not say"
    names = (f"message {number} as it was said", "the whole chat")
    return fault(view, why, _KEEP, diff(alone, text, names, view.mark))


def agreed(one: str, other: str) -> int:
    """How far two texts are the same."""
    shorter = min(len(one), len(other))
    return next((i for i in range(shorter) if one[i] != other[i]), shorter)


def _start(text: str, prompt: str, before: list[Message], view: View) -> int | None:
    """Where the assistant begins: after the first prompt that `text` goes on from."""
    if text.startswith(prompt):
        return len(prompt)
    return next((len(other) for other in view.other_prompts(before) if text.startswith(other)), None)


def _bare(text: str, view: View) -> str:
    """The words alone: an empty block of reasoning, or none, is the template's own affair."""
    return squeeze(re.sub("</?think>", "", view.control.sub("", text)))


def left_out(message: Message, i: int, text: str, view: View, shown: str | None = None) -> UserError | None:
    """Whether `text` lacks a part of what a person wrote into a message. White space may differ, and JSON may escape.

    shown: `text` as `squeeze` gives it, where that is at hand.
    """
    shown = squeeze(text, view.mark) if shown is None else shown
    calls = [("tool_calls", call["function"]["name"]) for call in message.get("tool_calls", [])]
    for part, words in [*((key, message.get(key, "")) for key in ("reasoning_content", "content")), *calls]:
        if not holds(shown, words.replace(view.mark, "")):
            names = (f"the {part} of message {i + 1}", "what is written")
            return fault(
                view,
                f"leaves out the {part} of message {i + 1} ({message['role']})",
                f"remove {part} from the rows, or put {TEMPLATE_THAT_WRITES_IT}",
                diff(words, text, names, view.mark),
            )
    return None


def holds(shown: str, words: str) -> bool:
    """Are these words in a squeezed text, as they are or escaped as in JSON?"""
    if squeeze(words) in shown:
        return True
    return any(squeeze(json.dumps(words, ensure_ascii=ascii)[1:-1]) in shown for ascii in (False, True))


def squeeze(text: str, mark: str = "") -> str:
    """Without white space, and without the mark that keeps control tokens apart."""
    return "".join((text.replace(mark, "") if mark else text).split())


def fault(view: View, why: str, fix: str, detail: str = "") -> UserError:
    return UserError(f"chat template of {view.where}", f"the template {why}", fix, detail)


def diff(before: str, after: str, names: tuple[str, str], mark: str) -> str:
    """A few lines around the first place where two texts differ, line ends shown."""
    before, after = before.replace(mark, ""), after.replace(mark, "")
    at = agreed(before, after)
    line = before.rfind("\n", 0, at) + 1
    begin = max(before.rfind("\n", 0, max(line - 1, 0)) + 1, at - 100)
    cut = [re.findall(r"[^\n]*\n|[^\n]+", text[begin : at + 100])[:5] for text in (before, after)]
    one, other = ([repr(line)[1:-1] for line in lines] for lines in cut)
    lines = list(difflib.unified_diff(one, other, *names, n=1, lineterm=""))
    return "\n".join([*lines[:2], f"@@ character {at} @@", *(line for line in lines[2:] if not line.startswith("@@"))])
