"""Did it learn the world? Exact grading of answers, and the baseline that only copies.

A model has learnt something if it answers held-out questions far better than a reader who looks up the most similar
question of the training set and repeats its answer.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, Protocol

Message = dict[str, Any]
Answerer = Callable[[list[list[Message]]], list[str]]  # prompts, each a list of messages -> one reply each


class Graded(Protocol):
    """What grading needs of a question; groundup.world.Question has it."""

    @property
    def language(self) -> str: ...
    @property
    def kind(self) -> str: ...
    @property
    def messages(self) -> list[Message]: ...
    @property
    def answer(self) -> str: ...


def normalise(text: str) -> str:
    """The reply without its thoughts, its outer and repeated white space and its final punctuation."""
    text = re.sub(r"^\s*<think>.*?</think>", "", text, flags=re.DOTALL)
    return " ".join(text.split()).rstrip(".!?。！？ ").strip()


def grade(question: Graded, text: str) -> bool:
    """Is the whole reply the answer? Not: does it contain it."""
    return normalise(text) == normalise(question.answer)


def evaluate_world(questions: Sequence[Graded], answer: Answerer) -> dict[str, Any]:
    """Exact match by language and by kind: {"world_exact_zh", "world_exact_en", "kinds": {language: {kind: share}}}."""
    replies = answer([question.messages for question in questions])
    marks: dict[str, dict[str, list[bool]]] = defaultdict(lambda: defaultdict(list))
    for question, reply in zip(questions, replies, strict=True):
        marks[question.language][question.kind].append(grade(question, reply))
    result: dict[str, Any] = {"kinds": {}}
    for language, kinds in sorted(marks.items()):
        everything = [mark for kind_marks in kinds.values() for mark in kind_marks]
        result[f"world_exact_{language}"] = sum(everything) / len(everything)
        result["kinds"][language] = {kind: sum(kind_marks) / len(kind_marks) for kind, kind_marks in kinds.items()}
    return result


class CopyBaseline:
    """Answers with the answer of the most similar training question: cosine of tf-idf weighted n-grams.

    n-grams: single words and pairs of words in English, single characters and pairs in Chinese, which is the same rule
    once every Chinese character counts as a word. An answerer, so it is evaluated like a model.
    """

    def __init__(self, questions: Sequence[Graded]) -> None:
        self.answers = [question.answer for question in questions]
        counts = [Counter(ngrams(_text(question.messages))) for question in questions]
        frequency = Counter(gram for grams in counts for gram in grams)
        self.idf = {gram: math.log(len(questions) / n) + 1.0 for gram, n in frequency.items()}
        self.postings: dict[tuple[str, ...], list[tuple[int, float]]] = defaultdict(list)
        for row, grams in enumerate(counts):
            weights = {gram: n * self.idf[gram] for gram, n in grams.items()}
            length = math.sqrt(sum(weight**2 for weight in weights.values()))
            for gram, weight in weights.items():
                self.postings[gram].append((row, weight / length))

    def nearest(self, text: str) -> int:
        """The row of the most similar training question."""
        scores: dict[int, float] = defaultdict(float)
        for gram, n in Counter(ngrams(text)).items():
            for row, weight in self.postings.get(gram, ()):
                scores[row] += n * self.idf[gram] * weight
        return max(scores, key=lambda row: (scores[row], -row), default=0)

    def __call__(self, prompts: list[list[Message]]) -> list[str]:
        return [self.answers[self.nearest(_text(messages))] for messages in prompts]


def ngrams(text: str) -> list[tuple[str, ...]]:
    """Single tokens and neighbouring pairs, where a token is a word, a number, a Chinese character or a sign."""
    tokens = re.findall(r"[a-z]+|\d+|[^\sa-z\d]", text.lower())
    return [(token,) for token in tokens] + list(pairwise(tokens))


def _text(messages: list[Message]) -> str:
    return "\n".join(message["content"] for message in messages)
