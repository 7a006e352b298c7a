"""What each given reward says of right, wrong, strange and cheating answers."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from groundup.eval.world import normalise as world_normalise
from groundup.rewards.countdown import countdown
from groundup.rewards.exact import exact
from groundup.rewards.format import tagged
from groundup.rewards.knights import knights_knaves
from groundup.rewards.language import language
from groundup.rewards.length import length, overlong
from groundup.rewards.number import last_number, number
from groundup.rewards.repetition import repetition
from groundup.rewards.said import said

TRL = json.loads((Path(__file__).parent / "fixtures" / "trl_rewards.json").read_text(encoding="utf-8"))


def one(function: Any, text: str, question: str = "?", **columns: Any) -> float | None:
    """What a reward says of one answer; settings are not lists, columns are."""
    prompts = [[{"role": "user", "content": question}]]
    (score,) = function(prompts, [text], **columns)
    return score


@pytest.mark.parametrize(
    ("text", "answer", "score"),
    [
        ("Paris", "paris", 1),
        ("  **Paris**. ", "Paris", 1),
        ("It is Paris", "Paris", 0),
        ("<think>Rome?</think>\n\nParis", "Paris", 1),
        ("Paris</think>Rome", "Paris", 0),  # the prompt opened the thought
        ("<think>Paris", "Paris", 0),  # never came to an answer
        ("so <answer> Paris </answer>", "Paris", 1),
        ("<answer>Paris</answer><answer>Rome</answer>", "Paris", 0),  # the last one counts
        ("<think><answer>Paris</answer></think>Rome", "Paris", 0),
        ('<tool_call>\n{"name": "f"}\n</tool_call>\n４２。', "42", 1),
        ("Lyon", ["Paris", "Lyon"], 1),
        ("42", 42, 1),
        ("", "Paris", 0),
        ("?", "!", 0),  # signs alone are not nothing
        ("小猫！", "小猫", 1),
        ("Paris", None, None),
        ("Paris", [], None),
    ],
)
def test_exact(text: str, answer: Any, score: float | None) -> None:
    assert one(exact, text, answer=[answer]) == score


def test_exact_can_tell_letters_apart() -> None:
    assert one(exact, "paris", answer=["Paris"], ignore_case=False) == 0


@pytest.mark.parametrize("text", ["Tom", " Tom. ", "<think>\nhm\n</think>\n\nTom", "tomato", "It is Tom.", "Tom Tom"])
def test_exact_is_right_where_the_built_in_worlds_grading_is(text: str) -> None:
    assert one(exact, text, answer=["Tom"]) == float(world_normalise(text) == "Tom")


@pytest.mark.parametrize(
    ("text", "answer", "score"),
    [
        ("so the answer is 72.", "72", 1),
        ("72 clips, or 73", "72", 0),
        ("first 5, then 1,234.50 in all", "1234.5", 1),
        ("#### 72", "x=135/3\n#### 72", 1),
        ("1 2 3 #### 4 clips", "4", 1),
        ("\\boxed{\\frac{3}{4}} of 10", ".75", 1),
        ("\\boxed{{x} = 7} then 8", "7", 1),
        ("<answer>$1{,}000$</answer> of 5", "1000", 1),
        ("共１２．５个", "12.5", 1),
        ("等于-5", "-5", 1),
        ("−3 degrees", "-3", 1),
        ("10-5", "5", 1),  # a difference holds no -5
        ("1e3", "1000", 1),
        ("2 1/2 cups", "2.5", 1),
        ("20%", "20", 1),
        ("20%", "0.2", 1),
        ("0.2", "20%", 1),
        ("20%", "2000%", 0),
        ("0.33333", "1/3", 0),  # tolerance is 1e-6
        ("v1.2 H2O", "2", 0),
        ("the answer is ...5", "5", 1),
        ("<think>72", "72", 0),
        ("no idea", "72", 0),
        ("", "72", 0),
        ("Tuesday 3", "Tuesday", None),  # nothing to compare with
        ("3", None, None),
        ("3", ["4", 3], 1),
        ("9" * 4000, "9", 0),
        ("1/0", "1", 0),
    ],
)
def test_number(text: str, answer: Any, score: float | None) -> None:
    assert one(number, text, answer=[answer]) == score


def test_number_within_a_tolerance() -> None:
    assert one(number, "3.14", answer=["3.14159"], tolerance=0.001) == 1
    assert one(number, "3.1", answer=["3.14159"], tolerance=0.001) == 0
    assert one(number, "314", answer=["314.159"], tolerance=0.001) == 1  # of the number, where that is large
    with pytest.raises(ValueError, match="tolerance"):
        one(number, "3", answer=["3"], tolerance=2)


def test_number_reads_long_answers_quickly() -> None:
    """Nothing that a policy can write makes the reading slow."""
    started = time.perf_counter()
    for text in (
        "1" * 20_000,
        "1 " * 10_000,
        "1,111" * 4000,
        "\\boxed{" * 3000,
        "{" * 20_000,
        "9/" * 9000,
        "- " * 9000,
    ):
        last_number(text)
        one(number, text, answer=["1"])
    assert time.perf_counter() - started < 4


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("<answer>(70 - 53) + 49</answer>", 1),
        ("<answer> $49 + (70-53)$ </answer>", 1),
        ("<answer>**70 - 53 + 49**</answer>", 1),
        ("<answer>(70 - 53) + 49 = 66</answer>", 1),
        ("<answer>(70 - 53) + 49 = 67</answer>", 0),
        ("<answer>(70 - 53) + 49 = 66 = 66</answer>", 0),
        ("<answer>70 - 53 + 48 + 1</answer>", 0),  # other numbers
        ("<answer>70 - 4</answer>", 0),
        ("<answer>70 + 53 + 49</answer>", 0),
        ("<answer>70 - 53 + 49 + 49 - 49</answer>", 0),  # one too often
        ("<answer>66</answer>", 0),
        ("<answer>__import__('os').system('true')</answer>", 0),
        ("<answer>70 ** 53</answer>", 0),
        ("<answer>" + "(" * 5000 + "</answer>", 0),
        ("<answer></answer>", 0),
        ("(70 - 53) + 49", 0),  # it is asked for between tags
        ("<answer>1</answer><think>x</think><answer>(70 - 53) + 49</answer>", 1),
    ],
)
def test_countdown(text: str, score: float) -> None:
    assert one(countdown, text, nums=[[70, 53, 49]], target=[66]) == score


def test_countdown_is_exact_and_may_pay_for_an_attempt() -> None:
    assert one(countdown, "<answer>8 / (3 - 8/3)</answer>", nums=[[3, 3, 8, 8]], target=[24]) == 1
    assert one(countdown, "<answer>70 + 53 + 49</answer>", nums=[[49, 53, 70]], target=[66], partial=0.1) == 0.1
    assert one(countdown, "<answer>70 + 53</answer>", nums=[[49, 53, 70]], target=[66], partial=0.1) == 0
    assert one(countdown, "<answer>70</answer>", nums=[None], target=[None]) is None
    assert one(countdown, "<answer>70</answer>") is None


SOLUTION = "(1) Daniel is a knight\n(2) Mia Lee is a knave"


@pytest.mark.parametrize(
    ("text", "score"),
    [
        (SOLUTION, 1),
        ("<answer>mia lee is a knave, and **Daniel** is a **knight**</answer>", 1),
        ("Daniel: knight\nMia Lee: knave", 1),
        ("Daniel is a knight", 0),
        ("Daniel is a knave, Mia Lee is a knave", 0),
        ("Daniel is a knight. Daniel is a knave. Mia Lee is a knave.", 0),  # the last word counts
        ("<think>Daniel is a knave</think>" + SOLUTION, 1),
        ("<think>" + SOLUTION, 0),
    ],
)
def test_knights_and_knaves(text: str, score: float) -> None:
    assert one(knights_knaves, text, solution_text_format=[SOLUTION]) == score
    assert one(knights_knaves, text, names=[["Daniel", "Mia Lee"]], solution=[[True, False]]) == score
    assert one(knights_knaves, text) is None


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("<think>a</think><answer>b</answer>", 1),
        ("\n<think>\na\n</think>\n\n<answer>b</answer>\n", 1),
        ("<think>a</think> so <answer>b</answer>", 0),
        ("<think>a</think><answer>b</answer>.", 0),
        ("<think></think><answer>b</answer>", 0),
        ("<think>a</think><answer> </answer>", 0),
        ("<think>a<answer>b</answer></think>", 0),
        ("<think>a</think><answer>b</answer><answer>b</answer>", 0),
        ("<think>a</think></think><answer>b</answer>", 0),
        ("<answer>b</answer><think>a</think>", 0),
        ("a</think><answer>b</answer>", 0),
        ("<think>a", 0),
        ("", 0),
    ],
)
def test_format(text: str, score: float) -> None:
    assert one(tagged, text) == score


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("<think>a</think>b", 1),
        ("<think>a</think>\n\nb", 1),
        ("<think>a</think>", 0),
        ("b", 0),
        ("b<think>a</think>b", 0),
        ("<think> </think>b", 0),
        ("<think>a</think>b<think>c</think>", 0),
    ],
)
def test_format_of_a_thought_and_an_answer_in_no_tags(text: str, score: float) -> None:
    assert one(tagged, text, tags=["think", ""]) == score


def test_format_in_other_tags_and_by_halves() -> None:
    assert one(tagged, "<plan>a</plan><do>b</do>", tags=["plan", "do"]) == 1
    assert one(tagged, "<think>a</think>b", partial=0.4) == 0.2  # two of four marks
    with pytest.raises(ValueError, match="tags"):
        tagged([], [], tags="think")
    with pytest.raises(ValueError, match="tags"):
        tagged([], [], tags=["", "think"])


def test_length() -> None:
    ids = [[[0] * size] for size in (0, 5, 10, 20, 25, 30, 99)]
    soft = [one(length, "", completion_ids=each, low=10, high=20, soft=10) for each in ids]
    assert soft == [0, 0.5, 1, 1, 0.5, 0, 0]
    assert [one(length, "", completion_ids=each, low=10, high=20) for each in ids] == [0, 0, 1, 1, 0, 0, 0]
    assert one(length, "four words are here", low=4, high=4, unit="words") == 1
    assert one(length, "四个汉字", high=3, unit="characters") == 0
    with pytest.raises(ValueError, match="completion_ids"):
        one(length, "text", high=3)
    with pytest.raises(ValueError, match="low"):
        length([], [], low=3, high=2)


def test_overlong_and_repetition_are_trls() -> None:
    ids = TRL["completion_ids"]
    texts = [""] * len(ids)
    assert overlong([], texts, ids, max_tokens=40, buffer=15) == pytest.approx(TRL["overlong"])
    for n, expected in TRL["repetition"].items():
        assert repetition([], texts, ids, n=int(n), max_penalty=-0.5) == pytest.approx(expected)
    assert len(set(TRL["overlong"])) > 3


def test_repetition_of_words_and_characters() -> None:
    assert one(repetition, "a b c d e f") == 0
    assert one(repetition, "好的好的好的好的", n=2) == pytest.approx(-5 / 7)
    assert one(repetition, "one two one two", n=2) == pytest.approx(-1 / 3)


@pytest.mark.parametrize(
    ("question", "text", "score"),
    [
        ("What is it?", "It is a cat.", 1),
        ("这是什么？", "这是猫", 1),
        ("这是什么？", "<think>this is easy</think>猫", 1 / 4),
        ("What is it?", "这是猫", 0),
        ("What is it?", "это cat", 0.5),
        ("What is it?", "42", 1),  # in every language
        ("这是什么？", "因为 $x + y$，`print(x)` 和 \\frac{a}{b} 都是数", 1),  # formulas and programs are in none
        ("это что?", "cat", None),
    ],
)
def test_language(question: str, text: str, score: float | None) -> None:
    assert one(language, text, question) == (score if score is None else pytest.approx(score))


def test_language_without_thoughts_or_of_all() -> None:
    assert one(language, "<think>this is easy</think>猫", "这是什么？", thoughts=False) == 1
    assert one(language, "cat", "这是什么？", language="en") == 1
    with pytest.raises(ValueError, match="fr"):
        language([], [], language="fr")


def test_what_is_said_in_the_end() -> None:
    assert said("a</think>b</think>c") == "c"
    assert said("a<tool_call>b</tool_call>c<tool_call>d") == ""
    assert said("plain") == "plain"
