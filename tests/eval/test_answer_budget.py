"""What thinking longer buys, measured: the estimates are what enumeration gives, and questions are put as they say."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from itertools import combinations
from pathlib import Path
from random import Random
from typing import Any

import pytest

from groundup.config.rl import RewardSpec
from groundup.errors import UserError
from groundup.eval.budget import Asking, band, budgets, chosen_mark, coverage, draw_budget, gain, measure
from groundup.eval.prompts import Item, PromptStyle, choose, put, worked_answer
from groundup.eval.questions import QuestionSet, file_questions, grader, world_questions, world_reasoning
from groundup.infer.engine import Engine, EngineSettings
from groundup.infer.strategies import Sample, pick
from groundup.model.transformer import Transformer
from groundup.tokenizer import Tokenizer
from groundup.world import World


def said(*answers: str, scores: Sequence[float] | None = None) -> list[Sample]:
    return [Sample(a, a, 1, True, scores[i] if scores else None) for i, a in enumerate(answers)]


def test_bands() -> None:
    """Wilson 1927 for 8 of 10; narrower where the marks vary less than a coin's; never a point."""
    found = band([1.0] * 8 + [0.0] * 2)
    # unbiased variance .1778 of .16: as many questions as a coin would need
    assert found["accuracy"] == 0.8 and found["low"] == pytest.approx(0.4902, abs=1e-3)
    assert found["high"] == pytest.approx(0.9433, abs=1e-3)
    assert band([1.0] * 50)["low"] == pytest.approx(50 / (50 + 1.96**2), abs=1e-6)
    half = band([0.5] * 9 + [0.6])
    assert half["high"] - half["low"] < 0.1 < band([0.0, 1.0] * 5)["high"] - 0.5
    outside = band([-1.0, 1.0, 2.0, 2.0])
    assert outside["low"] < 1 < outside["high"]


def test_a_gain_is_of_the_same_questions() -> None:
    """Questions that are hard for both do not widen it."""
    before = [0.0, 1.0] * 50
    found = gain([1.0, *before[1:]], before)
    assert found["gain"] == pytest.approx(0.01) and found["high"] - found["low"] < 0.05


def test_budgets() -> None:
    assert budgets(16) == [1, 2, 4, 8, 16]
    assert budgets(10) == [1, 2, 4, 8, 10]
    assert budgets(1) == [1]


@pytest.mark.parametrize("k", [1, 2, 3, 6])
def test_estimates_are_those_of_all_subsets(k: int) -> None:
    samples = said("a", "b", "a", "c", "b", "b", scores=[0.1, 0.9, 0.3, 0.8, 0.2, 0.4])
    marks = [1.0, 0.0, 1.0, 0.5, 0.0, 0.0]
    subsets = list(combinations(range(6), k))
    best = sum(max(marks[i] for i in own) for own in subsets) / len(subsets)
    assert coverage(marks, k) == pytest.approx(best)
    for strategy in ("majority", "best-of-n"):
        exact = sum(marks[own[pick([samples[i] for i in own], strategy)]] for own in subsets) / len(subsets)
        drawn = [chosen_mark(samples, marks, k, strategy, Random(seed)) for seed in range(40)]
        assert sum(drawn) / len(drawn) == pytest.approx(exact, abs=1e-9 if k in (1, 6) else 0.03)


def test_votes_help_who_is_often_right_and_hurt_who_is_not() -> None:
    """Six of ten samples right: a vote of all is right. Four of ten, the others all alike: it is wrong."""
    often, seldom = said(*"rrrrrrwxyz"), said(*"rrrrwwwwww")
    right = [[1.0 if one.answer == "r" else 0.0 for one in samples] for samples in (often, seldom)]
    one, ten = (chosen_mark(often, right[0], k, "majority", Random(0)) for k in (1, 10))
    assert one == 0.6 and ten == 1.0
    assert chosen_mark(seldom, right[1], 10, "majority", Random(0)) == 0.0


WORLD = World(seed=0)


def test_few_shot_examples_are_solved_turns_of_the_same_kind() -> None:
    style = PromptStyle(shots=2, seed=3)
    questions = world_questions(WORLD, style)
    train = {
        (q.messages[0]["content"], q.language, q.kind): q.answer
        for language in ("zh", "en")
        for q in WORLD.questions("train", language)
    }
    for item, messages in list(zip(questions.items, questions.put(style), strict=True))[::29]:
        assert [m["role"] for m in messages] == ["user", "assistant"] * 2 + ["user"]
        assert messages[-1] == item.messages[-1]
        for asked, answered in zip(messages[:-1:2], messages[1::2], strict=True):
            assert answered["content"] == train[asked["content"], item.language, item.kind]
    assert questions.put(style) == questions.put(style) != questions.put(PromptStyle(shots=2, seed=4))
    assert questions.put(PromptStyle()) == [item.messages for item in questions.items]


