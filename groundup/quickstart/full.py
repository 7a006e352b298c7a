"""What comes after fine-tuning? Reward model, DPO, PPO, GRPO, a smaller student, votes: a row each in the report.

Every stage starts from the fine-tuned model and is held against it on the held-out side of the built-in world: pairs,
questions and sums that no stage is asked in training. GRPO starts from a copy that has seen some thoughts, and is held
against that: a policy that is never right has nothing to reinforce. A copy that has seen many votes over sixteen.
"""

from __future__ import annotations

import shutil
import statistics
import time
from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

from groundup.config import build_recipe
from groundup.eval.budget import Asking, gain, measure
from groundup.eval.questions import LANGUAGES
from groundup.quickstart import settings as use
from groundup.quickstart.figures import Marks, engine, lively_and_right, sampled_scores, sums
from groundup.world import World, write
from groundup.world.rows import Chat, assistant

if TYPE_CHECKING:
    from groundup.world.rows import Question, ReasoningPrompt

PAIRS, HELD_OUT_PAIRS, PROMPTS = 6000, 600, 4000
THOUGHTS = 6000  # shown before GRPO and before a vote, among a share of the conversations:
COLD_CHATS, VOTE_CHATS = 0.3, 0.1  # more of them leave GRPO more to find; a vote wants thoughts that hold together
DOSES, ENOUGH, LOOK = 6, 0.5, 200  # of the cold start: most of them, the accuracy at which it ends, sums asked for it
RIGHT = 2.0  # what a right answer is worth to PPO beside the reward model's score, which asks for style alone
ASKED = 300  # held-out questions whose sampled answers PPO's reward model compares
PRACTISED, PRACTICE = ("arithmetic", "story_sums"), 4  # what a small student is slowest to learn, and how often


class Tuned:
    """The fine-tuned model, and what the stages after it share.

    model: its folder. output: the quickstart's. share: of every training's steps.
    """

    def __init__(self, model: str, output: Path, world: World, seed: int, share: float = 1.0) -> None:
        self.model, self.output, self.world, self.seed, self.share = model, output, world, seed, share
        self.chats = str(output / "data" / "sft.jsonl")
        self.held = [q for language in LANGUAGES for q in world.questions("heldout", language)]
        self.asked = [q for language in LANGUAGES for q in world.questions("train", language)]
        self.before = 0.0  # seconds that trainings took in earlier processes
        self._marks: dict[str, Marks] = {}

    def file(self, name: str, rows: Iterable[dict[str, Any]]) -> str:
        """Rows for one stage's training, written once."""
        path = self.output / "data" / "full" / f"{name}.jsonl"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            write.write_rows(path, rows)
        return str(path)

    def pairs(self) -> str:
        return self.file("pairs", map(write.preference_row, self.world.preferences(PAIRS, self.seed)))

    def sums(self, seed: int) -> Iterable[ReasoningPrompt]:
        """Sums of three numbers to learn from, without end."""
        return (p for p in self.world.reasoning_prompts("train", seed=seed) if p.kind == "three_numbers")

    def train(self, name: str, recipe: dict[str, Any]) -> dict[str, Any]:
        """One training by a recipe, which is kept in its folder; goes on where it was."""
        from groundup.train.run import train

        own = {"output": str(self.output / name), "cache": str(self.output / "cache"), "seed": self.seed}
        steps = max(2, round(recipe["train"]["steps"] * self.share))
        began = time.perf_counter()
        result = train(
            build_recipe({"model": self.model, **own, **recipe, "train": {**recipe["train"], "steps": steps}})
        )
        self.before += max(0.0, result["seconds"] - (time.perf_counter() - began))
        return result

    def marks(self, folder: str) -> Marks:
        """Of greedy answers to the held-out questions; asked once."""
        if folder not in self._marks:
            self._marks[folder] = lively_and_right(folder, self.held)
        return self._marks[folder]

    def change(self, folder: str) -> float:
        """How many more of the held-out questions are right than before."""
        return self.marks(folder).accuracy - self.marks(self.model).accuracy


