"""Exact match means the whole reply, give or take white space, a final full stop and the thoughts before it."""

from __future__ import annotations

import pytest

from groundup.eval.world import CopyBaseline, evaluate_world, grade
from groundup.world import Question


def question(answer: str, language: str = "en", kind: str = "recall", text: str = "Where?") -> Question:
    return Question("id", language, kind, [{"role": "user", "content": text}], answer)


@pytest.mark.parametrize(
    "reply", ["red kite", " red kite\n", "red kite.", "red  kite。", "<think>\nhm\n</think>\n\nred kite"]
)
def test_the_answer_is_right_in_any_wrapping(reply: str) -> None:
    assert grade(question("red kite"), reply)


@pytest.mark.parametrize(
    "reply", ["", "red", "a red kite", "red kite, I think", "Red kite", "redkite", "red kite red kite"]
)
def test_more_or_less_than_the_answer_is_wrong(reply: str) -> None:
    assert not grade(question("red kite"), reply)


def test_shares_by_language_and_kind() -> None:
    questions = [question("a", "en", "x"), question("b", "en", "x"), question("c", "en", "y"), question("d", "zh", "x")]
    result = evaluate_world(questions, lambda prompts: ["a", "-", "c", "-"][: len(prompts)])
    assert result["world_exact_en"] == pytest.approx(2 / 3)
    assert result["world_exact_zh"] == 0.0
    assert result["kinds"] == {"en": {"x": 0.5, "y": 1.0}, "zh": {"x": 0.0}}


def test_a_reply_must_come_for_every_prompt() -> None:
    with pytest.raises(ValueError):
        evaluate_world([question("a"), question("b")], lambda prompts: ["a"])


def test_the_baseline_copies_the_most_similar_question() -> None:
    train = [
        question("1", text="Where does Anna live?"),
        question("2", text="What does Tom eat?"),
        question("3", text="汤姆住在哪里？"),
    ]
    baseline = CopyBaseline(train)
    prompts = [
        question("", text=text).messages for text in ("Where does Tom live?", "What does Anna eat?", "安娜住在哪里？")
    ]
    assert baseline(prompts) == ["1", "2", "3"]
    assert baseline([[{"role": "user", "content": "zzz"}]]) == ["1"]  # nothing in common: the first
