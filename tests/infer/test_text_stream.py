"""Text that comes piece by piece: no character split, no stop string shown, nothing lost."""

from __future__ import annotations

import pytest

from groundup.infer.text import TextStream, partial_suffix
from groundup.infer.thinking import ThinkSplitter, split_thinking
from groundup.tokenizer import Tokenizer

TEXT = "The cat 😀 sat.小猫坐在龘垫子上\n\nEND of it"


@pytest.mark.parametrize("stop", [(), ("ZZZ",), ("END",), ("END!", "龘"), ("\n\nEND",), ("T",)])
def test_pieces_join_up_to_the_first_stop(tokenizer: Tokenizer, stop: tuple[str, ...]) -> None:
    text = TextStream(tokenizer, stop)
    shown = ""
    for token in tokenizer.encode(TEXT):
        piece = text.add(token)
        assert "\ufffd" not in piece
        shown += piece
        if text.stopped:
            break
    shown += text.flush()
    found = [TEXT.find(s) for s in stop if s in TEXT]
    assert shown == TEXT[: min(found, default=len(TEXT))]
    assert text.stopped == bool(found)


def test_what_cannot_begin_a_stop_string_is_not_held(tokenizer: Tokenizer) -> None:
    text = TextStream(tokenizer, ("\n\nEND",))
    assert "".join(text.add(token) for token in tokenizer.encode("The cat\n")) == "The cat"
    assert "".join(text.add(token) for token in tokenizer.encode("sat")) == "\nsat"


def test_a_character_cut_short_is_flushed(tokenizer: Tokenizer) -> None:
    text = TextStream(tokenizer)
    ids = tokenizer.encode("a😀")[:-1]
    assert "".join(text.add(token) for token in ids) == "a"
    assert text.flush() == "\ufffd"


def test_partial_suffix() -> None:
    assert [partial_suffix(t, "abab") for t in ("xa", "xab", "xaba", "x", "", "abab")] == [1, 2, 3, 0, 0, 2]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
@pytest.mark.parametrize(
    ("text", "started", "reasoning", "answer"),
    [
        ("plain < answer <thin>", False, "", "plain < answer <thin>"),
        ("<think>\none\n\ntwo\n</think>\n\nfour\n", False, "one\n\ntwo", "four\n"),
        ("one\n</think>\n\nfour", True, "one", "four"),
        ("<think>\nnever ended\n", False, "never ended\n", ""),
        ("</think>\n\nfour", True, "", "four"),
        ("said</think>", False, "", "said</think>"),
    ],
)
def test_thinking_is_split(text: str, started: bool, reasoning: str, answer: str, size: int) -> None:
    """However the text is cut into pieces."""
    splitter = ThinkSplitter(started)
    parts = [p for i in range(0, len(text), size) for p in splitter.feed(text[i : i + size])] + splitter.flush()
    assert "".join(t for inside, t in parts if inside) == reasoning
    assert "".join(t for inside, t in parts if not inside) == answer
    assert split_thinking(text, started) == (reasoning, answer)
