"""Which format is this? A file is recognised by the keys of its first row; a format is a name, its keys and a parser.

Formats are tried from the most specific to the least, so `{"prompt", "chosen", "rejected"}` is never a bare prompt.
Keys that hold "", null or [] count as absent, unless nothing else is there. docs/formats.md shows a row of each.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from groundup.data import formats_chat as training
from groundup.data import formats_eval as evaluation
from groundup.data.messages import RowError
from groundup.data.rows import Row


@dataclass(frozen=True)
class Format:
    """needs: sets of keys, any one of which makes a row of this format. spelled: what a message must say besides."""

    name: str
    needs: tuple[tuple[str, ...], ...]
    parse: Callable[[dict[str, Any]], Row]
    spelled: str = ""

    def fits(self, row: Mapping[str, Any]) -> bool:
        """Does the row have the keys, empty or not? Exams spell theirs in any case."""
        keys = {key.lower() for key in row} if self.parse is evaluation.exam else row.keys()
        return any(keys >= set(need) for need in self.needs)


def _format(name: str, parse: Callable[[dict[str, Any]], Row], *needs: str, spelled: str = "") -> Format:
    return Format(name, tuple(tuple(need.split()) for need in needs), parse, spelled)


FORMATS = {
    one.name: one
    for one in (
        _format("trl-stepwise", training.stepwise, "prompt completions labels"),
        _format("trl-unpaired", training.unpaired, "prompt completion label"),
        _format("humaneval", evaluation.program, "prompt canonical_solution test"),
        _format("sharegpt", training.chat, "conversations", spelled="from"),
        _format("minimind", training.chat, "conversations"),
        _format("openai", training.chat, "messages"),
        _format("alpaca", training.alpaca, "instruction output", "instruction chosen rejected", "input output"),
        _format("preference", training.preference, "chosen rejected"),
        _format("prompt-completion", training.prompt_completion, "prompt completion", "prompt response"),
        _format("exam", evaluation.exam, "question a b answer", "question a b c d"),
        _format("choice", evaluation.choice, "question choices", "question answerKey", "question_stem choices"),
        _format("xcopa", evaluation.xcopa, "premise choice1 choice2 label"),
        _format("fewclue", evaluation.labelled, "sentence label", "sentence1 sentence2 label", "target text label"),
        _format("question-answer", evaluation.question_answer, "question answer"),
        _format("alignbench", evaluation.reference, "question reference"),
        _format("mt-bench", evaluation.multi_turn, "turns"),
        _format("cmath", evaluation.cmath, "input golden"),
        _format("countdown", evaluation.countdown, "target nums"),
        _format("knights-knaves", evaluation.knights, "quiz solution"),
        _format("prompt", training.prompt, "prompt"),
        _format("text", training.text, "text"),
    )
}


def recognise(row: Mapping[str, Any]) -> Format:
    """The format of a row by its keys. RowError names the keys found and the formats there are."""
    filled = {key: value for key, value in row.items() if value is not None and value != "" and value != []}
    for keys in (filled, row):
        for one in FORMATS.values():
            if one.fits(keys) and (not one.spelled or _spelled(row["conversations"], one.spelled)):
                return one
    raise unknown_keys(row)


def unknown_keys(row: Mapping[str, Any]) -> RowError:
    """The error for keys that make no row: what was found, what was probably meant, what there is."""
    found = ", ".join(str(key) for key in list(row)[:12]) or "none"
    known = {key: one.name for one in reversed(FORMATS.values()) for need in one.needs for key in need}
    meant = [f"`{near[0]}` for `{key}`" for key in row if (near := difflib.get_close_matches(str(key), known, 1))]
    hint = f"did you mean {', '.join(meant[:3])}? " if meant else ""
    formats = ", ".join(f"{one.name} ({'+'.join(one.needs[0])})" for one in FORMATS.values())
    return RowError(f"no known format has the keys: {found}", f"{hint}known formats: {formats}")


def by_name(name: str) -> Format:
    """A format by its name; ValueError with the nearest names."""
    if name in FORMATS:
        return FORMATS[name]
    near = difflib.get_close_matches(name, FORMATS, 3) or list(FORMATS)
    raise ValueError(f"no format is called {name!r}; there is {', '.join(near)}")


def parse(row: dict[str, Any], known: Format) -> Row:
    """The typed row. RowError where the row breaks its format."""
    if not known.fits(row):
        try:
            other = recognise(row).name
        except RowError:
            raise unknown_keys(row) from None
        raise RowError(
            f"a row of format {other} in a file of format {known.name} (keys: {', '.join(row)})",
            "keep one format a file",
        )
    return known.parse(row)


def fill(value: Any, names: Mapping[str, str]) -> Any:
    """The value with every `{{name}}` replaced, in all its strings (identity rows: {{name}}, {{author}})."""
    if isinstance(value, str):
        if "{{" in value:
            for name, text in names.items():
                value = value.replace("{{" + name + "}}", text)
        return value
    if isinstance(value, list):
        return [fill(item, names) for item in value]
    if isinstance(value, dict):
        return {key: fill(item, names) for key, item in value.items()}
    return value


def _spelled(messages: Any, word: str) -> bool:
    """Do the messages (a list, or the JSON of one) use this key?"""
    if isinstance(messages, str):
        return f'"{word}"' in messages[:2000]
    return isinstance(messages, list) and bool(messages) and isinstance(messages[0], dict) and word in messages[0]
