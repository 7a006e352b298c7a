"""A recipe's list of rewards becomes numbers, and every way in which a function can fail is told by its name."""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from groundup.config.rl import RewardSpec
from groundup.errors import UserError
from groundup.rewards.build import GIVEN, Rewards, build_rewards
from groundup.rewards.worker import CallError, Worker

FUNCTIONS = '''
"""Rewards of a user."""
import os, re, time
from neighbour import BONUS

calls = 0

def polite(prompts, completions, **columns):
    print("this must not get among the answers")
    return [float("please" in text) + BONUS for text in completions]

def scaled(prompts, completions, answer, *, scale=1.0):
    return [scale * len(right) for right in answer]

def trl_style(completions, ground_truth, **kwargs):
    assert "prompts" in kwargs and "extra" in kwargs
    return [float(text == right) for text, right in zip(completions, ground_truth)]

def by_place(questions, answers):
    return [len(answer) for answer in answers]

def counts(prompts, completions, **columns):
    global calls
    calls += 1
    return [calls] * len(completions)

def raises(prompts, completions, **columns):
    return [1 / 0]

def hangs(prompts, completions, **columns):
    re.match("(a+)+b", "a" * 40)  # holds the interpreter: no thread could stop it

def dies(prompts, completions, **columns):
    os._exit(3)

def too_few(prompts, completions, **columns):
    return [1.0]

def text(prompts, completions, **columns):
    return ["good"] * len(completions)

def nothing(prompts, completions, **columns):
    pass

def nan(prompts, completions, **columns):
    return [float("nan")] * len(completions)

def arrays(prompts, completions, **columns):
    import numpy
    return numpy.arange(len(completions)) / 2

def some(prompts, completions, **columns):
    return [None if text == "?" else 1.0 for text in completions]
'''


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rewards")
    (folder / "mine.py").write_text(FUNCTIONS, encoding="utf-8")
    (folder / "neighbour.py").write_text("BONUS = 0.5\n", encoding="utf-8")
    (folder / "broken.py").write_text("def f(:\n", encoding="utf-8")
    (folder / "needs.py").write_text("import not_installed_anywhere\n", encoding="utf-8")
    return folder


@pytest.fixture
def build(folder: Path) -> Iterator[Any]:
    built: list[Rewards] = []

    def make(*specs: Any, **settings: Any) -> Rewards:
        built.append(build_rewards(specs, folder, **settings))
        return built[-1]

    yield make
    for rewards in built:
        rewards.close()


def ask(rewards: Rewards, *completions: str, questions: str = "", **columns: Any) -> tuple[list[float], dict]:
    prompts = [[{"role": "user", "content": q}] for q in questions or "?" * len(completions)]
    return rewards(prompts, list(completions), columns)


def test_several_rewards_with_weights(build: Any) -> None:
    rewards = build("exact", {"name": "format", "weight": 0.5}, RewardSpec(name="number", weight=0))
    texts = ["<think>a</think><answer>7</answer>", "7", "8"]
    totals, parts = ask(rewards, *texts, answer=["7"] * 3)
    assert rewards.names == ["exact", "format", "number"]
    assert parts == {"exact": [1, 1, 0], "format": [1, 0, 0], "number": [1, 1, 0]}
    assert totals == [1.5, 1, 0]  # number is only watched
    assert ask(rewards) == ([], {"exact": [], "format": [], "number": []})


def test_a_recipes_own_list_is_read(build: Any) -> None:
    from groundup.config import build_recipe

    values = {"stage": "grpo", "model": "m", "data": "d", "output": "o",
              "rl": {"rewards": ["exact", {"name": "length", "args": {"high": 9, "unit": "words"}}]}}  # fmt: skip
    rewards = build(*build_recipe(values).rl.rewards)
    assert ask(rewards, "a b", answer=["a b"])[0] == [2.0]


