"""What comes after fine-tuning? Reward model, DPO, PPO, GRPO, a smaller student, votes: a row each in the report.

Every stage starts from the fine-tuned model and is held against it on the held-out side of the built-in world: pairs,
questions and sums that no stage has trained on. GRPO starts from a copy that has seen some thoughts, and is held
against that: a policy that is never right has nothing to reinforce. A copy that has seen many votes over sixteen.
"""

from __future__ import annotations

import shutil
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

import torch

from groundup.config import RLConfig, build_recipe
from groundup.data.rows import Prompt
from groundup.eval.budget import Asking, measure
from groundup.eval.questions import QuestionSet, world_reasoning
from groundup.quickstart.settings import (
    COLD_START,
    DISTILL,
    DPO,
    GRPO,
    MAJORITY,
    PPO,
    REWARD,
    STUDENT,
    THOUGHTFUL,
)
from groundup.world import World, write
from groundup.world.rows import Chat, assistant
from groundup.world.style import is_lively

if TYPE_CHECKING:
    from groundup.eval.world import Answerer
    from groundup.quickstart.run import Journal
    from groundup.world.rows import Question

PAIRS, HELD_OUT_PAIRS, PROMPTS = 6000, 600, 4000
THOUGHTS, CHATS = 6000, 0.1  # of the cold start: thoughts, and the share of the conversations between them
ASKED, SUMS = 300, 400  # held-out questions whose sampled answers are compared, about as many sums
TOKENS = 64  # most of an answer
PRACTISED, PRACTICE = ("arithmetic", "story_sums"), 4  # what a small student is slowest to learn, and how often
LANGUAGES = ("zh", "en")
WANTED = {
    "reward": {"accuracy": "at least 0.9"},
    "dpo": {"preferred_rate_gain": "at least 0.3", "world_exact_change": "at least -0.02"},
    "ppo": {"reward_gain_sd": "at least 1", "kl": "under 10 nats a reply"},
    "grpo": {"arithmetic_gain": "at least 0.2", "format_rate": "at least 0.95"},
    "distill": {"accuracy_kept": "at least 0.9", "gain_over_no_teacher": "over 0"},
    "majority": {"gain": "at least 0.05"},
}


@dataclass(frozen=True)
class Start:
    """model: the fine-tuned folder. output: the quickstart's."""

    model: str
    output: Path
    world: World
    seed: int
    share: float = 1.0  # of every training's steps

    @property
    def data(self) -> Path:
        return self.output / "data" / "full"

    @property
    def chats(self) -> str:
        return str(self.output / "data" / "sft.jsonl")

    def file(self, name: str, rows: Iterable[dict[str, Any]]) -> str:
        path = self.data / f"{name}.jsonl"
        if not path.exists():
            self.data.mkdir(parents=True, exist_ok=True)
            part = path.with_suffix(".part")
            write.write_rows(part, rows)
            part.replace(path)
        return str(path)

    def questions(self, split: str) -> list[Question]:
        return [q for language in LANGUAGES for q in self.world.questions(split, language)]

    def train(self, name: str, recipe: dict[str, Any]) -> dict[str, Any]:
        """One stage by a recipe, which is kept in its folder; goes on where it was."""
        from groundup.train.run import train

        own = {"output": str(self.output / name), "cache": str(self.output / "cache"), "seed": self.seed}
        steps = max(2, round(recipe["train"]["steps"] * self.share))
        return train(build_recipe({"model": self.model, **own, **recipe, "train": {**recipe["train"], "steps": steps}}))


def align(steps: Journal, start: Start) -> list[dict[str, Any]]:
    """The rows of the report. A stage that is done is not done again."""
    stages: dict[str, Callable[[Start], dict[str, Any]]] = {
        "reward": reward, "dpo": dpo, "ppo": ppo, "grpo": grpo, "distill": distill, "majority": majority,
    }  # fmt: skip
    return [steps.step(name, lambda work=work: _timed(work, start)) for name, work in stages.items()]  # type: ignore[misc]


def _timed(work: Callable[[Start], dict[str, Any]], start: Start) -> dict[str, Any]:
    began = time.perf_counter()
    row = work(start)
    return {**row, "seconds": round(time.perf_counter() - began, 1), "wanted": WANTED[row["name"]]}


