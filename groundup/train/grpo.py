"""What if the other answers to the same prompt say what was to be expected? GRPO and its relatives: no value model.

| rl.loss | advantage of an answer | mean of the loss over | paper (arXiv) |
|---|---|---|---|
| grpo | (r - mean) / std of its group | each answer's tokens, then answers | 2402.03300 |
| dr_grpo | r - mean | answers, of their sums / max_tokens | 2503.20783 |
| dapo | as grpo, clipped higher above | all tokens | 2503.14476 |
| gspo | as grpo, the ratio of the whole answer | answers | 2507.18071 |
| cispo | as grpo, ratios only weigh | all tokens | 2506.13585 |
| rloo | r - mean of the others | all tokens | 2402.14740 |
| reinforce++ | r - KL to come, whitened over the round | all tokens | 2501.03262 |
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from groundup.config import Recipe, RLConfig
from groundup.dist import World
from groundup.errors import UserError
from groundup.objectives.advantages import gae_packed, group_advantages, leave_one_out, token_rewards, whiten
from groundup.objectives.policy import PolicyKind, kl
from groundup.tokenizer import Tokenizer
from groundup.train.experience import Experience, stacked, unstack
from groundup.train.onpolicy import OnPolicy
from groundup.train.prompts import Prompts
from groundup.train.stage import Place

KIND: dict[str, PolicyKind] = {
    "grpo": "grpo", "dr_grpo": "dr_grpo", "dapo": "dapo", "gspo": "gspo", "cispo": "cispo", "rloo": "ppo",
    "reinforce++": "ppo",
}  # fmt: skip


class GRPO(OnPolicy):
    """Policy gradients whose baseline is the group."""

    unread = (
        "gamma", "lam", "whiten_rewards", "value_model", "value_coef", "value_clip", "value_lr_ratio", "ptx_data",
        "ptx_kind", "ptx_rows", "ptx_weight",
    )  # fmt: skip

    def __init__(self, data: Prompts, recipe: Recipe, place: Place, tokenizer: Tokenizer) -> None:
        super().__init__(data, recipe, place, tokenizer)
        self.kind = KIND[self.rl.loss]

    @classmethod
    def check(cls, recipe: Recipe, rl: RLConfig) -> None:
        super().check(recipe, rl)
        if rl.group_size == 1 and rl.loss != "reinforce++":
            why = f"a single answer has no others to be better than, and {rl.loss} compares them"
            raise UserError("rl.group_size", why, "use 2 or more, usually 8; or rl.loss=reinforce++")
        if rl.dynamic_sampling and rl.group_size == 1:
            raise UserError("rl.dynamic_sampling", "single answers are all alike", "use rl.group_size=8")

    def judge(self, experiences: list[Experience]) -> dict[str, float]:
        self.measure_logprobs(experiences, old=self.updates > 1)
        told = self.kl_of(experiences)
        rewards_N = self.grader.scaled(experiences)
        numbers_N = torch.tensor([one.number for one in experiences], dtype=torch.int64)
        if self.rl.loss == "reinforce++":
            self._reinforce(experiences, rewards_N, numbers_N)
            return told
        for i, one in enumerate(experiences):
            rewards_N[i] -= float((self._kl_costs(one) * one.columns["mask"]).sum())
        advantages_N = over_all(self._advantages, rewards_N, numbers_N, self.place.world)
        for one, advantage in zip(experiences, advantages_N.tolist(), strict=True):
            one.columns["advantages"] = advantage * one.columns["mask"]
        return told

    def _advantages(self, rewards_N: Tensor, numbers_N: Tensor) -> Tensor:
        if self.rl.loss == "rloo":
            return leave_one_out(rewards_N, numbers_N)
        scale: Literal["group", "batch", "none"] = "group"
        if self.rl.scale_rewards != "auto":
            scale = self.rl.scale_rewards
        elif self.rl.loss == "dr_grpo":
            scale = "none"
        return group_advantages(rewards_N, numbers_N, scale, self.rl.advantage_eps)

    def _kl_costs(self, one: Experience) -> Tensor:
        """What each token's distance from the reference takes off the reward, where it goes there."""
        if self.reference is None or self.rl.kl_in != "reward":
            return torch.zeros_like(one.columns["engine"])
        own = one.columns.get("old", one.columns["engine"])
        return self.beta * kl(own, one.columns["reference"], self.rl.kl_kind or "k1")

    def _reinforce(self, experiences: list[Experience], rewards_N: Tensor, numbers_N: Tensor) -> None:
        """Rewards to come, less the KL to come; of several answers to a prompt, less their mean first."""
        if self.rl.group_size != 1:
            rewards_N = group_advantages(rewards_N, numbers_N, "none")
        mask_NL = stacked(experiences, "mask")
        for one in experiences:
            one.columns["costs"] = self._kl_costs(one)
        documents_NL = torch.zeros_like(mask_NL, dtype=torch.int32)
        costs_NL, scores_N = stacked(experiences, "costs"), rewards_N.nan_to_num(0.0).float()
        rewards_NL = token_rewards(scores_N, costs_NL, documents_NL, mask_NL)
        advantages_NL, _ = gae_packed(rewards_NL, torch.zeros_like(mask_NL), documents_NL, mask_NL, 1.0, 1.0)
        if self.rl.whiten_advantages:
            advantages_NL = whiten(advantages_NL, mask_NL, sums=self.place.world.sum)
        unstack(advantages_NL, experiences, "advantages")


def over_all(compute: Callable[[Tensor, Tensor], Tensor], rewards_N: Tensor, numbers_N: Tensor, world: World) -> Tensor:
    """compute(rewards, numbers) over the answers of all ranks, in the order of the numbers; this rank's part of it."""
    own = list(zip(numbers_N.tolist(), rewards_N.tolist(), strict=True))
    parts = world.gather_objects(own)
    every = sorted((number, rank, i, r) for rank, part in enumerate(parts) for i, (number, r) in enumerate(part))
    numbers, ranks, places, rewards = zip(*every, strict=True)
    found = compute(torch.tensor(rewards, dtype=torch.float64), torch.tensor(numbers))
    mine = {i: at for at, (rank, i) in enumerate(zip(ranks, places, strict=True)) if rank == world.rank}
    return found[[mine[i] for i in range(len(own))]]