def test_functions_of_a_file(build: Any) -> None:
    scaled = {"name": "mine.py:scaled", "weight": 2.0, "args": {"scale": 10}}
    rewards = build("mine.py:polite", scaled, "mine.py:by_place", "mine.py:trl_style", "mine.py:arrays")
    columns = {"answer": ["ab", "c"], "scale": ["of a column", "not a setting"], "ground_truth": ["x", "please"],
               "extra": [1, 2]}  # fmt: skip
    totals, parts = ask(rewards, "please", "no", **columns)
    assert parts == {"polite": [1.5, 0.5], "scaled": [20, 10], "by_place": [6, 2], "trl_style": [0, 0],
                     "arrays": [0, 0.5]}  # fmt: skip
    assert totals == [1.5 + 40 + 6, 0.5 + 20 + 2 + 0.5]


def test_a_function_keeps_what_it_loaded_and_is_built_twice(build: Any) -> None:
    rewards = build("mine.py:counts", "mine.py:counts")
    ask(rewards, "a")
    assert ask(rewards, "a")[1] == {"counts": [2], "counts#2": [2]}  # a process each


def test_python_functions(build: Any) -> None:
    rewards = build(lambda prompts, completions, **columns: [len(text) for text in completions])
    assert ask(rewards, "abc", "")[0] == [3, 0]


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("raises", "mine.py:raises: raised ZeroDivisionError: division by zero"),
        ("hangs", "mine.py:hangs: gave no answer within 1 seconds"),
        ("dies", "mine.py:dies: its process ended with code 3"),
        ("too_few", "mine.py:too_few: returned 1 values for 2 completions"),
        ("text", "mine.py:text: returned 'good' for an answer"),
        ("nothing", "mine.py:nothing: returned None; return a list"),
        ("nan", "mine.py:nan: returned nan for an answer"),
        ("scaled", "mine.py:scaled: needs answer, the rows have completion_ids, nums"),
    ],
)
def test_faults_of_a_function(build: Any, name: str, says: str) -> None:
    rewards = build(f"mine.py:{name}", seconds=1)
    started = time.perf_counter()
    with pytest.raises(UserError) as caught:
        ask(rewards, "a", "b", nums=[[1], [2]], completion_ids=[[1], [2]])
    assert says in str(caught.value)
    assert time.perf_counter() - started < 8
    if name == "raises":
        assert "return [1 / 0]" in caught.value.detail
    if name == "nan":
        assert caught.value.detail == "a"


def test_a_python_function_that_hangs(build: Any) -> None:
    rewards = build(lambda prompts, completions: time.sleep(30), seconds=0.2)
    with pytest.raises(UserError, match=r"<lambda>: gave no answer within 0\.2 seconds"):
        ask(rewards, "a")


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("exakt", "reward exakt: is unknown; did you mean exact?"),
        ("nowhere.py:f", "nowhere.py:f: there is no such file"),
        ("mine.py:polte", "mine.py:polte: has no function polte; there is polite, scaled"),
        ("broken.py:f", "broken.py:f: raised SyntaxError"),
        ("needs.py:f", "needs.py:f: raised ModuleNotFoundError: No module named 'not_installed_anywhere'"),
        ({"name": "number", "args": {"tolerence": 1}}, "has no argument tolerence; did you mean tolerance?"),
        ({"name": "number", "args": {"tolerance": -1}}, "reward number: cannot take {'tolerance': -1}"),
        ({"name": "number", "args": {"tolerance": "much"}}, "reward number: cannot take"),
        ("length", "reward length: needs the argument high"),
        ({"name": "mine.py:scaled", "args": {"scal": 1}}, "mine.py:scaled: has no argument scal; did you mean scale?"),
        ({"name": "exact", "wait": 2}, "rl.rewards: wait: Extra inputs are not permitted"),
        ({"name": "judge", "args": {"url": "ftp://x", "model": "m"}}, "'ftp://x' is no web address"),
    ],
)  # fmt: skip
def test_faults_of_a_recipe(build: Any, spec: Any, says: str) -> None:
    with pytest.raises(UserError) as caught:
        build(spec)
    assert says in str(caught.value)


def test_no_process_is_left_where_a_recipe_is_wrong(build: Any) -> None:
    before = psutil.Process().children()
    for specs in (["mine.py:polite", "exakt"], [{"name": "mine.py:scaled", "args": {"scal": 1}}], ["mine.py:polte"]):
        with pytest.raises(UserError):
            build(*specs)
    assert psutil.Process().children() == before


