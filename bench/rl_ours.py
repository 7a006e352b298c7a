"""groundup's side of `bench.rl`: stages grpo, ppo and preference through `groundup.train`, by turns.

It differs from anybody's run in two things: answers go on past the stop token, so that both sides write as many tokens
(unless they are to stop), and the sampler's time is taken.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import psutil

from bench.peers.recipe import Finished, train_by_turns
from bench.turns import Turns, peak_memory, run
from groundup.infer.params import SamplingParams
from groundup.train import onpolicy
from groundup.train import run as training
from groundup.train.preference import Preference
from groundup.train.rollout import Answer, Sampler


class Timed(Sampler):
    """Answers of max_tokens tokens each, or up to their stop token; how many there were so far, how long they took."""

    stop = False
    seconds = 0.0
    tokens = answers = 0

    def _params(self, *args: Any) -> SamplingParams:
        return replace(super()._params(*args), ignore_eos=not Timed.stop)

    def sample(self, *args: Any, **kwargs: Any) -> list[Answer]:
        began = time.perf_counter()
        answers = super().sample(*args, **kwargs)
        Timed.seconds += time.perf_counter() - began
        Timed.tokens += sum(len(answer.ids) for answer in answers)
        Timed.answers += len(answers)
        return answers


class Counted(Preference):
    """Pairs that were trained, and their tokens."""

    pairs = tokens = 0

    def count(self, batch: Any) -> tuple[int, int]:
        pairs, tokens = super().count(batch)
        Counted.pairs, Counted.tokens = Counted.pairs + pairs, Counted.tokens + tokens
        return pairs, tokens


class Rounds:
    """Hears of every step, and tells the bench of the last one of each round. samples: of a round; 0: count pairs."""

    def __init__(self, turns: Turns, samples: int, steps: int) -> None:
        self.turns, self.samples, self.steps, self.pairs = turns, samples, steps, 0

    def __call__(self, figures: dict[str, Any]) -> None:
        if figures["step"] % self.steps:
            return
        done, self.pairs = self.samples or Counted.pairs - self.pairs, Counted.pairs
        rewards = sum(peak_memory(child.pid) for child in psutil.Process().children(recursive=True))
        self.turns.extra = {"rollout_seconds": Timed.seconds, "other_processes_mb": rewards}
        self.turns.extra["tokens_a_sample"] = (
            Timed.tokens / Timed.answers if self.samples else Counted.tokens / Counted.pairs
        )
        if self.turns.after_step(done):
            raise Finished


def main(spec: dict[str, Any], turns: Turns) -> None:
    Timed.stop = spec["stop"]
    onpolicy.Sampler = Timed  # type: ignore[misc]
    training.STAGES["preference"] = Counted
    train_by_turns(spec["recipe"], turns, Rounds(turns, spec["samples"], spec["steps"]))


if __name__ == "__main__":
    run(main)
