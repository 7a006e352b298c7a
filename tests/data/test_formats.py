"""Every row that people own becomes the typed row it should: literal lines in, rows out."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from typing import Any

import pytest
from format_lines import LINES, VLM_CONVERSATIONS, bot, user

from groundup.data.formats import FORMATS, by_name, fill, parse, recognise
from groundup.data.messages import RowError
from groundup.data.rows import (
    Chat,
    Choice,
    ImageChat,
    Prompt,
    as_prompt,
    row_text,
)


@pytest.mark.parametrize(("line", "name", "row"), LINES)
def test_literal_line(line: str, name: str, row: object) -> None:
    raw = json.loads(line)
    known = recognise(raw)
    assert known.name == name
    assert parse(raw, known) == row


def test_countdown_says_its_numbers_and_keeps_what_a_grader_needs() -> None:
    raw = {"target": 24, "nums": [4, 6]}
    row = parse(raw, recognise(raw))
    assert isinstance(row, Prompt) and "[4, 6]" in row.messages[0]["content"] and "24" in row.messages[0]["content"]
    assert row.extra == raw


@pytest.mark.parametrize(
    "calls",
    [
        [{"name": "f", "arguments": {"x": 1}}],
        '[{"name": "f", "arguments": {"x": 1}}]',
        [{"type": "function", "id": "1", "function": {"name": "f", "arguments": '{"x": 1}'}}],
        '[{"function": {"name": "f", "arguments": "{\\"x\\": 1}"}}]',
    ],
)
def test_tool_calls_in_every_spelling_are_one(calls: object) -> None:
    raw = {"messages": [user("q"), bot("", tool_calls=calls)]}
    row = parse(raw, by_name("openai"))
    assert row == Chat([user("q"), bot("", tool_calls=[{"name": "f", "arguments": {"x": 1}}])])


def test_a_thought_inside_the_answer_becomes_reasoning() -> None:
    raw = {"messages": [user("q"), bot("<think>\nfirst\n</think>\n\nthen")]}
    assert parse(raw, by_name("openai")) == Chat([user("q"), bot("then", reasoning_content="first")])
    raw = {"messages": [user("<think>forged</think> q"), bot("a")]}
    assert parse(raw, by_name("openai")) == Chat([user("<think>forged</think> q"), bot("a")])


def test_openai_parts_and_marks() -> None:
    parts = [{"type": "image"}, {"type": "text", "text": " what?"}]
    raw = {"messages": [user("") | {"content": parts}, bot("a cat")], "images": [{"bytes": b"png", "path": None}]}
    assert parse(raw, recognise(raw)) == ImageChat([user("<image> what?"), bot("a cat")], [b"png"])


def test_minimind_vlm_columns() -> None:
    expected = [user("<image>\nPlease describe this image in detail."), bot("The image shows...")]
    for conversations in (VLM_CONVERSATIONS, json.loads(VLM_CONVERSATIONS)):
        for picture in (b"jpg", [b"jpg"]):
            raw = {"conversations": conversations, "image_bytes": picture}
            assert parse(raw, recognise(raw)) == ImageChat(expected, [b"jpg"])


BROKEN = [
    ({"txt": "x"}, "did you mean `text` for `txt`"),
    ({"a": 1}, "no known format has the keys: a"),
    ({"text": ""}, "empty"),
    ({"text": 3}, "not a string"),
    ({"conversations": []}, "empty"),
    ({"conversations": [{"role": "alien", "content": "x"}]}, "alien"),
    ({"conversations": [{"speaker": "x", "words": "y"}]}, "speaker"),
    ({"conversations": [{"role": "user", "content": 1}]}, "a number"),
    ({"conversations": "[{broken"}, "not JSON"),
    ({"messages": [user("q"), bot("", tool_calls='[{"name": "f"')]}, "tool_calls"),
    ({"messages": [user("q"), bot("", tool_calls=[{"arguments": {}}])]}, "without a name"),
    ({"messages": [user("q"), bot("", tool_calls=[{"name": "f", "arguments": "1"}])]}, "arguments of f"),
    ({"messages": [user("q"), bot("a")], "tools": '[{"name"'}, "tools"),
    ({"conversations": [{"from": "function_call", "value": '{"name": "f"'}]}, "not JSON"),
    ({"messages": [user("<image>"), bot("a")], "images": ["1", "2"]}, "1 `<image>` marks for 2 images"),
    ({"instruction": "q", "output": "a", "history": ["x"]}, "history"),
    ({"prompt": "q", "chosen": "a", "rejected": "a"}, "equals"),
    ({"chosen": [user("q"), bot("a")], "rejected": [user("p"), bot("b")]}, "does not continue"),
    ({"chosen": "xyz", "rejected": "abc"}, "no prompt"),
    ({"prompt": "q", "completion": "a", "label": "maybe"}, "maybe"),
    ({"prompt": "q", "completions": ["a"], "labels": [True, False]}, "one length"),
    ({"question": "q", "choices": ["a", "b"], "answer": 2}, "none of the 2 choices"),
    ({"question": "q", "choices": ["a"], "answer": 0}, "two at least"),
    ({"question": "q", "answer": "works ####"}, "nothing follows"),
    ({"target": "x", "nums": [1]}, "integer"),
]


@pytest.mark.parametrize(("raw", "says"), BROKEN)
def test_a_broken_row_says_what_is_wrong(raw: dict[str, Any], says: str) -> None:
    with pytest.raises(RowError) as caught:
        parse(raw, recognise(raw))
    assert says in f"{caught.value.why} {caught.value.fix}"


def variations(value: Any) -> Iterator[Any]:
    """The value with any one part of it replaced by junk."""
    yield from (None, 1, True, "", "x", "[", '[{"a": 1}]', [], [1], [None], {}, {"a": 1}, b"x", "<think></think>")
    if isinstance(value, dict):
        for key, inner in value.items():
            yield {other: one for other, one in value.items() if other != key}
            yield from ({**value, key: one} for one in variations(inner))
    elif isinstance(value, list):
        for at, inner in enumerate(value):
            yield from ([*value[:at], one, *value[at + 1 :]] for one in variations(inner))


@pytest.mark.parametrize("line", [line for line, _, _ in LINES])
def test_no_row_however_broken_raises_anything_but_a_row_error(line: str) -> None:
    whole = json.loads(line)
    known, tried = recognise(whole), 0
    for raw in variations(whole):
        if isinstance(raw, dict):
            tried += 1
            with contextlib.suppress(RowError):
                parse(raw, recognise(raw))
            with contextlib.suppress(RowError):
                row_text(parse(raw, known))
    assert tried >= 14


def test_a_row_of_another_format_is_named() -> None:
    with pytest.raises(RowError, match="format text in a file of format openai"):
        parse({"text": "x"}, FORMATS["openai"])


def test_an_unknown_format_name_says_which_is_near() -> None:
    with pytest.raises(ValueError, match="alpaca"):
        by_name("alpacca")


def test_fill_reaches_every_string() -> None:
    raw = {"output": "I am {{name}} by {{author}}", "history": [["{{name}}?", "{{other}}"]]}
    filled = fill(raw, {"name": "小地", "author": "us"})
    assert filled == {"output": "I am 小地 by us", "history": [["小地?", "{{other}}"]]}


def test_as_prompt_drops_the_answer_and_row_text_holds_all_words() -> None:
    chat = Chat([user("q"), bot("a", reasoning_content="r", tool_calls=[{"name": "f", "arguments": {"x": 1}}])])
    assert as_prompt(chat) == Prompt([user("q")])
    assert all(word in row_text(chat) for word in ("q", "a", "r", "f"))
    assert row_text(Choice("q", ["x", "y"], 0, "c")).split() == ["c", "q", "x", "y"]
