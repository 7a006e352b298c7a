"""What do prompts give? Answers with their rewards, and other prompts where all answers to one are worth the same.

Nothing is learnt here: all of a round is answered and graded before its first optimizer step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from groundup.config import Recipe
from groundup.data.mix import permutation
from groundup.data.rows import Prompt
from groundup.dist import World
from groundup.objectives.advantages import overlong_penalty
from groundup.rewards.build import build_rewards
from groundup.tokenizer import Tokenizer
from groundup.train.experience import Experience
from groundup.train.health import Graded, Sums
from groundup.train.prompts import Prompts, Stream, columns_of
from groundup.train.rollout import Answer, Sampler

PROMPTS, HELD_OUT = 11, 13  # so that one seed makes unrelated choices


class Grader:
    """The rewards and penalties of a recipe. scale: count, sum and sum of squares of all rewards so far."""

    def __init__(self, prompts: Prompts, recipe: Recipe, world: World, tokenizer: Tokenizer) -> None:
        self.prompts, self.recipe, self.rl, self.world = prompts, recipe, recipe.rl.at(recipe.stage), world
        self.rewards = build_rewards(self.rl.rewards, seconds=self.rl.reward_seconds, tokenizer=tokenizer)
        self.rewards.check(columns_of([*prompts.train, *prompts.val]))
        self.scale = torch.zeros(3, dtype=torch.float64)

    def collect(self, sampler: Sampler, round: int) -> tuple[list[Graded], list[Graded]]:
        """This rank's graded answers of the round, and those of each prompt's first asking.

        Prompts whose answers are all worth the same give way to others, `dynamic_sampling` times (DAPO, arXiv
        2503.14476, section 3.2). What comes in a prompt's place depends on its number, so no rank asks another.
        """
        world, size = self.world, self.rl.prompts
        kept: dict[int, list[Graded]] = {}
        first: list[Graded] = []
        waiting = list(range(world.rank, size, world.size))
        for attempt in range(1 + self.rl.dynamic_sampling):
            stream = Stream(len(self.prompts.train), self.recipe.seed, PROMPTS + (attempt << 8))
            places = stream.at([round * size + number for number in waiting])
            prompts = [self.prompts.train[place] for place in places]
            answers = sampler.sample(prompts, round, [number + attempt * size for number in waiting])
            graded = self.grade(prompts, answers, waiting)
            first = first or graded
            kept |= {number: [one for one in graded if one.experience.number == number] for number in waiting}
            waiting = [number for number in waiting if _equal(kept[number])]
            if not waiting:
                break
        return [one for number in sorted(kept) for one in kept[number]], first

    def held_out(self, sampler: Sampler) -> dict[str, float]:
        """Greedy answers to the same `eval_rows` held-out prompts each time: mean reward and its parts."""
        val, world = self.prompts.val, self.world
        if not val:
            return {}
        chosen = permutation(len(val), self.recipe.seed, HELD_OUT)[: self.recipe.train.eval_rows]
        chosen = chosen[world.rank :: world.size]
        prompts = [val[i] for i in chosen]
        graded = self.grade(prompts, sampler.sample(prompts, 0, n=1, temperature=0.0), chosen.tolist())
        sums = Sums()
        for one in graded:
            if one.judged:
                sums.add("val_reward", one.experience.reward)
            for name, value in one.parts.items():
                if not math.isnan(value):
                    sums.add(f"val_reward/{name}", value)
            sums.add("val_length", one.experience.length)
            sums.add("val_truncated", one.experience.truncated)
        total = sums.total(world)
        figures = {name: total.mean(name) for name in total.sums}
        return {"val_loss": -figures.get("val_reward", 0.0), **figures}

    def grade(self, prompts: Sequence[Prompt], answers: Sequence[Answer], numbers: Sequence[int]) -> list[Graded]:
        """Answers with their rewards, their penalties among them."""
        asked = [prompts[answer.prompt] for answer in answers]
        texts = [answer.text for answer in answers]
        told = columns_of(asked) | {"completion_ids": [answer.ids for answer in answers]}
        totals, parts = self.rewards([prompt.messages for prompt in asked], texts, told)
        graded = []
        for i, (answer, prompt) in enumerate(zip(answers, asked, strict=True)):
            reward, each = float(totals[i]), {name: float(values[i]) for name, values in parts.items()}
            for name, value in self._penalties(answer).items():
                reward, each[name] = reward + value, value
            spoken = torch.tensor(answer.mask, dtype=torch.float32)
            left_out = math.isnan(reward) or (answer.truncated and self.rl.mask_truncated_completions)
            columns = {"mask": spoken * (not left_out), "engine": torch.tensor(answer.logprobs), "spoken": spoken}
            ids, start = answer.prompt_ids + answer.ids, len(answer.prompt_ids)
            experience = Experience(numbers[answer.prompt], ids, start, answer.truncated, reward, columns)
            graded.append(Graded(experience, prompt, answer.text, each))
        return graded

    def _penalties(self, answer: Answer) -> dict[str, float]:
        found = {}
        if self.rl.overlong_buffer:
            length = torch.tensor([len(answer.ids)])
            found["overlong"] = float(overlong_penalty(length, self.rl.max_tokens, self.rl.overlong_buffer))
        if self.rl.missing_eos_penalty:
            found["missing_eos"] = -self.rl.missing_eos_penalty * answer.truncated
        return found

    def scaled(self, experiences: Sequence[Experience]) -> Tensor:
        """Rewards as they are learnt from: over their deviation so far, and clipped, where the recipe says so."""
        rewards_N = torch.tensor([one.reward for one in experiences], dtype=torch.float64)
        if self.rl.reward_norm:
            own = rewards_N[~rewards_N.isnan()]
            self.scale += torch.tensor(self.world.sum([len(own), float(own.sum()), float(own.square().sum())]))
            count, total, squares = self.scale.tolist()
            deviation = math.sqrt(max(squares - total**2 / max(count, 1.0), 0.0) / max(count - 1, 1.0))
            rewards_N = rewards_N / (deviation + 1e-8) if deviation > 0 else rewards_N
        return rewards_N.clamp(-self.rl.reward_clip, self.rl.reward_clip) if self.rl.reward_clip else rewards_N


def _equal(group: Sequence[Graded]) -> bool:
    """Whether nothing can be learnt from these answers."""
    rewards = [one.experience.reward for one in group if one.judged]
    return not rewards or max(rewards) == min(rewards)