def test_an_empty_list(build: Any) -> None:
    with pytest.raises(UserError, match="is empty"):
        build()


def test_columns_are_asked_for_before_anything_is_sampled(build: Any) -> None:
    build("countdown", "format").check(["answer", "nums", "target"])
    build("code").check(["test", "entry_point"])
    for rewards, wanted in ((build("countdown"), "nums and target"), (build("code"), "tests, or test and entry_point")):
        with pytest.raises(UserError, match=wanted):
            rewards.check(["answer"])
    with pytest.raises(UserError, match="scaled: needs answer"):
        build("mine.py:scaled").check(["nums"])


def test_what_is_not_judged_is_left_out(build: Any) -> None:
    """A reward that judges no answer to a question does not concern it; of some, the others cannot be compared."""
    rewards = build("mine.py:some", {"name": "number", "weight": 2.0})
    totals, parts = ask(rewards, "?", "3", "?", "?", questions="AABB", answer=["3", "3", None, None])
    assert math.isnan(totals[0]) and totals[1] == 3 and all(map(math.isnan, totals[2:]))
    assert parts["number"][:2] == [0, 1] and all(map(math.isnan, parts["number"][2:]))
    assert rewards.unjudged == {"some": 3, "number": 2}
    totals, _ = ask(rewards, "x", "y", questions="AB", answer=[None, "7"])
    assert totals == [1, 1]  # number does not concern A, and y is wrong


def test_a_reward_that_says_always_the_same_is_told_of_once(build: Any, caplog: pytest.LogCaptureFixture) -> None:
    rewards = build("exact", "format", {"name": "language", "weight": 0})
    with caplog.at_level(logging.WARNING):
        for number in range(5):
            ask(rewards, *["7", str(number)] * 10, answer=["7"] * 20)
    assert "reward format is 0 for all of the first 80 answers" in caplog.text
    assert len(caplog.records) == 1
    caplog.clear()
    rewards = build("number")
    for _ in range(9):
        ask(rewards, *["7"] * 20, answer=[None] * 20)
    assert [record.message for record in caplog.records] == ["reward number judged none of the first 80 answers"]


def test_tokens_are_counted_where_nobody_says_them(build: Any) -> None:
    class Tokenizer:
        def encode_batch(self, texts: list[str]) -> list[list[int]]:
            return [[ord(letter) for letter in text] for text in texts]

    spec = {"name": "overlong", "args": {"max_tokens": 4, "buffer": 2}}
    assert ask(build(spec, tokenizer=Tokenizer()), "ab", "abc", "abcd")[0] == [0, -0.5, -1]
    with pytest.raises(UserError, match="completion_ids"):
        ask(build(spec), "ab")


def test_every_given_reward_can_be_had(build: Any) -> None:
    args: dict[str, Any] = {"length": {"high": 3}, "overlong": {"max_tokens": 3, "buffer": 1},
                            "judge": {"url": "http://127.0.0.1:9", "model": "m", "cache": False}}  # fmt: skip
    for name in set(GIVEN) - {"reward_model"}:
        rewards = build({"name": name, "args": args.get(name, {})})
        assert rewards.names == [name]
        if name != "judge":
            rewards([[{"role": "user", "content": "?"}]], ["a"], {"completion_ids": [[1]], "unknown": [None]})


def test_a_worker_ends_with_us_and_after_a_hang_another_starts(folder: Path) -> None:
    worker = Worker(folder / "mine.py", "counts")
    assert worker(5.0, [], ["a"]) == [1] and worker(5.0, [], ["a"]) == [2]
    assert worker.process is not None
    first = worker.process.pid
    with pytest.raises(CallError, match=r"0\.0001 seconds"):
        worker(0.0001, [], ["a"] * 100_000)
    assert worker.process is None
    assert worker(20.0, [], ["a"]) == [1]  # it begins anew
    assert worker.process is not None and worker.process.pid != first
    last = worker.process.pid
    worker.close()
    with pytest.raises(ProcessLookupError):
        os.kill(last, 0)
