"""How does more computing buy a better answer? Many answers to one question, and a way to choose among them.

majority: the answer that most samples come to (self-consistency, Wang et al. 2022, arXiv 2203.11171); with a verifier
every vote weighs what it says of the sample (Li et al. 2022, arXiv 2206.02336).
best-of-n: the sample that a verifier, an outcome or a reward model, scores highest (Cobbe et al. 2021, 2110.14168).
step-beam: a search over steps that a verifier judges as they are written (step_beam.py).

A budget is a number of samples a question. What a question is answered depends on (weights, question, settings, seed)
and on nothing beside it; the first 4 of 16 samples are the 4 of a budget of 4.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from groundup.errors import UserError
from groundup.infer.answers import comparable, final_answer
from groundup.infer.engine import Engine
from groundup.infer.params import Completion, SamplingParams
from groundup.infer.thinking import split_thinking

if TYPE_CHECKING:
    from groundup.tokenizer import Tokenizer

log = logging.getLogger(__name__)

STRATEGIES = ("majority", "best-of-n", "step-beam")
TEMPERATURE = 0.8  # of samples, where nothing else was asked for
Message = dict[str, Any]
Score = Callable[[list[list[Message]]], list[float]]  # finished conversations -> how good is the last answer of each
Extract = Callable[[str], str]


@dataclass(frozen=True)
class Asked:
    """A question as the model reads it. messages: the same as a chat, where it is one. opened: what of the answer the
    prompt holds already (`<think>` where thinking is asked for); it is put before every sample's text."""

    ids: Sequence[int]
    messages: list[Message] | None = None
    opened: str = ""


@dataclass(frozen=True)
class Sample:
    """One answer. text: thoughts as the template writes them. answer: what a vote compares. ended: by itself, not by
    a limit. score: a verifier's, where one was asked."""

    text: str
    answer: str
    tokens: int
    ended: bool
    score: float | None = None


@dataclass(frozen=True)
class Choice:
    """All samples of one question and the chosen one. tokens: all that were written for it, dropped beams included."""

    samples: list[Sample]
    picked: int
    tokens: int

    @property
    def sample(self) -> Sample:
        return self.samples[self.picked]

    @property
    def agreement(self) -> float:
        """Share of the samples that come to the chosen answer."""
        key = comparable(self.sample.answer)
        return sum(comparable(sample.answer) == key for sample in self.samples) / len(self.samples)


def ask(
    tokenizer: Tokenizer, messages: list[Message], tools: list[dict[str, Any]] | None = None, think: bool | None = None
) -> Asked:
    """A chat that waits for its answer. think: as enable_thinking of the chat template."""
    rendered = tokenizer.render(messages, tools, add_generation_prompt=True, enable_thinking=think)
    opened = "<think>\n" if rendered.text.rstrip().endswith("<think>") else ""
    return Asked(rendered.ids, messages, opened)


def answer(
    engine: Engine,
    questions: Sequence[Asked],
    params: SamplingParams,
    strategy: str,
    budget: int,
    score: Score | None = None,
    extract: Extract = final_answer,
    step: str = "\n",
) -> list[Choice]:
    """Answer every question with a budget of samples, all questions in one batch.

    params: of one sample; its seed (default 0) decides all. score: the verifier; majority can do without. step: what
    ends a step of step-beam. UserError: a strategy that is none, lacks its verifier, or would draw the same sample
    again and again.
    """
    check(strategy, budget, params, verified=score is not None)
    if strategy == "step-beam":
        from groundup.infer.step_beam import step_beam

        assert score is not None
        return step_beam(engine, questions, params, budget, score, extract, step)
    drawn = sample(engine, questions, params, budget, extract)
    if score is not None:
        drawn = scored(questions, drawn, score)
    return [Choice(samples, pick(samples, strategy), sum(s.tokens for s in samples)) for samples in drawn]


def check(strategy: str, budget: int, params: SamplingParams, verified: bool) -> None:
    """UserError where `answer` could not keep what the settings promise."""
    if strategy not in STRATEGIES:
        raise UserError("--strategy", f"{strategy!r} is unknown", f"one of {', '.join(STRATEGIES)}")
    if budget < 1:
        raise UserError("--budget", f"{budget} samples", "give 1 or more")
    if strategy != "majority" and not verified:
        raise UserError("--verifier", f"is missing, and {strategy} chooses by it", "name a reward model's folder")
    if budget > 1 and params.greedy:
        raise UserError("--temperature", f"0 gives {budget} times the same sample", f"try {TEMPERATURE}")


