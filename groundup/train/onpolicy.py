"""How does a model learn from its own answers? Rounds: ask, answer, grade, then a few optimizer steps on what was said.

A round's answers are a pure function of (weights, seed, round), and go into every checkpoint while they are used, so a
run that is killed in the middle of a round ends in the same bytes. Ranks share the prompts of a round; a prompt's
answers never part, and which of them make a minibatch depends on the prompts' numbers alone: two ranks are one.
"""

from __future__ import annotations

import logging
import math
import time
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from groundup.config import Recipe, RLConfig
from groundup.device import autocast, pick_dtype
from groundup.errors import UserError
from groundup.model.foreign import Foreign
from groundup.model.transformer import Transformer
from groundup.objectives.documents import Documents
from groundup.objectives.policy import KINDS, AdaptiveKL, PolicyKind, importance_weights, policy_count, policy_loss
from groundup.ops.loss import selective_logprobs_and_entropy
from groundup.rewards.episode import ToolUse
from groundup.rewards.tools import build_tools
from groundup.tokenizer import Tokenizer
from groundup.train.drift import Drift
from groundup.train.experience import (
    Experience,
    RolloutBatch,
    Spot,
    from_tensors,
    pack_rows,
    split_rows,
    to_tensors,
    unpack_column,
)
from groundup.train.grading import Grader
from groundup.train.health import Samples, Sums, check, measure
from groundup.train.prompts import Prompts, open_prompts, shares
from groundup.train.reference import Reference, reference_of, refuse_dropout, token_logps, without_dropout
from groundup.train.rollout import Sampler
from groundup.train.stage import Place, Stage
from groundup.train.start import Start

log = logging.getLogger(__name__)
SHARES = 12  # so that one seed makes unrelated choices
CLOCK = "rollout_seconds"
BROKEN = 0.01  # mean difference of the engine's and the trainer's probabilities from which ratios mean nothing


