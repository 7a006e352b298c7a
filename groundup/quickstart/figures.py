"""How good is a model on the world's held-out side? Greedy answers, sampled answers and their scores, sums."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from groundup.eval.questions import QuestionSet, world_reasoning
from groundup.world.style import is_lively

if TYPE_CHECKING:
    from groundup.infer.engine import Engine
    from groundup.world import World
    from groundup.world.rows import Question

SUMS = 400


@dataclass(frozen=True)
class Marks:
    """Of answers: 1 for right, 1 for the style that the world's people prefer."""

    right: list[float]
    style: list[float]

    @property
    def accuracy(self) -> float:
        return statistics.mean(self.right)

    @property
    def preferred(self) -> float:
        return statistics.mean(self.style)


def opened(folder: str) -> tuple[Any, Any]:
    """(model, tokenizer)."""
    from groundup.device import pick_device
    from groundup.model.io import load_model
    from groundup.tokenizer import load_tokenizer

    return load_model(folder, device=pick_device()), load_tokenizer(folder)


def engine(folder: str) -> Engine:
    from groundup.infer.engine import Engine

    return Engine(*opened(folder))


def lively_and_right(folder: str, questions: Sequence[Question]) -> Marks:
    """Of greedy answers."""
    from groundup.eval.run import answerer
    from groundup.eval.world import grade

    replies = answerer(*opened(folder))([question.messages for question in questions])
    right = [float(grade(question, reply)) for question, reply in zip(questions, replies, strict=True)]
    return Marks(right, [float(is_lively(reply)) for reply in replies])


def sums(world: World, split: str = "heldout", count: int = SUMS) -> QuestionSet:
    """Sums of three numbers, to be thought through, each once."""
    found = world_reasoning(world, split, count=8 * count)
    items = {item.messages[-1]["content"]: item for item in found.items if item.kind == "three_numbers"}
    return replace(found, items=list(items.values())[:count])


def sampled_scores(
    folder: str,
    questions: Sequence[Question],
    judge: str,
    max_tokens: int,
    seed: int,
    reference: str | None = None,
) -> tuple[list[float], float]:
    """(the reward model's score of one answer to each question, drawn at temperature 1; mean over the answers of the
    sum of log pi - log reference over their tokens, which estimates KL(pi || reference) in nats a reply).
    """
    from groundup.config import RLConfig
    from groundup.data.rows import Prompt
    from groundup.rewards.model import RewardModel
    from groundup.train.rollout import Sampler

    sampler = Sampler(*opened(folder), RLConfig(group_size=1, max_tokens=max_tokens), seed)
    answers = sampler.sample([Prompt(question.messages) for question in questions], round=0)
    given = RewardModel(judge)([question.messages for question in questions], [a.text for a in answers])
    scores = [score for score in given if score is not None]
    if reference is None:
        return scores, 0.0
    start, _ = opened(reference)
    return scores, statistics.mean(sum(a.logprobs) - _logprob(start, a.prompt_ids, a.ids) for a in answers)


@torch.no_grad()
def _logprob(model: Any, prompt: list[int], answer: list[int]) -> float:
    """log p(answer | prompt)."""
    from groundup.ops.loss import selective_logprobs

    ids_1T = torch.tensor([prompt + answer], device=model.head_weight.device)
    hidden_1TD = model.hidden(ids_1T[:, :-1])[:, len(prompt) - 1 :]
    return float(selective_logprobs(hidden_1TD, model.head_weight, ids_1T[:, len(prompt) :]).sum())