def test_chain_of_thought_in_the_worlds_own_words() -> None:
    """Its questions ask to think in the words that its thoughts were asked for; examples show a right thought."""
    style = PromptStyle(shots=1, cot=True)
    questions = world_questions(WORLD, style, kinds=["arithmetic"])
    assert {item.kind for item in questions.items} == {"arithmetic"}
    for item, messages in zip(questions.items, questions.put(style), strict=True):
        assert messages[-1]["content"].startswith({"en": "Think first", "zh": "先想一想"}[item.language])
        assert messages[1]["reasoning_content"] and messages[0]["content"].startswith(messages[-1]["content"][:5])
    thoughts = world_reasoning(WORLD, count=10)
    assert thoughts.put(PromptStyle(cot=True)) == thoughts.put(PromptStyle()), "they ask for it already"
    with pytest.raises(UserError, match="unknown"):
        world_questions(WORLD, kinds=["arithmetics"])


def test_chain_of_thought_of_a_file() -> None:
    solution = "48/2 = <<48/2=24>>24 clips.\n48+24 = <<48+24=72>>72 in all.\n#### 72"
    item = Item([{"role": "user", "content": "How many?"}], "72", worked=solution)
    assert worked_answer(item) == "48/2 = 24 clips.\n48+24 = 72 in all.\nThe answer is 72."
    brief = Item([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+1?"}], "2")
    shown = put(brief, PromptStyle(shots=1, cot=True), [item])
    assert [m["role"] for m in shown] == ["system", "user", "assistant", "user"]
    assert shown[1]["content"] == "How many?\nLet's think step by step. Then write: The answer is ..."
    assert shown[2]["content"] == worked_answer(item)
    chinese = put(Item([{"role": "user", "content": "一共几个？"}], "2", "zh"), PromptStyle(cot=True))
    assert "一步一步" in chinese[0]["content"]
    tagged = put(Item([{"role": "user", "content": "Return <answer> x </answer>"}], "2"), PromptStyle(cot=True))
    assert tagged[0]["content"].endswith("</answer>\nLet's think step by step.")
    with pytest.raises(UserError, match="worked solution"):
        put(item, PromptStyle(shots=1, cot=True), [Item([{"role": "user", "content": "2+2?"}], "4")])
    with pytest.raises(UserError, match="--shots"):
        choose("en", "", PromptStyle(shots=2), [item])


def rows(path: Path, *found: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in found), encoding="utf-8")
    return path


def test_rows_are_graded_by_what_they_ask_for(tmp_path: Path) -> None:
    """Numbers as numbers, words as words, puzzles by their own rules; the first rows are the examples."""
    sums = rows(tmp_path / "sums.jsonl", *({"question": f"{i}+1?", "answer": f"Add.\n#### {i + 1}"} for i in range(5)))
    found = file_questions(sums, shots=2, limit=2)
    assert [item.answer for item in found.items] == ["3", "4"] and len(found.examples) == 2
    assert found.items[0].worked == "Add.\n#### 3"

    def marks(questions: QuestionSet, *replies: str) -> list[float]:
        return questions.grade(questions.items, questions.put(PromptStyle()), replies)

    assert marks(found, "So it is $3.00", "<think>\n4\n</think>\n\n5") == [1.0, 0.0]
    asked = [{"role": "user", "content": "Who?"}]
    names = rows(
        tmp_path / "names.jsonl", *({"conversations": asked, "gt": [name], "kind": "who"} for name in ("Tom", "7"))
    )
    found = file_questions(names)
    assert [item.kind for item in found.items] == ["who", "who"]
    assert marks(found, "Let me see.\nThe answer is Tom.", "70") == [1.0, 0.0]
    puzzle = rows(tmp_path / "countdown.jsonl", *[{"target": 24, "nums": [4, 6]}] * 2)
    assert marks(file_questions(puzzle), "<answer>4*6</answer>", "24") == [1.0, 0.0]
    with pytest.raises(UserError, match="fewer shots"):
        file_questions(puzzle, shots=2)
    chats = rows(tmp_path / "chats.jsonl", {"conversations": [*asked, {"role": "assistant", "content": "I."}]})
    with pytest.raises(UserError, match=r"chats\.jsonl:1"):
        file_questions(chats)


def test_a_grader_of_ones_own(tmp_path: Path) -> None:
    code = "def short(prompts, completions, **columns):\n    return [float(len(c) < 3) for c in completions]\n"
    (tmp_path / "mine.py").write_text(code)
    grade = grader([RewardSpec(name=f"{tmp_path / 'mine.py'}:short")], "unused")
    item = Item([{"role": "user", "content": "?"}], None)
    assert grade([item, item], [item.messages] * 2, ["ab", "abc"]) == [1.0, 0.0]


def length_marks(items: Sequence[Item], messages: Sequence[Any], replies: Sequence[str]) -> list[float]:
    return [float(len(reply) % 2) for reply in replies]


@pytest.fixture(scope="module")
def engine(model: Transformer, tokenizer: Tokenizer) -> Engine:
    return Engine(model, tokenizer, EngineSettings(num_blocks=256, max_sequences=16))


@pytest.fixture(scope="module")
def questions() -> QuestionSet:
    items = [
        Item([{"role": "user", "content": f"the cat {i}"}], str(i), kind="odd" if i % 2 else "even") for i in range(6)
    ]
    return QuestionSet("cats", items, length_marks)


def test_a_curve_of_one_drawing(engine: Engine, questions: QuestionSet, tmp_path: Path) -> None:
    asking = Asking(strategy="majority", budget=8, max_tokens=6, temperature=1.0, seed=2)
    found = measure(engine, questions, asking)
    assert found["questions"] == 6 and set(found["kinds"]) == {"en odd", "en even"}
    curve = found["curve"]
    assert [point["samples"] for point in curve] == [1, 2, 4, 8]
    assert all(point["low"] <= point["accuracy"] <= point["high"] for point in curve)
    assert curve[0]["accuracy"] == pytest.approx(curve[0]["coverage"])
    right = [point["coverage"] for point in curve]
    assert right == sorted(right) and right[-1] >= curve[-1]["accuracy"]
    assert curve[-1]["tokens"] == pytest.approx(8 * curve[0]["tokens"])
    assert found["gain"]["gain"] == pytest.approx(curve[-1]["accuracy"] - found["accuracy"])
    assert measure(engine, questions, asking) == found, "by seed"
    short = measure(engine, questions, Asking(strategy="majority", budget=8, max_tokens=6, temperature=1.0, seed=3))
    assert short["curve"] != curve and short["accuracy"] == found["accuracy"]
    draw_budget(found, "cats", tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_a_perfect_verifier_reaches_what_is_covered(engine: Engine, questions: QuestionSet) -> None:
    def score(conversations: list[list[dict[str, Any]]]) -> list[float]:
        return [float(len(one[-1].get("reasoning_content", "") + one[-1]["content"]) % 2) for one in conversations]

    asking = Asking(strategy="best-of-n", budget=8, max_tokens=12, temperature=1.0)
    found = measure(engine, questions, asking, score)["curve"][-1]
    assert found["accuracy"] <= found["coverage"] and found["accuracy"] >= found["coverage"] - 0.4
    plain = measure(engine, questions, Asking(strategy="majority", budget=8, max_tokens=12, temperature=1.0))
    assert found["accuracy"] >= plain["curve"][0]["accuracy"]
    beams = measure(engine, questions, Asking(strategy="step-beam", budget=4, max_tokens=12, temperature=1.0), score)
    assert [point["samples"] for point in beams["curve"]] == [1, 2, 4] and "coverage" not in beams["curve"][0]


def test_eval_asks_and_draws(groundup: Callable, folder: Path, tmp_path: Path) -> None:
    sums = rows(tmp_path / "sums.jsonl", *({"question": f"{i}+1?", "answer": f"#### {i + 1}"} for i in range(4)))
    plain = groundup("eval", folder, "--data", sums, "--max-tokens", 6, "--json")
    assert plain.code == 0, plain.err
    assert plain.json()["asked"]["sums.jsonl"]["questions"] == 4
    given = ["--strategy", "majority", "--budget", 4, "--max-tokens", 6, "--output", tmp_path / "out", "--json"]
    curve = groundup("eval", folder, "--data", sums, "--reasoning", "--limit", 3, "--cot", *given)
    assert curve.code == 0, curve.err
    found = curve.json()["asked"]
    assert [found[name]["questions"] for name in ("reasoning", "sums.jsonl")] == [3, 3]
    for figures in found.values():
        assert Path(figures["plot"]).is_file() and figures["curve"][-1]["samples"] == 4
    stored = json.loads((tmp_path / "out" / "budget-sums.json").read_text(encoding="utf-8"))
    assert stored == found["sums.jsonl"]
    for wrong in (
        ["--strategy", "best-of-n"],
        ["--verifier", folder],
        ["--strategy", "best"],
        ["--temperature", 0, *given],
    ):
        assert groundup("eval", folder, "--data", sums, *wrong).code == 2