class OnPolicy(Stage):
    """What PPO and GRPO share. `judge` gives every answer's tokens their advantages."""

    kind: PolicyKind  # how objectives/policy.py takes the mean
    unread: tuple[str, ...]  # keys of `rl` that only other stages read

    def __init__(self, data: Prompts, recipe: Recipe, place: Place, tokenizer: Tokenizer) -> None:
        self.prompts, self.recipe, self.place, self.tokenizer = data, recipe, place, tokenizer
        self.config, self.rl = recipe.train, recipe.rl.at(recipe.stage)
        self.dtype = pick_dtype(recipe.train.dtype, place.device)
        if self.rl.prompts < place.world.size:
            why = f"{self.rl.prompts} prompts are too few for {place.world.size} ranks"
            raise UserError("rl.prompts", why, "use one a rank at least")
        self.fingerprint = {"prompts": len(data.train), "characters": data.characters}
        self.grader = Grader(data, recipe, place.world, tokenizer)
        self.tools = tools_of(recipe)
        self.samples = Samples(recipe.output, self.rl.samples if place.world.main else 0)
        self.adaptive = AdaptiveKL(self.beta0, self.rl.kl_target or 1.0, self.rl.kl_horizon)
        self.round, self.begun_at = -1, 0
        self.experiences: list[Experience] = []
        self.counts: list[float] = []  # of each optimizer step of the round, over all ranks
        self.told: dict[int, dict[str, float]] = {}  # figures by round: of this one and the one before
        self.trained_round = 0
        self.drift = Drift(place.world)
        self.warned: set[str] = set()

    @classmethod
    def open(cls, recipe: Recipe, tokenizer: Tokenizer, cache: Path) -> Prompts:
        cls.check(recipe, recipe.rl.at(recipe.stage))
        return open_prompts(recipe, tokenizer, tools_of(recipe))

    @classmethod
    def check(cls, recipe: Recipe, rl: RLConfig) -> None:
        """UserError: settings that do not go together."""
        default = RLConfig()
        for key in cls.unread:
            if getattr(recipe.rl, key) != getattr(default, key):
                raise UserError(f"rl.{key}", f"stage {recipe.stage} does not read it", f"leave rl.{key} out")
        if not rl.rewards:
            raise UserError("rl.rewards", "is empty", "name a reward, e.g. rl.rewards=exact,format")
        parts = rl.minibatches or 1
        if rl.prompts % parts:
            raise UserError("rl.minibatches", f"{rl.prompts} prompts make no {parts} equal parts", "use a divisor")
        if (rl.top_p < 1 or rl.top_k) and not rl.importance_cap:
            cut = "top_p" if rl.top_p < 1 else "top_k"
            why = "answers drawn from a part of the distribution are not the policy's own"
            raise UserError(f"rl.{cut}", why, "leave it off, or account for it with rl.importance_cap=2")
        for key in ("importance_level", "importance_over"):
            if getattr(rl, key) != getattr(default, key) and not rl.importance_cap:
                raise UserError(f"rl.{key}", "there are no weights without a cap", "set rl.importance_cap=2, too")
        if rl.kl_target and not rl.beta:
            raise UserError("rl.kl_target", "there is no beta to steer", "set rl.beta, where it starts")
        refuse_dropout(recipe)

    def prepare(self, begun: Start) -> nn.Module:
        without_dropout(begun.model)
        self.policy: Any = begun.model
        self.forks = can_fork(begun.model)
        self.reference: Reference | None = None
        if self.rl.beta:
            self.reference = reference_of(begun, "copy" if begun.adapted is None else "adapter", self.dtype)
        longest = min(self.config.seq_len, self.prompts.longest + self.rl.max_tokens)
        self.sampler = Sampler(
            begun.model, self.tokenizer, self.rl, self.recipe.seed, longest=longest, dtype=self.dtype,
            environment=self.tools, turns=self.rl.turns,
        )  # fmt: skip
        return self.policy

    # The loop's questions

    @property
    def beta0(self) -> float:
        return self.rl.beta or 0.0

    @property
    def beta(self) -> float:
        return self.adaptive.beta

    @property
    def updates(self) -> int:
        """Optimizer steps of a round."""
        return (self.rl.epochs or 1) * (self.rl.minibatches or 1)

    @property
    def clip_high(self) -> float:
        return self.rl.clip_low if self.rl.clip_high is None else self.rl.clip_high

    def steps(self) -> int:
        rounds = math.ceil(self.config.epochs * len(self.prompts.train) / self.rl.prompts)
        return self.config.steps or rounds * self.updates

    def about(self) -> tuple[str, str]:
        data, rl = self.prompts, self.rl
        held = f"{len(data.val)} held out" if data.val else "none held out"
        answers = f"{rl.prompts} prompts x {rl.group_size} answers a round of {self.updates} steps"
        return f"{len(data.train):,} prompts, {held}", f"{rl.prompts // (rl.minibatches or 1)} prompts ({answers})"

    def fetch(self, step: int, accumulate: int) -> list[Any]:
        if self.round < 0 or step >= self.begun_at + self.updates or self._left_early(step):
            self._begin(step)
        return self.minibatch(step - self.begun_at)

    def count(self, batch: Any) -> tuple[int, int]:
        counted = int(policy_count(batch.mask_BT, batch.doc_ids_BT, self.kind)) + batch.least
        return counted, int((batch.doc_ids_BT >= 0).sum())

    def figures(self) -> dict[str, float]:
        """Of the round that was trained last, and the extremes of ratios since the last line."""
        extremes, difference = self.drift.read()
        if difference > BROKEN:
            why = "the engine's probabilities differ from the trainer's by %.3f in the mean: ratios mean little then"
            self._warn("drift", why, difference)
        return {**self.told.get(self.trained_round, {}), **extremes}

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        return self.grader.held_out(self.sampler)

    # A round

    def _begin(self, step: int) -> None:
        """Ask, answer, grade, judge."""
        began, self.round, self.begun_at = time.perf_counter(), self.round + 1, step
        graded, first = self.grader.collect(self.sampler, self.round)
        told = measure(first, self.place.world)
        check(told, self.rl, step, self.recipe)
        self._tell(told, step)
        if self.samples.prompts:
            self.samples.write(first, self.round, step)
        self.experiences = [one.experience for one in graded]
        told[CLOCK] = time.perf_counter() - began
        told |= self.judge(self.experiences)
        self.told = {r: figures for r, figures in self.told.items() if r == self.round - 1} | {self.round: told}
        self._count()

    def _tell(self, told: dict[str, float], step: int) -> None:
        """What a person should know, once; figures that say nothing are taken out."""
        if told["unjudged"]:
            text = "step %d: %.1f%% of answers have no reward; they are left out of baselines and not trained"
            self._warn("unjudged", text, step, 100 * told["unjudged"])
        if self.rl.group_size == 1:
            del told["groups_equal"]
        elif told["groups_equal"] == 1.0:
            text = "step %d: all answers to a prompt are worth the same, for every prompt: nothing to learn from them"
            self._warn("equal", text, step)
        for name in ("sampled_entropy", *(["unjudged"] if not told["unjudged"] else [])):
            del told[name]

    @abstractmethod
    def judge(self, experiences: list[Experience]) -> dict[str, float]:
        """Give every answer its columns beside mask and engine, `advantages` at least. Returns figures. A collective
        call."""

    def measure_logprobs(self, experiences: Sequence[Experience], old: bool) -> None:
        """Columns `old` (where wanted) and `reference` (where there is one): the trainer's own, over packed rows."""
        wanted = ["old"] * old + ["reference"] * (self.reference is not None)
        found: dict[str, list[Tensor]] = {name: [] for name in wanted}
        batch, places = self._pack(experiences)
        for rows in split_rows(batch, self.config.batch_size, self.place.device) if wanted else ():
            part = rows.to(self.place.device)
            with torch.no_grad(), autocast(self.place.device, self.dtype):
                for name, values_BT in self.measured(part, wanted).items():
                    found.setdefault(name, []).extend(values_BT)
        for name, values in found.items():
            unpack_column(values, experiences, places, name)

    def measured(self, part: RolloutBatch, wanted: Sequence[str]) -> dict[str, Tensor]:
        """What is computed of rows once, before the first step on them."""
        out: dict[str, Tensor] = {}
        if "old" in wanted:
            out["old"] = token_logps(self.policy, part, self.rl.temperature)
        if self.reference is not None:
            with self.reference() as model:
                out["reference"] = token_logps(model, part, self.rl.temperature)
        return out

    def kl_of(self, experiences: Sequence[Experience]) -> dict[str, float]:
        """Nats from the reference, an answer; steers beta where it is adaptive."""
        if self.reference is None:
            return {}
        sums = Sums()
        for one in experiences:
            own = one.columns.get("old", one.columns["engine"])
            sums.add("kl_reply", float(((own - one.columns["reference"]) * one.columns["spoken"]).sum()))
        found, beta = sums.total(self.place.world), self.beta
        if self.rl.kl_target:
            self.adaptive.update(found.mean("kl_reply"), int(found.counts["kl_reply"]))
        return {"kl_reply": found.mean("kl_reply"), "beta": beta}

    # Its optimizer steps

    def minibatch(self, position: int) -> list[Any]:
        """This rank's micro-batches of the round's optimizer step number `position`; a row of filler if it has none."""
        batch, _ = self._pack(self._share(position))
        batch.round = self.round
        batches = list(split_rows(batch, self.config.batch_size, self.place.device))
        batches[0].least = int(self.counts[position] == 0 and self.place.world.main)
        return batches

    def _pack(self, experiences: Sequence[Experience]) -> tuple[RolloutBatch, list[Spot]]:
        """A prompt's answers share it, where the model's attention is ours."""
        return pack_rows(experiences, self.config.seq_len, self.tokenizer.pad_id, fork=self.forks)

    def _share(self, position: int) -> list[Experience]:
        epoch, part = divmod(position, self.rl.minibatches or 1)
        parts = shares(self.rl.prompts, self.rl.minibatches or 1, self.recipe.seed, SHARES, self.round, epoch)
        return [one for one in self.experiences if one.number in parts[part]]

    def _count(self) -> None:
        """What each step of the round will be divided by. A collective call."""
        own = []
        for position in range(self.updates):
            masks = [one.columns["mask"].sum() for one in self._share(position)]
            own.append(sum(float(n) if KINDS[self.kind].mean == "token" else float(n > 0) for n in masks))
        self.counts = self.place.world.sum(own)
        if not any(self.counts):
            why = "no answer of the round is trained: all are cut at rl.max_tokens, or have no reward"
            self._warn("empty", f"step %d: {why}", self.begun_at)

    def loss(self, model: nn.Module, batch: Any) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        decoder = cast(Transformer, model)
        hidden_BTD = decoder.hidden(batch.input_ids_BT, batch.position_ids_BT, batch.doc_ids_BT)
        return self.policy_loss(hidden_BTD, decoder.head_weight, batch)

    def policy_loss(
        self, hidden_BTD: Tensor, head_VD: Tensor, batch: RolloutBatch
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """objectives/policy.py with this recipe's settings."""
        rl, mask_BT = self.rl, batch.mask_BT
        logprobs_BT, entropy_BT = selective_logprobs_and_entropy(
            hidden_BTD, head_VD, batch.labels_BT, temperature=rl.temperature, entropy_grad=rl.entropy_coef > 0
        )
        old_BT = logprobs_BT.detach() if batch.old_BT is None else batch.old_BT
        engine_BT = old_BT if batch.engine_BT is None else batch.engine_BT
        advantages_BT = torch.zeros_like(logprobs_BT) if batch.advantages_BT is None else batch.advantages_BT
        importance_BT = None
        if rl.importance_cap:
            how = rl.importance_cap, rl.importance_level, rl.importance_over
            importance_BT = importance_weights(old_BT, engine_BT, mask_BT, batch.doc_ids_BT, *how)
        in_loss = self.reference is not None and rl.kl_in == "loss"
        reference_BT = batch.reference_BT if batch.reference_BT is not None else old_BT  # a row of filler has none
        total, count, metrics = policy_loss(
            logprobs_BT, batch.old_BT, advantages_BT, mask_BT, batch.doc_ids_BT, self.kind, rl.clip_low, self.clip_high,
            delta=rl.delta, max_tokens=rl.max_tokens, importance_BT=importance_BT,
            reference_BT=reference_BT if in_loss else None, kl_coef=self.beta, kl_kind=rl.kl_kind or "k3",
            entropy_BT=entropy_BT, entropy_coef=rl.entropy_coef,
        )  # fmt: skip
        difference_BT = (engine_BT.exp() - old_BT.exp()).abs()
        if KINDS[self.kind].mean == "token":
            metrics["probability_difference"] = difference_BT[mask_BT].sum()
        else:
            metrics["probability_difference"] = Documents(batch.doc_ids_BT).mean(difference_BT, mask_BT).sum()
        self.trained_round = batch.round
        ratio_M = (logprobs_BT.detach() - old_BT)[mask_BT].exp()
        self.drift.note(ratio_M, difference_BT[mask_BT], metrics["approx_kl"].detach(), count)
        return total, count, metrics

    def _left_early(self, step: int) -> bool:
        """Whether the last step took the policy too far from where the round was sampled. A collective call."""
        if not self.rl.kl_stop:
            return False
        kl = self.drift.read_kl()
        return step > self.begun_at and kl > self.rl.kl_stop

    def _warn(self, name: str, text: str, *values: Any) -> None:
        """Once a run."""
        if name not in self.warned and self.place.world.main:
            log.warning(text, *values)
        self.warned.add(name)

    # What a checkpoint keeps

    def state(self) -> dict[str, Tensor]:
        if self.round < 0:
            return {}
        # no clock in what must be equal
        known = {name: value for name, value in self.told[self.round].items() if name != CLOCK}
        told = {f"figure {name}": torch.tensor(v, dtype=torch.float64) for name, v in known.items()}
        watched = {f"watched {name}": value.detach().double().cpu() for name, value in self.drift.noted.items()}
        where = {"round": torch.tensor(self.round), "begun_at": torch.tensor(self.begun_at)}
        goes_on = {"beta": torch.tensor(self.beta, dtype=torch.float64), "scale": self.grader.scale.clone()}
        return {**to_tensors(self.experiences), **told, **watched, **where, **goes_on}

    def restore(self, states: list[dict[str, Tensor]]) -> None:
        if not states:
            return
        world, common = self.place.world, states[0]
        self.round = self.trained_round = int(common["round"])
        self.begun_at = int(common["begun_at"])
        self.adaptive.beta, self.grader.scale = float(common["beta"]), common["scale"].clone()
        self.told = {self.round: _named(common, "figure ")}
        everyone = sorted((one for state in states for one in from_tensors(state)), key=lambda one: one.number)
        self.experiences = [one for one in everyone if one.number % world.size == world.rank]
        if world.rank < len(states):
            self.drift.noted = {k: torch.tensor(v).float() for k, v in _named(states[world.rank], "watched ").items()}
        self._count()


def can_fork(model: nn.Module) -> bool:
    """Whether answers may share a copy of their prompt: where attention is ours, not transformers'."""
    return not any(isinstance(part, Foreign) for part in model.modules())


def tools_of(recipe: Recipe) -> ToolUse | None:
    """What the policy can call, where the recipe gives it something."""
    specs = [{"name": tool.name, "args": tool.args} for tool in recipe.rl.tools]
    return ToolUse(build_tools(specs, seconds=recipe.rl.tool_seconds)) if specs else None


def _named(tensors: dict[str, Tensor], prefix: str) -> dict[str, float]:
    return {key.removeprefix(prefix): float(t) for key, t in tensors.items() if key.startswith(prefix)}