def reward(tuned: Tuned) -> dict[str, Any]:
    """Which of two answers would people like? Held-out pairs, beside the rule that the longer one wins."""
    held = tuned.world.preferences(HELD_OUT_PAIRS, tuned.seed, split="heldout")
    data = {"data": [tuned.pairs()], "eval": {"data": [tuned.file("pairs-heldout", map(write.preference_row, held))]}}
    result = tuned.train("reward", {"stage": "reward", **data, **use.REWARD})
    keys = ("accuracy", "longer_baseline", "calibration_error")
    return _row(result, {key: result["metrics"][key] for key in keys})


def dpo(tuned: Tuned) -> dict[str, Any]:
    """How often are answers in the preferred style, and are they as right as before?"""
    result = tuned.train("dpo", {"stage": "preference", "data": [tuned.pairs()], **use.DPO})
    before, after = tuned.marks(tuned.model), tuned.marks(result["output"])
    metrics = {
        "preferred_rate_gain": after.preferred - before.preferred,
        "world_exact_change": tuned.change(result["output"]),
        "preferred_rate": after.preferred,
    }
    return _row(result, metrics)


def ppo(tuned: Tuned) -> dict[str, Any]:
    """By how many standard deviations does the reward model like its answers better, and how far has it gone?

    Of one answer, drawn at temperature 1, to each held-out question; the deviation is that of the first model's scores.
    """
    order = Random(f"ppo/{tuned.seed}")
    asked: list[Question] = order.sample(tuned.asked, min(PROMPTS, len(tuned.asked)))
    prompts = tuned.file("prompts", map(write.question_row, asked))
    judge = str(tuned.output / "reward")
    rewards = [{"name": "reward_model", "args": {"path": judge}}, {"name": "exact", "weight": RIGHT}]
    rl = use.PPO["rl"] | {"rewards": rewards}
    result = tuned.train("ppo", {"stage": "ppo", "data": [prompts], **use.PPO, "rl": rl})
    held = order.sample(tuned.held, min(ASKED, len(tuned.held)))
    before, _ = sampled_scores(tuned.model, held, judge, rl["max_tokens"], tuned.seed)
    after, kl = sampled_scores(result["output"], held, judge, rl["max_tokens"], tuned.seed, tuned.model)
    raised = statistics.mean(after) - statistics.mean(before)
    metrics = {
        "reward_gain_sd": raised / max(statistics.stdev(before), 1e-9),
        "kl": kl,
        "reward": statistics.mean(after),
        "world_exact_change": tuned.change(result["output"]),
    }
    return _row(result, metrics)


def thinking(tuned: Tuned, name: str, model: str, recipe: dict[str, Any], chats: float) -> str:
    """The folder of the model after thoughts, among a share of the conversations so that it forgets less."""
    thoughts = tuned.file("thoughts", map(write.thought_row, islice(tuned.sums(tuned.seed + 1), THOUGHTS)))
    data = [{"path": thoughts}, {"path": tuned.chats, "weight": chats}]
    output: str = tuned.train(name, {"stage": "sft", "model": model, "data": data, **recipe})["output"]
    return output


def cold_start(tuned: Tuned) -> str:
    """As few thoughts as it takes until GRPO's own prompts are answered well enough to learn from; a dose at a time."""
    asking, model = Asking(max_tokens=use.GRPO["rl"]["max_tokens"]), tuned.model
    for dose in range(1, DOSES + 1):
        model = thinking(tuned, f"cold-start/{dose}", model, use.COLD_START, COLD_CHATS)
        if measure(engine(model), sums(tuned.world, "train", LOOK), asking)["accuracy"] >= ENOUGH:
            break
    return model