def reward(start: Start) -> dict[str, Any]:
    """Which of two answers would people like? Held-out pairs, beside the rule that the longer one wins."""
    pairs = start.file("pairs", map(write.preference_row, start.world.preferences(PAIRS, start.seed)))
    held = start.file(
        "pairs-heldout",
        map(write.preference_row, start.world.preferences(HELD_OUT_PAIRS, start.seed, split="heldout")),
    )
    result = start.train("reward", {"stage": "reward", "data": [pairs], **REWARD, "eval": {"data": [held]}})
    keys = ("accuracy", "longer_baseline", "calibration_error")
    return _row("reward", result, {key: result["metrics"][key] for key in keys})


def dpo(start: Start) -> dict[str, Any]:
    """How often are answers in the preferred style, and are they as right as before?"""
    pairs = start.file("pairs", map(write.preference_row, start.world.preferences(PAIRS, start.seed)))
    result = start.train("dpo", {"stage": "preference", "data": [pairs], **DPO})
    questions = start.questions("heldout")
    before, after = (_lively_and_right(folder, questions) for folder in (start.model, result["output"]))
    metrics = {
        "preferred_rate_gain": after[0] - before[0],
        "world_exact_change": after[1] - before[1],
        "preferred_rate": after[0],
        "world_exact": after[1],
    }
    return _row("dpo", result, metrics)


def ppo(start: Start) -> dict[str, Any]:
    """By how many standard deviations does the reward model like its answers better, and how far has it gone?"""
    prompts = start.file("prompts", map(write.question_row, _shuffled(start.questions("train"), start.seed)[:PROMPTS]))
    judge = str(start.output / "reward")
    rewards = [{"name": "reward_model", "args": {"path": judge}}]
    result = start.train("ppo", {"stage": "ppo", "data": [prompts], **PPO, "rl": PPO["rl"] | {"rewards": rewards}})
    asked = _shuffled(start.questions("heldout"), start.seed)[:ASKED]
    before, _ = sampled_scores(start.model, asked, judge, start.seed)
    after, kl = sampled_scores(result["output"], asked, judge, start.seed, reference=start.model)
    gain = statistics.mean(after) - statistics.mean(before)
    metrics = {"reward_gain_sd": gain / statistics.stdev(before), "kl": kl, "reward": statistics.mean(after)}
    return _row("ppo", result, metrics)


def thinking(start: Start, name: str, recipe: dict[str, Any]) -> str:
    """The folder of the fine-tuned model after thoughts, among conversations so that it forgets nothing."""
    sums = (p for p in start.world.reasoning_prompts("train", seed=start.seed + 1) if p.kind == "three_numbers")
    thoughts = start.file("thoughts", map(write.thought_row, islice(sums, THOUGHTS)))
    data = [{"path": thoughts}, {"path": start.chats, "weight": CHATS}]
    output: str = start.train(name, {"stage": "sft", "data": data, **recipe})["output"]
    return output


def grpo(start: Start) -> dict[str, Any]:
    """Sums of three numbers, thought through: how many more are right, and do they come after a thought?"""
    begun = thinking(start, "cold-start", COLD_START)
    sums = (p for p in start.world.reasoning_prompts("train", seed=start.seed) if p.kind == "three_numbers")
    prompts = start.file("sums", map(write.question_row, islice(sums, PROMPTS)))
    result = start.train("grpo", {"stage": "grpo", "model": begun, "data": [prompts], **GRPO})
    asking = Asking(max_tokens=TOKENS)
    before, after = (measure(_engine(folder), _sums(start), asking) for folder in (begun, result["output"]))
    metrics = {
        "arithmetic_gain": after["accuracy"] - before["accuracy"],
        "format_rate": after["thinks"],
        "arithmetic": after["accuracy"],
    }
    return _row("grpo", result, metrics)


