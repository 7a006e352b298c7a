"""What if a second model says what was to be expected? PPO (arXiv 1707.06347) as InstructGPT has it (2203.02155).

A value model foresees, at every token, the reward to come; what comes better than foreseen is made likelier, by a ratio
that is clipped. The reward of an answer stands at its last token; the distance from the reference is paid token by
token (or in the loss). Values are those of a model of its own, or of a head on the policy.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from groundup.adapt.layers import Part, add_change
from groundup.config import Recipe, RLConfig
from groundup.data.batch import Batch, Loader, PackedDataset
from groundup.errors import UserError
from groundup.model.foreign import Foreign
from groundup.model.hub import resolve
from groundup.model.scored import Scored, begin_scored, load_scorer, save_scorer
from groundup.objectives.advantages import gae_packed, token_rewards, whiten
from groundup.objectives.next_token import next_token, trained
from groundup.objectives.policy import explained_variance, kl, value_loss
from groundup.ops.loss import selective_logprobs
from groundup.tokenizer import Tokenizer, load_tokenizer
from groundup.train.experience import Experience, RolloutBatch, stacked, unstack
from groundup.train.onpolicy import OnPolicy, can_fork, tools_of
from groundup.train.prompts import Prompts, open_prompts
from groundup.train.reference import without_dropout
from groundup.train.stage import Place, open_rows
from groundup.train.start import SOFT_METHODS, Start

VALUE = "value"  # the folder beside the policy's weights, and what its parameters are called in checkpoints


@dataclass(frozen=True)
class WithText(Prompts):
    """Prompts, and rows that are learnt as in pretraining or SFT beside them."""

    text: PackedDataset | None = None


@dataclass
class TextBatch:
    """Rows of ptx_data. scale: of their cross entropy, so that it counts ptx_weight times in the mean of the step."""

    batch: Batch
    scale: float
    per_token: float

    def to(self, device: torch.device | str, non_blocking: bool = False) -> TextBatch:
        return replace(self, batch=self.batch.to(device, non_blocking))


class ActorCritic(nn.Module):
    """The policy, whose parameters keep their names, and the value model beside it; of a shared one its head alone."""

    policy: Any
    scorer: Scored

    def __init__(self, policy: Any, scorer: Scored, shared: bool) -> None:
        super().__init__()
        self.__dict__.update(policy=policy, scorer=scorer, shared=shared)  # registered part by part, under their names
        for name, module in policy._modules.items():
            self.add_module(name, module)
        self.add_module(VALUE, scorer.score if shared else scorer)

    def hidden_and_values(self, batch: RolloutBatch) -> tuple[Tensor, Tensor]:
        """What the policy's head reads, [B, T, D], and what is foreseen at every place, [B, T]."""
        where = batch.input_ids_BT, batch.position_ids_BT, batch.doc_ids_BT
        hidden_BTD = self.policy.hidden(*where)
        if self.__dict__["shared"]:
            return hidden_BTD, self.scorer.read(_normalised(self.scorer, hidden_BTD))
        return hidden_BTD, self.scorer.scores_BT(*where)

    def train(self, mode: bool = True) -> ActorCritic:
        self.policy.train(mode)
        self.scorer.train(mode)
        self.training = mode
        return self