def sample(
    engine: Engine, questions: Sequence[Asked], params: SamplingParams, count: int, extract: Extract = final_answer
) -> list[list[Sample]]:
    """`count` samples of every question."""
    most = engine.settings.max_sequences  # of one request
    requests = [
        [
            engine.add(q.ids, replace(params, n=min(most, count - at), seed=seed_of(params.seed, q.ids) + at),
                       where=f"question {number}")
            for at in range(0, count, most)
        ]
        for number, q in enumerate(questions, 1)
    ]  # fmt: skip
    while engine.has_work:
        engine.step()
    if fault := next((request.error for own in requests for request in own if request.error), None):
        raise UserError("model", f"cannot be sampled ({fault})", "check its weights")
    return [
        [_sample(q, completion, extract) for request in own for completion in request.completions()]
        for q, own in zip(questions, requests, strict=True)
    ]


def _sample(question: Asked, completion: Completion, extract: Extract) -> Sample:
    text = question.opened + completion.text
    return Sample(text, extract(text), len(completion.ids), completion.finish_reason == "stop")


def seed_of(seed: int | None, ids: Sequence[int]) -> int:
    """A seed of its own for every question, so that no two share their luck; with room to count its samples."""
    digest = hashlib.blake2b(repr((seed or 0, list(ids))).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 2


def scored(questions: Sequence[Asked], drawn: Sequence[Sequence[Sample]], score: Score) -> list[list[Sample]]:
    """The samples with a verifier's scores; it sees each text of a question once."""
    texts = [(q, text) for q, samples in zip(questions, drawn, strict=True) for text in {s.text: None for s in samples}]
    found = score([answered(q, text) for q, text in texts])
    scores = {(id(q), text): value for (q, text), value in zip(texts, found, strict=True)}
    return [
        [replace(s, score=scores[id(q), s.text]) for s in samples] for q, samples in zip(questions, drawn, strict=True)
    ]


def answered(question: Asked, text: str) -> list[Message]:
    """The conversation that a verifier judges."""
    if question.messages is None:
        raise UserError("--verifier", "judges answers in a chat", "leave --raw out")
    thought, said = split_thinking(text)
    more = {"reasoning_content": thought} if thought else {}
    return [*question.messages, {"role": "assistant", "content": said, **more}]


def pick(samples: Sequence[Sample], strategy: str) -> int:
    """Which of the samples it is. Samples that came to an answer go before others; then the first of equals."""
    if strategy == "majority":
        weights = [1.0 if s.score is None else _sigmoid(s.score) for s in samples]
        return majority([s.answer for s in samples], weights)
    able = [i for i, s in enumerate(samples) if s.ended and s.answer] or list(range(len(samples)))
    return max(able, key=lambda i: (_number(samples[i].score), -i))


def majority(answers: Sequence[str], weights: Sequence[float] | None = None) -> int:
    """The first of those who give the answer with most votes; who gives none does not vote."""
    votes: dict[str, float] = defaultdict(float)
    first: dict[str, int] = {}
    for i, (said, weight) in enumerate(zip(answers, weights or [1.0] * len(answers), strict=True)):
        if said:
            key = comparable(said)
            votes[key] += weight
            first.setdefault(key, i)
    return first[max(votes, key=lambda key: (votes[key], -first[key]))] if votes else 0


def _sigmoid(score: float) -> float:
    return 0.0 if math.isnan(score) else 1 / (1 + math.exp(-max(-700.0, min(700.0, score))))


def _number(score: float | None) -> float:
    return -math.inf if score is None or math.isnan(score) else score


def open_verifier(folder: str | Path, device: str = "auto") -> Score:
    """The scores of a reward model's folder; NaN, which loses to every number, for what is beyond its context."""
    from groundup.infer.scoring import Scorer

    scorer = Scorer(folder, device=device)

    def score(conversations: list[list[Message]]) -> list[float]:
        found = [math.nan if score is None else score for score in scorer.score_fitting(conversations)]
        if beyond := sum(map(math.isnan, found)):
            told = (beyond, len(found), scorer.context)
            log.warning("%d of %d answers are longer than the verifier's context (%d tokens): not judged", *told)
        return found

    return score
