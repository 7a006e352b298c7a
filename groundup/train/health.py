"""Is it still learning what was meant? Figures of every rollout, some texts, and an end to a run that collapsed.

A policy collapses when it finds a hole in its reward, or when its steps are too large: it says one thing only (entropy
falls to nothing), anything at all (entropy rises), nothing (length 1), or never ends (length at the limit).
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from groundup.config import Recipe, RLConfig
from groundup.data.rows import Prompt
from groundup.dist import World
from groundup.errors import UserError
from groundup.files import write_atomic
from groundup.train.experience import Experience


@dataclass
class Graded:
    """An answer and what it was found to be worth, part by part. judged: whether any reward could tell."""

    experience: Experience
    prompt: Prompt
    text: str
    parts: dict[str, float] = field(default_factory=dict)

    @property
    def judged(self) -> bool:
        return not math.isnan(self.experience.reward)


class Sums:
    """Figures that are means over all ranks: added up here, summed once."""

    def __init__(self) -> None:
        self.sums: dict[str, float] = {}
        self.counts: dict[str, float] = {}

    def add(self, name: str, value: float, count: float = 1.0) -> None:
        self.sums[name] = self.sums.get(name, 0.0) + value
        self.counts[name] = self.counts.get(name, 0.0) + count

    def total(self, world: World) -> Sums:
        """Of all ranks. A name that one of them lacks is 0 there."""
        names = sorted({name for own in world.gather_objects(list(self.sums)) for name in own})
        both = world.sum([x for n in names for x in (self.sums.get(n, 0.0), self.counts.get(n, 0.0))])
        out = Sums()
        out.sums, out.counts = dict(zip(names, both[0::2], strict=True)), dict(zip(names, both[1::2], strict=True))
        return out

    def mean(self, name: str) -> float:
        return self.sums.get(name, 0.0) / max(self.counts.get(name, 0.0), 1.0)


def measure(graded: Sequence[Graded], world: World) -> dict[str, float]:
    """The figures of a rollout, over all ranks: what was said to each prompt the first time it was asked.

    entropy: the mean of -log p of the tokens that were drawn, which estimates it.
    """
    own = Sums()
    groups: dict[int, list[float]] = {}
    for one in graded:
        experience = one.experience
        own.add("completion_length", experience.length)
        own.add("truncated", experience.truncated)
        spoken = experience.columns["spoken"]
        own.add("sampled_entropy", -float((experience.columns["engine"] * spoken).sum()), float(spoken.sum()))
        own.add("unjudged", not one.judged)
        for name, value in one.parts.items():
            if not math.isnan(value):
                own.add(f"reward/{name}", value)
        if one.judged:
            own.add("reward", experience.reward)
            own.add("squares", experience.reward**2)
            groups.setdefault(experience.number, []).append(experience.reward)
    for rewards in groups.values():
        own.add("groups_equal", max(rewards) == min(rewards))
    total = own.total(world)
    count = total.counts.get("reward", 0.0)
    spread = total.sums.get("squares", 0.0) - total.sums.get("reward", 0.0) ** 2 / max(count, 1.0)
    figures = {name: total.mean(name) for name in total.sums if name not in ("squares", "unjudged")}
    figures["reward_std"] = math.sqrt(max(spread, 0.0) / max(count - 1, 1.0))
    figures["unjudged"] = total.mean("unjudged")
    return figures


def check(figures: dict[str, float], config: RLConfig, step: int, recipe: Recipe) -> None:
    """UserError where the policy has collapsed; what was trained since the last checkpoint is not saved."""
    where = f"step {step}"
    if figures["unjudged"] == 1.0:
        why = "no answer of its rollout has a reward: every function gave None or NaN"
        raise UserError(where, why, "mend the reward function, or the column that it reads")
    entropy, length = figures["sampled_entropy"], figures["completion_length"]
    faults = []
    if not (math.isfinite(entropy) and config.entropy_bounds[0] <= entropy <= config.entropy_bounds[1]):
        low, high = config.entropy_bounds
        faults.append((f"its entropy is {entropy:.3g} nats a token", f"rl.entropy_bounds=[{low:g}, {high:g}]"))
    if not config.length_bounds[0] <= length <= config.length_bounds[1]:
        low, high = config.length_bounds
        faults.append((f"its answers are {length:.3g} tokens long", f"rl.length_bounds=[{low:g}, {high:g}]"))
    if not faults:
        return
    why, bounds = faults[0]
    if step == 0:
        raise UserError(where, f"the policy is outside of {bounds} from the start: {why}", "set other bounds")
    kept = f"the checkpoints before it, in {Path(recipe.output) / 'checkpoints'}, are intact"
    fix = "try a lower optim.lr, fewer rl.epochs or a higher rl.beta in another output"
    raise UserError(where, f"the policy has collapsed: {why}, outside of {bounds}; {kept}", fix)


class Samples:
    """samples.jsonl in the run's folder: answers of each round as people read them."""

    def __init__(self, output: str | Path, prompts: int) -> None:
        self.path, self.prompts, self.begun = Path(output) / "samples.jsonl", prompts, False

    def write(self, graded: Sequence[Graded], round: int, step: int) -> None:
        """The answers to the first prompts. Lines of this round or later, from before a kill, are written anew."""
        numbers = sorted({one.experience.number for one in graded})[: self.prompts]
        rows = [_row(one, round, step) for one in graded if one.experience.number in numbers]
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        if not self.begun:
            self.begun = True
            write_atomic(self.path, "".join(self._before(round)) + lines)
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.write(lines)

    def _before(self, round: int) -> list[str]:
        """What earlier lives of the run wrote of the rounds before."""
        kept = []
        for line in self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []:
            try:
                if json.loads(line)["round"] < round:
                    kept.append(line + "\n")
            except (ValueError, KeyError, TypeError):
                continue
        return kept


def _row(one: Graded, round: int, step: int) -> dict[str, Any]:
    reward = one.experience.reward
    return {
        "round": round,
        "step": step,
        "prompt": one.prompt.messages[-1]["content"],
        "answer": one.prompt.answer,
        "completion": one.text,
        "reward": None if math.isnan(reward) else reward,
        "parts": {name: None if math.isnan(value) else value for name, value in one.parts.items()},
        "tokens": one.experience.length,
        "truncated": one.experience.truncated,
    }