class PPO(OnPolicy):
    """Policy, reference, value, and rewards that may be a model's."""

    kind = "ppo"
    unread = ("loss", "scale_rewards", "advantage_eps", "dynamic_sampling")

    def __init__(self, data: WithText, recipe: Recipe, place: Place, tokenizer: Tokenizer) -> None:
        super().__init__(data, recipe, place, tokenizer)
        self.text = Loader(data.text, self.rl.ptx_rows, recipe.seed) if data.text is not None else None
        self.names: list[str] = []  # of the metrics of an answer's rows
        if data.text is not None:
            self.fingerprint["ptx_rows"] = len(data.text)

    @classmethod
    def open(cls, recipe: Recipe, tokenizer: Tokenizer, cache: Path) -> WithText:
        cls.check(recipe, recipe.rl.at(recipe.stage))
        found, text = open_prompts(recipe, tokenizer, tools_of(recipe)), None
        if recipe.rl.ptx_data:
            held = recipe.eval.model_copy(update={"fraction": 0.0, "data": []})
            other = recipe.model_copy(update={"data": recipe.rl.ptx_data, "eval": held})
            text, _ = open_rows(recipe.rl.ptx_kind, other, tokenizer, cache)
        return WithText(found.train, found.val, found.longest, text)

    @classmethod
    def check(cls, recipe: Recipe, rl: RLConfig) -> None:
        super().check(recipe, rl)
        if bool(rl.ptx_data) != bool(rl.ptx_weight):
            given, lacking = ("ptx_data", "ptx_weight") if rl.ptx_data else ("ptx_weight", "ptx_data")
            raise UserError(f"rl.{lacking}", f"is missing beside rl.{given}", "give both, or neither")
        if recipe.adapt.method in SOFT_METHODS:
            why = "PPO's value model has no soft prompt to learn"
            raise UserError("adapt.method", why, "use lora, freeze or full, or stage=grpo")

    def prepare(self, begun: Start) -> nn.Module:
        super().prepare(begun)
        shared = self.rl.value_model == "shared"
        if shared:
            scorer = Scored(begun.model).init_score(self.recipe.seed)
        elif self.rl.value_model == "copy":
            scorer = begin_scored(_copied(begun.model), self.recipe.seed)
        else:
            scorer = self._reward_model(self.rl.value_model)
        self.model = ActorCritic(begun.model, without_dropout(scorer), shared)  # type: ignore[arg-type]
        self.forks = self.forks and can_fork(scorer.trunk)
        return self.model

    def rates(self, begun: Start) -> dict[str, float]:
        names = [name for name, _ in self.model.named_parameters() if name.startswith(f"{VALUE}.")]
        return begun.rates | dict.fromkeys(names, self.rl.value_lr_ratio)

    def _reward_model(self, name: str) -> Scored:
        """The value begins as a model that scored answers before."""
        folder = resolve(name)
        scorer = load_scorer(folder, self.place.device, torch.float32)
        if load_tokenizer(folder).backend.to_str() != self.tokenizer.backend.to_str():
            why = "its tokenizer is not the policy's: the two read the same ids"
            raise UserError(f"rl.value_model={name}", why, "use a reward model made from the same base, or copy")
        return scorer

    def judge(self, experiences: list[Experience]) -> dict[str, float]:
        self.measure_logprobs(experiences, old=True)
        told, add = self.kl_of(experiences), self.place.world.sum
        for one in experiences:
            one.columns["costs"] = torch.zeros_like(one.columns["old"])
            if self.reference is not None and self.rl.kl_in == "reward":
                costs = kl(one.columns["old"], one.columns["reference"], self.rl.kl_kind or "k1")
                one.columns["costs"] = told["beta"] * costs
        names = ("mask", "costs", "values")
        mask_NL, costs_NL, values_NL = (stacked(experiences, name) for name in names)
        documents_NL = torch.zeros_like(mask_NL, dtype=torch.int32)  # one a row
        scores_N = self.grader.scaled(experiences).nan_to_num(0.0).float()
        rewards_NL = token_rewards(scores_N, costs_NL, documents_NL, mask_NL)
        if self.rl.whiten_rewards:
            rewards_NL = whiten(rewards_NL, mask_NL, shift_mean=False, sums=add)
        advantages_NL, returns_NL = gae_packed(rewards_NL, values_NL, documents_NL, mask_NL, self.rl.gamma, self.rl.lam)
        told["explained_variance"] = explained_variance(values_NL, returns_NL, mask_NL, sums=add)
        if self.rl.whiten_advantages:
            advantages_NL = whiten(advantages_NL, mask_NL, sums=add)
        unstack(advantages_NL, experiences, "advantages")
        unstack(returns_NL, experiences, "returns")
        return told

    def measured(self, part: RolloutBatch, wanted: Sequence[str]) -> dict[str, Tensor]:
        hidden_BTD, values_BT = self.model.hidden_and_values(part)
        head_VD, temperature = self.policy.head_weight, self.rl.temperature
        old_BT = selective_logprobs(hidden_BTD, head_VD, part.labels_BT, temperature=temperature)
        others = [name for name in wanted if name != "old"]
        return {"old": old_BT, "values": values_BT, **super().measured(part, others)}

    def minibatch(self, position: int) -> list[Any]:
        return super().minibatch(position) + self._text_rows(position)

    def _text_rows(self, position: int) -> list[TextBatch]:
        """This rank's rows of ptx_data for a step. A collective call."""
        if self.text is None:
            return []
        world, size = self.place.world, self.config.batch_size
        own = self.text.rows_at(self.begun_at + position)[world.rank :: world.size]
        batches = [self.text.dataset.batch(own[at : at + size]) for at in range(0, len(own), size)]
        [tokens] = world.sum([float(sum(trained(batch.labels_BT) for batch in batches))])
        share = max(self.counts[position], 1.0) / max(tokens, 1.0)
        return [TextBatch(batch, share * self.rl.ptx_weight, share) for batch in batches]

    def count(self, batch: Any) -> tuple[int, int]:
        if isinstance(batch, TextBatch):  # the answers' tokens count alone; the scale has seen to it
            return 0, int((batch.batch.doc_ids_BT >= 0).sum())
        return super().count(batch)

    def loss(self, model: nn.Module, batch: Any) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        assert isinstance(model, ActorCritic)
        if isinstance(batch, TextBatch):
            return self._text_loss(model, batch)
        hidden_BTD, values_BT = model.hidden_and_values(batch)
        total, count, metrics = self.policy_loss(hidden_BTD, model.policy.head_weight, batch)
        zeros_BT = torch.zeros_like(values_BT)  # of a row of filler
        old_BT, returns_BT = (zeros_BT if x is None else x for x in (batch.values_BT, batch.returns_BT))
        missed, _, of_values = value_loss(values_BT, old_BT, returns_BT, batch.mask_BT, self.rl.value_clip)
        metrics |= {"policy_loss": total.detach(), "value_loss": missed.detach(), **of_values}
        self.names = list(metrics)
        if self.text is not None:
            metrics["ptx_loss"] = torch.zeros_like(missed)
        return total + self.rl.value_coef * missed, count, metrics

    def _text_loss(self, model: ActorCritic, batch: TextBatch) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        rows = batch.batch
        hidden_BTD = model.policy.hidden(rows.input_ids_BT, rows.position_ids_BT, rows.doc_ids_BT)
        total, count = next_token(hidden_BTD, model.policy.head_weight, rows.labels_BT, rows.weights_BT)
        nothing = torch.zeros_like(total.detach())
        moving = [p for p in model.get_submodule(VALUE).parameters() if p.requires_grad]
        total = total + 0.0 * sum(p.sum() for p in moving)  # DDP wants every parameter to take part in every pass
        metrics = dict.fromkeys(self.names, nothing) | {"ptx_loss": batch.per_token * total.detach()}
        return batch.scale * total, count, metrics

    def save(self, begun: Start, folder: Path, tokenizer: Tokenizer) -> None:
        """The policy as ever; the value model in `value/`, a stock sequence classifier."""
        super().save(begun, folder, tokenizer)
        save_scorer(merged(self.model.scorer), folder / VALUE)
        tokenizer.save(folder / VALUE)