def distill(start: Start) -> dict[str, Any]:
    """A student of a quarter of the parameters, cut out of its teacher: taught by it, and left to the data alone."""
    from groundup.train.cut import cut_folder

    student = start.output / "student"
    if not student.exists():  # it is cut beside its place, and renamed when it is whole
        part = student.with_name("student.part")
        shutil.rmtree(part, ignore_errors=True)
        cut_folder(start.model, part, [start.chats], **STUDENT, seed=start.seed)
        part.rename(student)
    questions = [q for q in start.questions("train") if q.kind in PRACTISED]
    practice = start.file("practice", (write.chat_row(Chat([*q.messages, assistant(q.answer)])) for q in questions))
    common = {"model": str(student), "data": [start.chats, {"path": practice, "weight": PRACTICE}], **DISTILL}
    taught = start.train("distill", {"stage": "distill", **common, "distill": {"teacher": start.model, "alpha": 0.1}})
    alone = start.train("distill-alone", {"stage": "sft", **common})
    held = start.questions("heldout")
    teacher, with_teacher, without = (
        _lively_and_right(folder, held)[1] for folder in (start.model, taught["output"], alone["output"])
    )
    metrics = {
        "accuracy_kept": with_teacher / max(teacher, 1e-9),
        "gain_over_no_teacher": with_teacher - without,
        "accuracy": with_teacher,
    }
    return _row("distill", taught, metrics)


def majority(start: Start) -> dict[str, Any]:
    """Sixteen thoughts and a vote, against one greedy answer, of a model that has seen many thoughts."""
    model = thinking(start, "thoughtful", THOUGHTFUL)
    found = measure(_engine(model), _sums(start), Asking(strategy="majority", **MAJORITY))
    metrics = {"gain": found["gain"]["gain"], "greedy": found["accuracy"], "voted": found["curve"][-1]["accuracy"]}
    return {"name": "majority", "metrics": metrics}


def _row(name: str, result: dict[str, Any], metrics: dict[str, Any]) -> dict[str, Any]:
    own = {key: result[key] for key in ("tokens", "steps", "parameters")}
    return {"name": name, **own, "training_seconds": result["seconds"], "metrics": metrics}


def _shuffled(questions: Sequence[Question], seed: int) -> list[Question]:
    return Random(f"full/{seed}").sample(list(questions), len(questions))


def _opened(folder: str) -> tuple[Any, Any]:
    from groundup.device import pick_device
    from groundup.model.io import load_model
    from groundup.tokenizer import load_tokenizer

    return load_model(folder, device=pick_device()), load_tokenizer(folder)


def _engine(folder: str) -> Any:
    from groundup.infer.engine import Engine

    return Engine(*_opened(folder))


def _lively_and_right(folder: str, questions: Sequence[Question]) -> tuple[float, float]:
    """Shares of the greedy answers that are in the preferred style, and that are right."""
    from groundup.eval.run import answerer
    from groundup.eval.world import grade

    answer: Answerer = answerer(*_opened(folder))
    replies = answer([question.messages for question in questions])
    right = [grade(question, reply) for question, reply in zip(questions, replies, strict=True)]
    return sum(map(is_lively, replies)) / len(replies), sum(right) / len(right)


def _sums(start: Start) -> QuestionSet:
    """Held-out sums of three numbers."""
    found = world_reasoning(start.world, count=2 * SUMS)
    return replace(found, items=[item for item in found.items if item.kind == "three_numbers"])


def sampled_scores(
    folder: str, questions: Sequence[Question], judge: str, seed: int, reference: str | None = None
) -> tuple[list[float], float]:
    """(the reward model's score of one answer to each question, drawn at temperature 1; mean over the answers of the
    sum of log pi - log reference over their tokens, which estimates KL(pi || reference) in nats a reply)."""
    from groundup.infer.scoring import Scorer
    from groundup.train.rollout import Sampler

    model, tokenizer = _opened(folder)
    sampler = Sampler(model, tokenizer, RLConfig(group_size=1, max_tokens=TOKENS), seed)
    answers = sampler.sample([Prompt(question.messages) for question in questions], round=0)
    scores = Scorer(judge).score(
        [[*q.messages, {"role": "assistant", "content": a.text}] for q, a in zip(questions, answers, strict=True)]
    )
    if reference is None:
        return scores, 0.0
    models = (model, _opened(reference)[0])
    gone = [_logprob(models[0], a.prompt_ids, a.ids) - _logprob(models[1], a.prompt_ids, a.ids) for a in answers]
    return scores, statistics.mean(gone)


@torch.no_grad()
def _logprob(model: Any, prompt: list[int], answer: list[int]) -> float:
    """log p(answer | prompt)."""
    from groundup.ops.loss import selective_logprobs

    ids_1T = torch.tensor([prompt + answer], device=model.head_weight.device)
    hidden_1TD = model.hidden(ids_1T[:, :-1])[:, len(prompt) - 1 :]
    return float(selective_logprobs(hidden_1TD, model.head_weight, ids_1T[:, len(prompt) :]).sum())
