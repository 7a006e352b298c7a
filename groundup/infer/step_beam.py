"""How is a long answer searched for? A beam over its steps, of which a verifier keeps the promising ones.

After Snell et al. 2024 (arXiv 2408.03314, section 5.2): `budget` candidates write one step each; the best of them, one
in `width`, live on, and each is continued `width` times. A candidate that ends while among the best is done, and its
place is closed. The best of the done is the answer. So about as much is written as for `budget` whole samples.

The engine keeps what the candidates share: a step costs its own tokens only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from groundup.errors import UserError
from groundup.infer.engine import Engine, Request
from groundup.infer.params import SamplingParams
from groundup.infer.strategies import Asked, Choice, Extract, Sample, Score, answered, seed_of
from groundup.infer.text import TextStream

WIDTH = 4  # continuations of a kept candidate


@dataclass(frozen=True)
class Candidate:
    """The beginning of an answer: its ids, stop token left out. ended: "stop" or "length", "" while it goes on."""

    ids: tuple[int, ...]
    text: str = ""
    ended: str = ""
    score: float = -math.inf


class Beam:
    """The search for one question's answer."""

    def __init__(self, engine: Engine, question: Asked, params: SamplingParams, budget: int, step: str) -> None:
        self.engine, self.question, self.params, self.step = engine, question, params, step
        self.width = min(WIDTH, budget)
        self.places = budget // self.width  # how many live on
        self.live = [Candidate(())]
        self.fresh = budget  # continuations of each of them
        self.done: list[Candidate] = []
        self.tokens = 0
        self._requests: list[tuple[Candidate, Request]] = []

    def ask(self, number: int) -> None:
        """Queue the next step of all that live. Its seed comes from what is written already, so no two draw alike."""
        for candidate in self.live:
            ids = [*self.question.ids, *candidate.ids]
            params = replace(
                self.params, n=self.fresh, seed=seed_of(self.params.seed, ids), stop=(*self.params.stop, self.step),
                max_tokens=self.params.max_tokens - len(candidate.ids),
            )  # fmt: skip
            self._requests.append((candidate, self.engine.add(ids, params, where=f"question {number}")))

    def grown(self) -> list[Candidate]:
        """What the step made of them, each text once."""
        found: dict[tuple[tuple[int, ...], str], Candidate] = {}
        for before, request in self._requests:
            if request.error:
                raise UserError("model", f"cannot be sampled ({request.error})", "check its weights")
            for c in request.completions():
                self.tokens += len(c.ids)
                more = c.stop_reason == self.step and len(before.ids) + len(c.ids) < self.params.max_tokens
                more = more and len(self.question.ids) + len(before.ids) + len(c.ids) < self.engine.context - 1
                kept = c.ids[:-1] if isinstance(c.stop_reason, int) else c.ids
                ended = "" if more else "stop" if c.stop_reason not in (None, self.step) else "length"
                one = Candidate((*before.ids, *kept), ended=ended)
                found.setdefault((one.ids, ended), one)
        self._requests.clear()
        return [replace(one, text=self._text(one)) for one in found.values()]

    def keep(self, candidates: Sequence[Candidate]) -> None:
        """The best live on; those of them that have ended are done, and their places with them."""
        best = sorted(candidates, key=lambda c: -c.score)[: self.places]
        self.done += [c for c in best if c.ended]
        self.live = [c for c in best if not c.ended]
        self.places, self.fresh = len(self.live), self.width

    def choice(self, extract: Extract) -> Choice:
        samples = [Sample(c.text, extract(c.text), len(c.ids), c.ended == "stop", c.score) for c in self.done]
        able = [i for i, s in enumerate(samples) if s.ended and s.answer] or list(range(len(samples)))
        return Choice(samples, max(able, key=lambda i: (self.done[i].score, -i)), self.tokens)

    def _text(self, candidate: Candidate) -> str:
        stream = TextStream(self.engine.tokenizer, self.params.stop)
        return self.question.opened + "".join(stream.add(token) for token in candidate.ids) + stream.flush()


def step_beam(
    engine: Engine,
    questions: Sequence[Asked],
    params: SamplingParams,
    budget: int,
    score: Score,
    extract: Extract,
    step: str,
) -> list[Choice]:
    """Search for the answers of all questions at once; a round is one step of each that is not done."""
    if not step:
        raise UserError("--step", "is empty", "give what ends a step: a line break, or two")
    most = engine.settings.max_sequences
    if budget > most:
        raise UserError("--budget", f"{budget} candidates of one step", f"at most {most}")
    beams = [Beam(engine, question, params, budget, step) for question in questions]
    while open_beams := [(number, beam) for number, beam in enumerate(beams, 1) if beam.live]:
        for number, beam in open_beams:
            beam.ask(number)
        while engine.has_work:
            engine.step()
        grown = [(beam, candidate) for _, beam in open_beams for candidate in beam.grown()]
        scores = score([answered(beam.question, candidate.text) for beam, candidate in grown])
        for _, beam in open_beams:
            pairs = zip(grown, scores, strict=True)
            beam.keep([replace(c, score=_number(value)) for (own, c), value in pairs if own is beam])
    return [beam.choice(extract) for beam in beams]


def _number(score: float) -> float:
    return -math.inf if math.isnan(score) else score