def _normalised(scorer: Scored, hidden_BTD: Tensor) -> Tensor:
    """What the value's head reads, of what the trunk made for its own: once normalised, not twice."""
    if not isinstance(scorer.trunk, Foreign):
        return hidden_BTD
    plain_BTD = hidden_BTD[..., : scorer.score.in_features]
    return plain_BTD if scorer.trunk.scale == 1.0 else plain_BTD / scorer.trunk.scale


def _copied(model: Any) -> Any:
    """A second model of the same numbers; what does not move (the base of a LoRA) is shared."""
    still = [*(p for p in model.parameters() if not p.requires_grad), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in still})


@torch.no_grad()
def merged(scorer: Scored) -> Scored:
    """The model without adapters: what they add is in its matrices. The one given stays as it is."""
    if not any(isinstance(part, Part) for part in scorer.modules()):
        return scorer
    whole = copy.deepcopy(scorer)
    for parent in list(whole.modules()):
        for name, part in list(parent.named_children()):
            if isinstance(part, Part):
                setattr(parent, name, _layer(part))
    return whole


def _layer(part: Part) -> nn.Module:
    """One layer that does what this part does; a quantised base is written out."""
    if not hasattr(part.base, "dequantize"):
        add_change(part)
        return part.base
    weight_ED, bias_E = part.weight, part.bias
    layer = nn.Linear(weight_ED.shape[1], weight_ED.shape[0], bias=bias_E is not None)
    layer.weight.copy_(weight_ED)
    if bias_E is not None:
        layer.bias.copy_(bias_E)
    return layer
