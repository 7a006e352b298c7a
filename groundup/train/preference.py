"""Stage three, the short way: of two answers, rather the better one. DPO and its relatives (objectives/preference.py).

Both answers of a pair lie side by side in one packed row, so a pass over the row gives the log probabilities of both,
and the reference (reference.py) says theirs in the same row. KTO reads answers one by one, each wanted or not.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from groundup.config import PreferenceConfig, Recipe, RLConfig
from groundup.data.batch import IGNORE, Batch, Loader, PackedDataset
from groundup.data.documents import documents, mismatched, pack_documents
from groundup.data.mix import permutation
from groundup.device import autocast, compile_policy, pick_dtype
from groundup.errors import UserError
from groundup.objectives.documents import Documents
from groundup.objectives.preference import Answers, PairLoss, pair_losses, rewards, unpaired_losses
from groundup.train.prepare import compile_blocks
from groundup.train.reference import (
    Kept,
    Reference,
    answer_logps,
    reference_of,
    refuse_dropout,
    token_logps,
    without_dropout,
)
from groundup.train.stage import Datasets, Place, Stage, TokenStage, open_rows
from groundup.train.start import SOFT_METHODS, Start, fingerprint, source_of

if TYPE_CHECKING:
    from groundup.tokenizer import Tokenizer

METRICS = (
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
)
SAID = {"copy": "a frozen copy", "adapter": "the base below the adapter", "cached": "computed once", "none": "none"}

log = logging.getLogger(__name__)
Rows = NDArray[np.integer]


@dataclass
class Judged(Batch):
    """Rows of answers that were judged, and what the loss needs beside them: one entry an answer, in their order.

    reference_D: log probabilities under the reference, where they are known already. Of single answers: wanted_D, KTO's
    baseline, and the answers of the whole step over the wanted and over the unwanted ones among them.
    """

    reference_D: Tensor | None = None
    wanted_D: Tensor | None = None
    baseline: float = 0.0
    per_wanted: float = 0.0
    per_unwanted: float = 0.0

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Judged:
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        moved: dict[str, Any] = {k: v.to(device, non_blocking=non_blocking) for k, v in tensors.items()}
        return replace(self, **moved)


def check(recipe: Recipe) -> None:
    """UserError: a reference that cannot be had, dropout."""
    refuse_dropout(recipe)
    method, how = recipe.adapt.method, recipe.preference.kept(recipe.adapt.method)
    if how == "adapter" and method in ("full", "freeze"):
        why = f"adapt.method={method} moves the model itself: there is no base below it"
        raise UserError("preference.reference", why, "use preference.reference=copy")
    if how == "cached" and source_of(recipe) is None:
        why = f"the preset {recipe.model} has no weights yet that could be known again"
        raise UserError("preference.reference", why, "use preference.reference=copy, or name a model folder")


def keep_reference(recipe: Recipe, begun: Start, place: Place) -> Reference | None:
    """The reference as a second model or below the adapter; None where there is none, or only its words are kept.

    A run that goes on must find the model that it began with: that is noted.
    """
    how, half = recipe.preference.kept(recipe.adapt.method), pick_dtype(recipe.train.dtype, place.device)
    source = source_of(recipe)
    if how != "none" and source is not None:
        begun.fingerprint = begun.fingerprint or fingerprint(source)
    if how not in ("copy", "adapter"):
        return None
    reference = reference_of(begun, how, half)
    if how == "copy" and recipe.adapt.method not in SOFT_METHODS:
        with reference() as model:  # the policy's own blocks are compiled by whoever runs it
            compile_blocks(cast(nn.ModuleList, model.blocks), compile_policy(recipe.train.compile, place.device))
    return reference


def judge_pairs(told: PreferenceConfig, answers: Answers) -> tuple[Tensor, dict[str, Tensor]]:
    """(losses_P, metrics of each pair), chosen and rejected answers side by side."""
    chosen, rejected = answers.side(0), answers.side(1)
    losses_P = pair_losses(
        cast(PairLoss, told.loss), chosen, rejected, told.beta, label_smoothing=told.label_smoothing,
        margin=told.margin, average=told.average, f_divergence_type=told.f_divergence_type,
        f_alpha_divergence_coef=told.f_alpha_divergence_coef,
    )  # fmt: skip
    if told.sft_weight:  # arXiv 2404.19733, equation 1: each answer's mean over its tokens
        losses_P = losses_P - told.sft_weight * chosen.means
    good_P, poor_P = (rewards(told.loss, side, told.beta) for side in (chosen, rejected))
    return losses_P, {
        "rewards/chosen": good_P, "rewards/rejected": poor_P, "rewards/accuracies": (good_P > poor_P).float(),
        "rewards/margins": good_P - poor_P, "logps/chosen": chosen.logps_D, "logps/rejected": rejected.logps_D,
        "nll": -chosen.means,
    }  # fmt: skip


def reference_logps(reference: Reference | None, batch: Batch) -> Tensor:
    """Of each answer, in the same packed rows; 0 without a reference."""
    if reference is None:
        return torch.zeros(Documents(batch.doc_ids_BT).number, device=batch.doc_ids_BT.device)
    with torch.no_grad(), reference() as model:
        return answer_logps(model, batch)


def answers_of(model: nn.Module, batch: Batch, reference_D: Tensor) -> Answers:
    """What the losses take, of every answer in the batch."""
    found = Documents(batch.doc_ids_BT)
    logps_D = found.sum(token_logps(model, batch))
    return Answers(logps_D, reference_D, found.count(batch.labels_BT != IGNORE))


def names_of(told: PreferenceConfig) -> list[str]:
    """The metrics of a loss."""
    names = [*METRICS, "kl"] if told.loss == "kto" else [*METRICS]
    return [*names, "nll"] if told.sft_weight or told.loss == "orpo" else names


class Preference(TokenStage):
    """Pairs, or single answers, in packed rows. The loss's count is that of the pairs (or answers)."""

    def __init__(self, data: Datasets, recipe: Recipe, place: Place, tokenizer: Tokenizer) -> None:
        super().__init__(data, recipe, place, tokenizer)
        self.recipe, self.told = recipe, recipe.preference
        self.how = self.told.kept(recipe.adapt.method)
        self.half = pick_dtype(recipe.train.dtype, place.device)
        self.stream = Loader(self.train, 1, recipe.seed)  # a row at a time: which one came before
        self.model: nn.Module | None = None
        self.reference: Reference | None = None
        self.kept: Kept | None = None
        self.held: list[Judged] | None = None  # out: the same at every evaluation, with what the reference says of them
        self.held_mismatches: list[Judged] = []
        self.names = names_of(self.told)
        if place.world.main and self.train.wanted is not None:
            self._warn_unbalanced(int(self.train.wanted.sum()))

    @classmethod
    def of(cls, recipe: Recipe) -> type[Stage]:
        if not recipe.preference.online:
            return cls
        from groundup.train.online import Online

        return Online

    @classmethod
    def open(cls, recipe: Recipe, tokenizer: Tokenizer, cache: Path) -> Datasets:
        check(recipe)
        if recipe.rl != RLConfig():
            raise UserError("rl", "is read where pairs are sampled", "set preference.online=true, or leave rl out")
        return open_rows("preference" if recipe.preference.paired else "unpaired", recipe, tokenizer, cache)

    def prepare(self, begun: Start) -> nn.Module:
        """Dropout off; the reference kept, in the way that the recipe says."""
        self.model = without_dropout(begun.model)
        self.reference = keep_reference(self.recipe, begun, self.place)
        if self.how == "cached":
            source = source_of(self.recipe)
            assert source is not None
            self.kept = Kept.of(self.recipe, source, self.half)
            now = reference_of(begun, "adapter" if begun.adapted is not None else "start", self.half)
            for data in (self.train, self.val):
                if data is not None:
                    self.kept.complete(data, now, self.place, self.half, self.config.batch_size)
        return self.model

    def about(self) -> tuple[str, str]:
        data, unit = self.train, "pairs" if self.told.paired else "answers"
        held = f"{self.val.documents:,} held out" if self.val else "none held out"
        rows = f"{len(data):,} rows of {data.seq_len} ({100 * data.fill:.1f}% full)"
        kept = f"{data.trained_tokens:,} trained tokens; {held}; reference: {SAID[self.how]}"
        return f"{data.documents:,} {unit} in {rows}, {kept}", f"{self.rows} rows, {self.told.loss}"

    def fetch(self, step: int, accumulate: int) -> list[Any]:
        micro_steps = range(step * accumulate, (step + 1) * accumulate)
        rows = [self.loader.rows_at(micro_step) for micro_step in micro_steps]
        window = [self._judged(self.train, each) for each in rows]
        if not self.told.paired:
            before = [self._rows_before(micro_step, accumulate) for micro_step in micro_steps]
            mismatches = self._mismatches(self.train, np.concatenate(rows), np.concatenate(before))
            self._compare(window, mismatches)
        return window

    def count(self, batch: Batch) -> tuple[int, int]:
        number = Documents(batch.doc_ids_BT).number
        return number // 2 if self.told.paired else number, int((batch.doc_ids_BT >= 0).sum())

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        batch = cast(Judged, batch)
        answers = self.answers(model, batch)
        losses, metrics = judge_pairs(self.told, answers) if self.told.paired else self._singles(answers, batch)
        count = torch.tensor(len(losses), device=losses.device)
        return losses.sum(), count, {name: metrics[name].detach().sum() for name in self.names}

    def answers(self, model: nn.Module, batch: Judged) -> Answers:
        reference_D = batch.reference_D
        if reference_D is None:  # first: its activations are gone before the policy's are there
            reference_D = reference_logps(self.reference, batch)
        return answers_of(model, batch, reference_D)

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Loss and metrics over the pairs (or answers) of the same `eval_rows` held-out rows each time."""
        if self.val is None:
            return {}
        if self.held is None:
            self._hold(self.val)
        assert self.held is not None
        if not self.told.paired:
            self._compare(self.held, self.held_mismatches)
        sums = [0.0] * (len(self.names) + 2)
        for batch in self.held:
            total, number, metrics = self.loss(model, batch.to(self.place.device))
            sums = [a + float(b) for a, b in zip(sums, (number, total, *metrics.values()), strict=True)]
        count, *sums = self.place.world.sum(sums)
        return {f"val_{name}": each / max(count, 1.0) for name, each in zip(("loss", *self.names), sums, strict=True)}

    def _singles(self, answers: Answers, batch: Judged) -> tuple[Tensor, dict[str, Tensor]]:
        """Metrics of one side are means over that side: `per_wanted` undoes the division by all answers."""
        told, wanted_D = self.told, batch.wanted_D
        assert wanted_D is not None
        losses_D = unpaired_losses(
            answers, wanted_D, told.beta, batch.baseline, told.desirable_weight, told.undesirable_weight
        )
        if told.sft_weight:
            losses_D = losses_D - told.sft_weight * torch.where(wanted_D, answers.means, 0.0)
        rewards_D = rewards(told.loss, answers, told.beta)
        of_wanted_D, of_others_D = batch.per_wanted * wanted_D, batch.per_unwanted * ~wanted_D
        return losses_D, {
            "rewards/chosen": rewards_D * of_wanted_D, "rewards/rejected": rewards_D * of_others_D,
            "rewards/accuracies": ((rewards_D > told.beta * batch.baseline) == wanted_D).float(),
            "rewards/margins": rewards_D * (of_wanted_D - of_others_D),
            "logps/chosen": answers.logps_D * of_wanted_D, "logps/rejected": answers.logps_D * of_others_D,
            "kl": torch.full_like(rewards_D, batch.baseline), "nll": -answers.means * of_wanted_D,
        }  # fmt: skip

    def _judged(self, data: PackedDataset, rows: Rows) -> Judged:
        batch = Judged(**vars(data.batch(rows)))
        if self.kept is not None:
            batch.reference_D = self.kept.look_up(data, rows)
        if not self.told.paired:
            ids_BT = batch.doc_ids_BT
            first_BT = torch.cat([torch.ones_like(ids_BT[:, :1]), ids_BT.diff(dim=1)], 1) != 0
            batch.wanted_D = ids_BT[first_BT & (ids_BT >= 0)] % 2 == 0
        return batch

    def _rows_before(self, micro_step: int, accumulate: int) -> Rows:
        """For each row of a micro-batch, the one before it among all rows of the optimizer step; for the first, the
        last one. However rows are shared among passes and ranks, the same."""
        size, world = self.config.batch_size, self.place.world
        first, rows = (micro_step * world.size + world.rank) * size, size * accumulate * world.size
        begin = first // rows * rows
        places = (np.arange(first, first + size) - 1 - begin) % rows + begin
        return np.concatenate([self.stream.rows_at(place) for place in places.tolist()])

    def _mismatches(self, data: PackedDataset, rows: Rows, before: Rows) -> list[Judged]:
        """For KTO: the answers of these rows to other questions, each to the one that follows in the step."""
        if self.told.loss != "kto" or not len(rows):
            return []
        both = zip(documents(data.batch(rows)), documents(data.batch(before)), strict=True)
        made = [one for row, others in both for one in mismatched(others[-1], row, data.seq_len)]
        packed, size = vars(pack_documents(made, data.seq_len, data.pad_id)), self.config.batch_size
        parts = [{k: v[i : i + size] for k, v in packed.items() if v is not None} for i in range(0, len(made), size)]
        return [Judged(**part) for part in parts if len(part["input_ids_BT"])]

    @torch.no_grad()
    def _compare(self, window: list[Judged], mismatches: list[Judged]) -> None:
        """Tell each batch what it takes from the whole step: KTO's baseline, as TRL estimates it, and how many answers.

        The baseline is the mean log ratio of mismatched answers over all ranks, not below 0 (arXiv 2402.01306, section
        4.1).
        """
        assert self.model is not None
        ratios = number = 0.0
        with autocast(self.place.device, self.half):
            for batch in mismatches:
                ratios_D = self.answers(self.model, batch.to(self.place.device)).ratios
                ratios, number = ratios + float(ratios_D.double().sum()), number + len(ratios_D)
        wanted = sum(float(batch.wanted_D.sum()) for batch in window if batch.wanted_D is not None)
        every = sum(len(batch.wanted_D) for batch in window if batch.wanted_D is not None)
        ratios, number, wanted, answers = self.place.world.sum([ratios, number, wanted, every])
        if self.told.loss == "kto" and number < 2:
            why = "a step of one answer has no other question to compare it with"
            raise UserError("train.batch_size", why, "use more rows, or train.accumulate")
        for batch in window:
            batch.baseline = max(0.0, ratios / number) if number else 0.0
            batch.per_wanted, batch.per_unwanted = answers / max(wanted, 1), answers / max(answers - wanted, 1)

    def _hold(self, val: PackedDataset) -> None:
        """This rank's share of the rows that are evaluated, and what the reference says of them."""
        world, size = self.place.world, self.config.batch_size
        every = permutation(len(val), self.seed)[: self.config.eval_rows]
        own, before = every[world.rank :: world.size], np.roll(every, 1)[world.rank :: world.size]
        self.held = [self._judged(val, own[i : i + size]) for i in range(0, len(own), size)]
        self.held_mismatches = self._mismatches(val, own, before)
        for batch in [*self.held, *self.held_mismatches]:
            if batch.reference_D is None:
                batch.reference_D = reference_logps(self.reference, batch.to(self.place.device)).cpu()

    def _warn_unbalanced(self, wanted: int) -> None:
        """Both sides should weigh about the same, the wanted one up to a third more (arXiv 2402.01306, equation 8)."""
        told, others = self.told, self.train.documents - wanted
        if not (wanted and others):
            log.warning("all answers are %s: nothing says what the opposite is", "wanted" if wanted else "unwanted")
        elif not 1 <= told.desirable_weight * wanted / max(told.undesirable_weight * others, 1e-9) <= 4 / 3:
            good, poor = told.undesirable_weight * others / wanted, told.desirable_weight * wanted / others
            log.warning(
                "%d wanted answers, %d unwanted: use preference.desirable_weight=%.3g, or undesirable_weight=%.3g",
                wanted, others, good, poor,
            )  # fmt: skip
