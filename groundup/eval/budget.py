"""How much does thinking longer buy? Accuracy against the number of samples, for a way of choosing among them.

One drawing of `budget` samples a question serves the whole curve: accuracy at k is the mean over subsets of k of them,
so the points are comparable and the curve is smooth. Only step-beam, whose samples depend on it, runs for each budget.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

from groundup.eval.plots import GREY, TRAIN, VALIDATION, new_figure, save_figure, style_axes
from groundup.eval.prompts import PromptStyle
from groundup.eval.questions import QuestionSet
from groundup.infer.params import SamplingParams
from groundup.infer.strategies import (
    TEMPERATURE,
    Asked,
    Sample,
    Score,
    answer,
    ask,
    check,
    pick,
    sample,
    scored,
)
from groundup.infer.thinking import split_thinking

if TYPE_CHECKING:
    from groundup.infer.engine import Engine

SUBSETS = 64  # of each size, drawn for each question
Z = 1.96  # 95 % lie within


@dataclass(frozen=True)
class Asking:
    """How questions are put and answered. strategy and budget: draw a curve; without a strategy one greedy answer each,
    or one sample where a temperature is given. think: as enable_thinking of the chat template. step: of step-beam."""

    style: PromptStyle = field(default_factory=PromptStyle)
    think: bool | None = None
    max_tokens: int = 256
    temperature: float | None = None
    seed: int = 0
    strategy: str | None = None
    budget: int = 16
    step: str = "\n"

    def params(self, sampled: bool) -> SamplingParams:
        temperature = self.temperature if self.temperature is not None else TEMPERATURE if sampled else 0.0
        return SamplingParams(max_tokens=self.max_tokens, temperature=temperature, seed=self.seed)


def band(values: Sequence[float]) -> dict[str, float]:
    """{"accuracy", "low", "high"}: the mean of questions' marks and its 95 % interval.

    Wilson's interval for shares, with as many questions as the marks' own variance is worth: a mark that is a mean of
    subsets varies less than a coin. Marks outside [0, 1] get the normal interval.
    """
    n = len(values)
    mean = sum(values) / n
    variance = sum((v - mean) ** 2 for v in values) / max(n - 1, 1)
    if min(values) < 0 or max(values) > 1:
        half = Z * math.sqrt(variance / n)
        return {"accuracy": mean, "low": mean - half, "high": mean + half}
    worth = n * max(1.0, mean * (1 - mean) / variance) if variance > 0 else n
    middle = (mean + Z**2 / (2 * worth)) / (1 + Z**2 / worth)
    half = Z * math.sqrt(mean * (1 - mean) / worth + Z**2 / (4 * worth**2)) / (1 + Z**2 / worth)
    return {"accuracy": mean, "low": max(0.0, middle - half), "high": min(1.0, middle + half)}


def gain(after: Sequence[float], before: Sequence[float]) -> dict[str, float]:
    """{"gain", "low", "high"}: mean difference of the same questions' marks, with its 95 % interval."""
    differences = [a - b for a, b in zip(after, before, strict=True)]
    n, mean = len(differences), sum(differences) / len(differences)
    half = Z * math.sqrt(sum((d - mean) ** 2 for d in differences) / max(n - 1, 1) / n)
    return {"gain": mean, "low": mean - half, "high": mean + half}


def budgets(most: int) -> list[int]:
    """1, 2, 4, .. and the budget itself."""
    return sorted({most, *(2**i for i in range(most.bit_length()) if 2**i <= most)})


def coverage(marks: Sequence[float], k: int) -> float:
    """Expected best of k of these marks: what a chooser who never errs would get (pass@k of Chen et al. 2021)."""
    n = len(marks)
    return sum(mark * math.comb(i, k - 1) for i, mark in enumerate(sorted(marks)) if i >= k - 1) / math.comb(n, k)


def chosen_mark(samples: Sequence[Sample], marks: Sequence[float], k: int, strategy: str, random: Random) -> float:
    """Expected mark of what the strategy picks among k of the samples."""
    n = len(samples)
    if k == 1:
        return sum(marks) / n
    if k == n:
        return marks[pick(samples, strategy)]
    total = 0.0
    for _ in range(SUBSETS):
        own = sorted(random.sample(range(n), k))
        total += marks[own[pick([samples[i] for i in own], strategy)]]
    return total / SUBSETS


