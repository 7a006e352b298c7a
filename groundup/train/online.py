"""Online DPO (arXiv 2402.04792): the policy answers, rewards judge, a prompt's best and worst answer are a pair.

Rounds, samples and checkpoints are those of all on-policy stages (onpolicy.py); losses and reference are those of
preference on files (preference.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from groundup.config import Recipe, RLConfig
from groundup.data.documents import Document, pack_documents
from groundup.errors import UserError
from groundup.objectives.documents import Documents
from groundup.tokenizer import Tokenizer
from groundup.train.experience import Experience
from groundup.train.health import Sums
from groundup.train.onpolicy import OnPolicy
from groundup.train.preference import (
    Judged,
    answers_of,
    check,
    judge_pairs,
    keep_reference,
    names_of,
    reference_logps,
)
from groundup.train.prompts import Prompts, open_prompts
from groundup.train.stage import Place
from groundup.train.start import Start

Pair = tuple[Experience, Experience]  # the better answer first
READ = (
    "prompts", "group_size", "max_tokens", "temperature", "top_p", "top_k", "enable_thinking", "max_sequences",
    "dynamic_sampling", "rewards", "reward_seconds", "overlong_buffer", "mask_truncated_completions",
    "missing_eos_penalty", "epochs", "minibatches", "entropy_bounds", "length_bounds", "samples",
)  # fmt: skip


@dataclass
class Compared(Judged):
    """Rows of pairs of one round. least: added to the count where no prompt of the whole step gave a pair."""

    least: int = 0
    round: int = 0


class Online(OnPolicy):
    """The loss's count is that of the pairs."""

    unread = tuple(name for name in RLConfig.model_fields if name not in READ)

    def __init__(self, data: Prompts, recipe: Recipe, place: Place, tokenizer: Tokenizer) -> None:
        super().__init__(data, recipe, place, tokenizer)
        self.preference, self.names = recipe.preference, names_of(recipe.preference)

    @classmethod
    def check(cls, recipe: Recipe, rl: RLConfig) -> None:
        check(recipe)
        super().check(recipe, rl)
        if (rl.group_size or 0) < 2:
            raise UserError("rl.group_size", "one answer to a prompt makes no pair", "use 2 or more")

    @classmethod
    def open(cls, recipe: Recipe, tokenizer: Tokenizer, cache: Path) -> Prompts:
        """Prompts of which a pair of answers fits into a row."""
        cls.check(recipe, recipe.rl.at(recipe.stage))
        half = recipe.train.seq_len // 2
        if half <= recipe.rl.max_tokens:
            why = f"rows of {recipe.train.seq_len} tokens hold no two answers of rl.max_tokens={recipe.rl.max_tokens}"
            raise UserError("train.seq_len", why, "make it twice the longest prompt and max_tokens together")
        train = recipe.train.model_copy(update={"seq_len": half})
        return open_prompts(recipe.model_copy(update={"train": train}), tokenizer)

    def prepare(self, begun: Start) -> nn.Module:
        model = super().prepare(begun)
        self.reference = keep_reference(self.recipe, begun, self.place)
        return model

    def judge(self, experiences: list[Experience]) -> dict[str, float]:
        sums = Sums()
        pairs = {good.number: good.reward - poor.reward for good, poor in best_and_worst(experiences)}
        for number in {one.number for one in experiences}:
            sums.add("pairs", number in pairs)
        for margin in pairs.values():
            sums.add("reward_margin", margin)
        total = sums.total(self.place.world)
        return {name: total.mean(name) for name in total.sums}

    def minibatch(self, position: int) -> list[Any]:
        pairs = best_and_worst(self._share(position))
        made = [Document.of(one.ids[: one.start], one.ids[one.start :]) for pair in pairs for one in pair]
        packed = pack_documents(made, self.config.seq_len, self.tokenizer.pad_id, together=2)
        whole, size = Compared(**vars(packed), round=self.round), self.config.batch_size
        whole.least = int(self.counts[position] == 0 and self.place.world.main)
        tensors = {name: value for name, value in vars(whole).items() if isinstance(value, Tensor)}
        starts = range(0, len(packed.input_ids_BT), size)
        parts: list[dict[str, Any]] = [{k: v[i : i + size] for k, v in tensors.items()} for i in starts]
        return [replace(whole, **part, least=0 if i else whole.least) for i, part in enumerate(parts)]

    def _count(self) -> None:
        own = [float(len(best_and_worst(self._share(position)))) for position in range(self.updates)]
        self.counts = self.place.world.sum(own)
        if not any(self.counts):
            self._warn("pairless", "step %d: no prompt of the round gave two answers of different worth", self.begun_at)

    def count(self, batch: Compared) -> tuple[int, int]:
        pairs = Documents(batch.doc_ids_BT).number // 2
        return pairs + batch.least, int((batch.doc_ids_BT >= 0).sum())

    def loss(self, model: nn.Module, batch: Compared) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        self.trained_round = batch.round
        answers = answers_of(model, batch, reference_logps(self.reference, batch))
        losses_P, metrics = judge_pairs(self.preference, answers)
        count = torch.tensor(len(losses_P), device=losses_P.device)
        return losses_P.sum(), count, {name: metrics[name].detach().sum() for name in self.names}


def best_and_worst(experiences: Sequence[Experience]) -> list[Pair]:
    """Of each prompt's answers, in the order of the prompts; none where they are worth the same, or say the same."""
    groups: dict[int, list[Experience]] = {}
    for one in experiences:
        if one.reward == one.reward and bool(one.columns["mask"].any()):  # judged, and not left out
            groups.setdefault(one.number, []).append(one)
    pairs = []
    for number in sorted(groups):
        good, poor = (pick(groups[number], key=lambda one: one.reward) for pick in (max, min))
        if good.reward > poor.reward and good.ids != poor.ids:
            pairs.append((good, poor))
    return pairs