def grpo(tuned: Tuned) -> dict[str, Any]:
    """Sums of three numbers, thought through: how many more are right, and do they come after a thought?"""
    begun = cold_start(tuned)
    prompts = tuned.file("sums", map(write.question_row, islice(tuned.sums(tuned.seed), PROMPTS)))
    result = tuned.train("grpo", {"stage": "grpo", "model": begun, "data": [prompts], **use.GRPO})
    asking = Asking(max_tokens=use.GRPO["rl"]["max_tokens"])
    before, after = (measure(engine(folder), sums(tuned.world), asking) for folder in (begun, result["output"]))
    metrics = {
        "arithmetic_gain": after["accuracy"] - before["accuracy"],
        "arithmetic_before": before["accuracy"],
        "format_rate": after["thinks"],
        "format_before": before["thinks"],
        "world_exact_change": tuned.change(result["output"]),
    }
    return _row(result, metrics)


def distill(tuned: Tuned) -> dict[str, Any]:
    """A student of a quarter of the parameters, cut out of its teacher: taught by it, and left to the data alone."""
    from groundup.train.cut import cut_folder

    student = tuned.output / "student"
    if not student.exists():  # it is cut beside its place, and renamed when it is whole
        part = student.with_name("student.part")
        shutil.rmtree(part, ignore_errors=True)
        shape = use.student(tuned.model)
        width, heads, neurons = (shape[name] for name in ("width", "heads", "intermediate"))
        cut_folder(tuned.model, part, [tuned.chats], width=width, heads=heads, intermediate=neurons, seed=tuned.seed)
        part.rename(student)
    rows = (Chat([*q.messages, assistant(q.answer)]) for q in tuned.asked if q.kind in PRACTISED)
    practice = tuned.file("practice", map(write.chat_row, rows))
    common = {"model": str(student), "data": [tuned.chats, {"path": practice, "weight": PRACTICE}], **use.DISTILL}
    taught = tuned.train("distill", {"stage": "distill", **common, "distill": {"teacher": tuned.model, "alpha": 0.5}})
    alone = tuned.train("distill-alone", {"stage": "sft", **common})
    with_teacher, without = tuned.marks(taught["output"]), tuned.marks(alone["output"])
    better = gain(with_teacher.right, without.right)
    metrics = {
        "accuracy_kept": with_teacher.accuracy / max(tuned.marks(tuned.model).accuracy, 1e-9),
        "accuracy": with_teacher.accuracy,
        "gain_over_no_teacher": better["gain"],
        "gain_at_least": better["low"],
    }
    return _row(taught, metrics)


def majority(tuned: Tuned) -> dict[str, Any]:
    """Sixteen thoughts and a vote, against one greedy answer, of a model that has seen many thoughts."""
    model = thinking(tuned, "thoughtful", tuned.model, use.THOUGHTFUL, VOTE_CHATS)
    found = measure(engine(model), sums(tuned.world), Asking(strategy="majority", **use.MAJORITY))
    metrics = {
        "gain": found["gain"]["gain"],
        "gain_at_least": found["gain"]["low"],
        "greedy": found["accuracy"],
        "voted": found["curve"][-1]["accuracy"],
    }
    return {"metrics": metrics}


STAGES: dict[str, Callable[[Tuned], dict[str, Any]]] = {
    "reward": reward, "dpo": dpo, "ppo": ppo, "grpo": grpo, "distill": distill, "majority": majority,
}  # fmt: skip


def row(name: str, tuned: Tuned) -> dict[str, Any]:
    """A stage's row of the report. seconds: all its trainings and measurements, those of earlier processes too."""
    tuned.before, began = 0.0, time.perf_counter()
    found = {"name": name, **STAGES[name](tuned)}
    return {**found, "seconds": round(tuned.before + time.perf_counter() - began, 1), "wanted": use.WANTED[name]}


def _row(result: dict[str, Any], metrics: dict[str, Any]) -> dict[str, Any]:
    return {**{key: result[key] for key in ("tokens", "steps", "parameters")}, "metrics": metrics}