def measure(engine: Engine, questions: QuestionSet, asking: Asking, score: Score | None = None) -> dict[str, Any]:
    """Accuracy of greedy answers, and of a strategy by budget.

    {"questions", "accuracy", "low", "high", "kinds": {kind: accuracy}, "tokens" (an answer), "ended" (share), "thinks"
    (share that thought, ended the thought and answered)} of the greedy answers; with a strategy "curve": [{"samples",
    "accuracy", "low", "high", "tokens", "coverage"}], "gain": of the whole budget over greedy, "strategy",
    "temperature". score: the verifier.
    """
    if asking.strategy is not None:
        check(asking.strategy, asking.budget, asking.params(True), verified=score is not None)
    messages = questions.put(asking.style)
    tools = [item.tools for item in questions.items]
    asked = [ask(engine.tokenizer, m, t, asking.think) for m, t in zip(messages, tools, strict=True)]
    plain = SamplingParams(max_tokens=asking.max_tokens) if asking.strategy else asking.params(False)
    single = [samples[0] for samples in sample(engine, asked, plain, 1)]
    marks = questions.grade(questions.items, messages, [s.text for s in single])
    result: dict[str, Any] = {
        "questions": len(asked),
        **band(marks),
        "kinds": _by_kind(questions, marks),
        "tokens": sum(s.tokens for s in single) / len(single),
        "ended": sum(s.ended for s in single) / len(single),
        "thinks": sum(all(map(str.strip, split_thinking(s.text))) for s in single) / len(single),
    }
    if asking.strategy is None:
        return result
    points = (_beams if asking.strategy == "step-beam" else _subsets)(engine, questions, messages, asked, asking, score)
    result |= {"strategy": asking.strategy, "temperature": asking.params(True).temperature}
    result["curve"] = [point for point, _ in points]
    result["gain"] = gain(points[-1][1], marks)
    return result


def _by_kind(questions: QuestionSet, marks: Sequence[float]) -> dict[str, float]:
    found: dict[str, list[float]] = {}
    for item, mark in zip(questions.items, marks, strict=True):
        found.setdefault(" ".join(filter(None, (item.language, item.kind))), []).append(mark)
    return {name: sum(own) / len(own) for name, own in found.items()}


Points = list[tuple[dict[str, float], list[float]]]  # of the curve, with every question's mark


def _subsets(
    engine: Engine, questions: QuestionSet, messages: list[Any], asked: list[Asked], asking: Asking, score: Score | None
) -> Points:
    """The curve of majority and best-of-n from one drawing."""
    strategy, most = asking.strategy or "", asking.budget
    drawn = sample(engine, asked, asking.params(True), most)
    if score is not None:
        drawn = scored(asked, drawn, score)
    marks = _mark(questions, messages, drawn)
    each = sum(s.tokens for samples in drawn for s in samples) / (len(drawn) * most)
    points: Points = []
    for k in budgets(most):
        found = [
            chosen_mark(samples, own, k, strategy, Random(f"{asking.seed}/{number}/{k}"))
            for number, (samples, own) in enumerate(zip(drawn, marks, strict=True))
        ]
        best = sum(coverage(own, k) for own in marks) / len(marks)
        points.append(({"samples": k, **band(found), "coverage": best, "tokens": each * k}, found))
    return points


def _mark(questions: QuestionSet, messages: list[Any], drawn: list[list[Sample]]) -> list[list[float]]:
    """Marks of all samples; what was said twice is graded once."""
    texts = [(i, text) for i, samples in enumerate(drawn) for text in {s.text: None for s in samples}]
    found = questions.grade(
        [questions.items[i] for i, _ in texts], [messages[i] for i, _ in texts], [text for _, text in texts]
    )
    marks = dict(zip(texts, found, strict=True))
    return [[marks[i, s.text] for s in samples] for i, samples in enumerate(drawn)]


def _beams(
    engine: Engine, questions: QuestionSet, messages: list[Any], asked: list[Asked], asking: Asking, score: Score | None
) -> Points:
    """The curve of step-beam: a search of its own for each budget."""
    points: Points = []
    for k in budgets(asking.budget):
        choices = answer(engine, asked, asking.params(True), "step-beam", k, score, step=asking.step)
        found = questions.grade(questions.items, messages, [choice.sample.text for choice in choices])
        tokens = sum(choice.tokens for choice in choices) / len(choices)
        points.append(({"samples": k, **band(found), "tokens": tokens}, found))
    return points


def draw_budget(result: dict[str, Any], title: str, path: str | Path) -> None:
    """The curve with its band; greedy as a line across, and what a chooser who never errs would get."""
    curve = result["curve"]
    samples = [point["samples"] for point in curve]
    figure = new_figure(6.2, 3.8)
    axes = figure.add_subplot()
    axes.axhline(100 * result["accuracy"], color=VALIDATION, linestyle="--", linewidth=1.5, label="one greedy answer")
    if "coverage" in curve[0]:
        right = [100 * point["coverage"] for point in curve]
        axes.plot(samples, right, color=GREY, linestyle=":", linewidth=1.5, label="some sample is right")
    low, high = ([100 * point[side] for point in curve] for side in ("low", "high"))
    axes.fill_between(samples, low, high, color=TRAIN, alpha=0.18, linewidth=0)
    axes.plot(samples, [100 * p["accuracy"] for p in curve], "o-", color=TRAIN, ms=4, label=result["strategy"])
    axes.set_xscale("log", base=2)
    axes.set_xticks(samples, [str(k) for k in samples])
    style_axes(axes, title, "samples a question", "right answers (%)")
    axes.legend(frameon=False, loc="best")
    save_figure(figure, path)
