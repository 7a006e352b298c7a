"""Many answers and a choice among them: the same by seed whoever else is asked, and the right one of them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from groundup.errors import UserError
from groundup.infer.answers import comparable, final_answer
from groundup.infer.engine import Engine, EngineSettings
from groundup.infer.params import SamplingParams
from groundup.infer.strategies import (
    STRATEGIES,
    Asked,
    Sample,
    answer,
    answered,
    ask,
    majority,
    open_verifier,
    pick,
    sample,
)
from groundup.model.io import save_model
from groundup.model.scored import begin_scored, save_scorer
from groundup.model.transformer import Transformer
from groundup.tokenizer import Tokenizer

LINES = ["the cat", "小猫坐在垫子上", "sat on the mat, 看着月亮"]


@pytest.fixture(scope="module")
def engine(model: Transformer, tokenizer: Tokenizer) -> Engine:
    return Engine(model, tokenizer, EngineSettings(num_blocks=512, max_sequences=16))


@pytest.fixture(scope="module")
def asked(tokenizer: Tokenizer) -> list[Asked]:
    return [ask(tokenizer, [{"role": "user", "content": line}]) for line in LINES]


@pytest.fixture(scope="module")
def params(tokenizer: Tokenizer) -> SamplingParams:
    """Of a random model that likes to break lines and to end."""
    line = tokenizer.encode("\n")
    assert len(line) == 1
    bias = {line[0]: 6.0, tokenizer.stop_ids[0]: 4.0}
    return SamplingParams(max_tokens=24, temperature=1.0, logit_bias=bias, seed=5)


@pytest.mark.parametrize(
    ("reply", "wanted"),
    [
        ("42", "42"),
        ("He has 3.\nThe answer is 42.", "42"),
        ("The answer is: **3.5**. I hope that helps!", "3.5"),
        ("the answer is 4. No: the final answer is 5", "5"),
        ("一共有72个。\n答案是：72。", "72"),
        ("so 48+24=72\n#### 72", "72"),
        (r"Thus \boxed{\frac{1}{2}} it is", r"\frac{1}{2}"),
        ("<think>\n9 or 8?\n</think>\n\nTom.", "Tom"),
        ("<think>\nthe answer is 9", ""),
        ("try <answer>1+1</answer> or <answer> (2+3)*4 </answer> The answer is 7", "(2+3)*4"),
        ("first\n\nlast line!\n", "last line"),
        ("", ""),
    ],
)
def test_the_final_answer_is_found(reply: str, wanted: str) -> None:
    assert final_answer(reply) == wanted


def test_answers_are_equal_that_mean_the_same() -> None:
    for same in (["1,000", "1000", "$1000", "1000.0", "+1000"], ["1/2", ".5", "0.50"], ["Tom", "tom", " TOM "]):
        assert len({comparable(one) for one in same}) == 1, same
    different = ["-5", "5", "5/0", "Tom", "Tim", "1/3", "0.33", ""]
    assert len({comparable(one) for one in different}) == len(different)


def test_a_vote_counts_what_was_answered() -> None:
    assert majority(["3", "4", "4.0", "5"]) == 1
    assert majority(["", "", "7"]) == 2, "who gives no answer does not vote"
    assert majority(["b", "a", "a", "b"]) == 0, "of equals the first"
    assert majority(["", ""]) == 0
    assert majority(["3", "4", "4"], weights=[5.0, 2.0, 2.0]) == 0


def test_a_verifier_chooses_among_the_finished() -> None:
    def one(said: str, score: float, ended: bool = True) -> Sample:
        return Sample(said, said, 3, ended, score)

    assert pick([one("a", 0.1), one("b", 0.9), one("c", 0.9)], "best-of-n") == 1
    assert pick([one("a", 0.1), one("b", 9.0, ended=False)], "best-of-n") == 0
    assert pick([one("a", 0.1, ended=False), one("b", 9.0, ended=False)], "best-of-n") == 1
    assert pick([one("a", float("nan")), one("b", -5.0)], "best-of-n") == 1
    # log odds of 5 outweigh two votes of 0
    assert pick([one("a", 0.0), one("a", 0.0), one("b", 5.0)], "majority") == 0
    assert pick([one("a", -1.0), one("a", -1.0), one("b", 5.0)], "majority") == 2


def test_the_first_samples_of_many_are_those_of_few(engine: Engine, asked: list[Asked], params: SamplingParams) -> None:
    """Beyond max_sequences, too, where a question becomes several requests; and whoever else is asked."""
    many = sample(engine, asked, params, 40)
    assert [len(samples) for samples in many] == [40] * 3
    assert [samples[:3] for samples in many] == sample(engine, asked, params, 3)
    assert many[1:2] == sample(engine, asked[1:2], params, 40)
    assert all(len({s.text for s in samples}) > 20 for samples in many), "samples differ"
    assert many[0] != sample(engine, asked[:1], replace(params, seed=6), 40)[0]


def test_majority_is_the_commonest_answer(engine: Engine, asked: list[Asked], params: SamplingParams) -> None:
    def extract(text: str) -> str:
        return str(len(text) % 3)

    for choice in answer(engine, asked, params, "majority", 15, extract=extract):
        counts = Counter(sample.answer for sample in choice.samples)
        assert counts[choice.sample.answer] == max(counts.values())
        assert choice.agreement == counts[choice.sample.answer] / 15
        assert choice.tokens == sum(sample.tokens for sample in choice.samples)


def dots(conversations: Sequence[list[dict[str, Any]]]) -> list[float]:
    """A verifier that likes short lines."""
    return [text.count("\n") - 0.01 * len(text) for text in (said[-1]["content"] for said in conversations)]


def test_best_of_n_is_the_best_of_them(engine: Engine, asked: list[Asked], params: SamplingParams) -> None:
    calls: list[int] = []

    def score(conversations: list[list[dict[str, Any]]]) -> list[float]:
        calls.append(len(conversations))
        assert all(said[-1]["role"] == "assistant" and said[0]["role"] == "user" for said in conversations)
        return dots(conversations)

    choices = answer(engine, asked, params, "best-of-n", 12, score)
    assert len(calls) == 1, "all questions' samples are judged together"
    for choice, samples in zip(choices, sample(engine, asked, params, 12), strict=True):
        assert [replace(one, score=None) for one in choice.samples] == samples
        able = [one for one in choice.samples if one.ended and one.answer]
        assert choice.sample.score == max(one.score or 0.0 for one in able)


def test_a_search_over_steps(engine: Engine, asked: list[Asked], params: SamplingParams) -> None:
    """Each round every question has at most `budget` candidates; the answers do not depend on who else is asked."""
    rounds: list[list[list[dict[str, Any]]]] = []

    def score(conversations: list[list[dict[str, Any]]]) -> list[float]:
        rounds.append(conversations)
        return dots(conversations)

    found = answer(engine, asked, params, "step-beam", 8, score)
    for conversations in rounds:
        each = Counter(said[0]["content"] for said in conversations)
        assert max(each.values()) <= 8
    assert len(rounds) > 2 and len(rounds[0]) > 12
    for question in LINES:
        before, after = ([said for said in one if said[0]["content"] == question] for one in rounds[:2])
        best = sorted(before, key=lambda said: -dots([said])[0])[:2]  # 8 candidates, of which one in 4 lives on
        assert {said[-1]["content"].split("\n")[0] for said in after} <= {
            said[-1]["content"].split("\n")[0] for said in best
        }
    assert [answer(engine, [one], params, "step-beam", 8, dots)[0] for one in asked] == found
    for choice in found:
        assert choice.sample.score == dots([[{"content": choice.sample.text}]])[0]
        assert choice.tokens >= choice.sample.tokens and len(choice.samples) <= 2


def test_a_search_finds_what_its_verifier_likes(engine: Engine, asked: list[Asked], params: SamplingParams) -> None:
    """With the same number of candidates, choosing at every step gets more than one sample on average, by far."""
    found = answer(engine, asked, params, "step-beam", 16, dots)
    for choice, samples in zip(found, sample(engine, asked, params, 16), strict=True):
        plain = dots([[{"content": one.text}] for one in samples])
        assert (choice.sample.score or 0.0) > sum(plain) / len(plain) + 1


def test_a_verifier_is_a_reward_models_folder(
    engine: Engine, asked: list[Asked], params: SamplingParams, model: Transformer, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    config = replace(model.config)
    twin = Transformer(config)
    twin.load_state_dict(model.state_dict())
    save_scorer(begin_scored(twin, seed=1), tmp_path)
    tokenizer.save(tmp_path)
    verifier = open_verifier(tmp_path, device="cpu")
    for question, choice in zip(asked, answer(engine, asked, params, "best-of-n", 6, verifier), strict=True):
        alone = [verifier([answered(question, one.text)])[0] for one in choice.samples]
        assert [one.score for one in choice.samples] == pytest.approx(alone, abs=1e-6)
        able = [score for one, score in zip(choice.samples, alone, strict=True) if one.ended and one.answer]
        assert choice.sample.score == pytest.approx(max(able or alone))


def test_an_answer_beyond_the_verifiers_context_is_not_chosen(
    engine: Engine, asked: list[Asked], params: SamplingParams, model: Transformer, tokenizer: Tokenizer,
    tmp_path: Path, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    lengths = [len(tokenizer.render(answered(asked[0], "a b c " * n)).ids) for n in (1, 40)]
    short = Transformer(replace(model.config, max_position_embeddings=sum(lengths) // 2))
    short.load_state_dict(model.state_dict())
    save_scorer(begin_scored(short, seed=1), tmp_path)
    tokenizer.save(tmp_path)
    verifier = open_verifier(tmp_path, device="cpu")
    known, beyond = verifier([answered(asked[0], "a b c " * n) for n in (1, 40)])
    assert math.isfinite(known) and math.isnan(beyond)
    assert "1 of 2 answers are longer than the verifier's context" in caplog.text
    samples = [Sample("long", "x", 9, True, beyond), Sample("short", "y", 1, True, known)]
    assert pick(samples, "best-of-n") == 1 and pick(samples, "majority") == 1
    for strategy in ("best-of-n", "step-beam"):  # a search whose answers grow beyond it ends
        assert all(choice.samples for choice in answer(engine, asked, params, strategy, 4, verifier))


def test_an_opened_thought_belongs_to_the_answer(tokenizer: Tokenizer) -> None:
    """What the prompt wrote of it is put before, so that thought and answer are told apart."""
    question = ask(tokenizer, [{"role": "user", "content": "2+2?"}], think=True)
    assert question.opened == "<think>\n"
    said = answered(question, question.opened + "Add.\n</think>\n\n4")[-1]
    assert said == {"role": "assistant", "content": "4", "reasoning_content": "Add."}
    assert ask(tokenizer, [{"role": "user", "content": "2+2?"}]).opened == ""


@pytest.mark.parametrize(
    ("strategy", "budget", "temperature", "where"),
    [
        ("vote", 4, 1.0, "--strategy"),
        ("majority", 0, 1.0, "--budget"),
        ("majority", 4, 0.0, "--temperature"),
        ("best-of-n", 4, 1.0, "--verifier"),
        ("step-beam", 4, 1.0, "--verifier"),
        ("step-beam", 17, 1.0, "--budget"),
    ],
)
def test_settings_that_cannot_be(
    engine: Engine, asked: list[Asked], strategy: str, budget: int, temperature: float, where: str
) -> None:
    params, score = SamplingParams(temperature=temperature), dots if budget == 17 else None
    with pytest.raises(UserError) as caught:
        answer(engine, asked, params, strategy, budget, score)
    assert caught.value.where == where


def test_generate_thinks_longer(groundup: Callable, model: Transformer, tokenizer: Tokenizer, tmp_path: Path) -> None:
    save_model(model, tmp_path / "m")
    tokenizer.save(tmp_path / "m")
    given = ["generate", tmp_path / "m", "the cat", "--max-tokens", 8, "--strategy", "majority", "--budget", 5]
    given += ["--json"]
    first, again = groundup(*given), groundup(*given)
    assert first.code == 0, first.err
    row = first.json()["completions"][0]
    assert row["samples"] == 5 and 0.2 <= row["agreement"] <= 1 and row["prompt"] == "the cat"
    assert again.json()["completions"] == first.json()["completions"], "by seed"
    assert groundup(*given, "--temperature", 0).code == 2
    said = groundup("generate", tmp_path / "m", "the cat", "--strategy", "best-of-n")
    assert said.code == 2 and "--verifier" in said.err
    for strategy in STRATEGIES:
        assert strategy in groundup("generate", "--help").out
