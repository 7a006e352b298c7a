"""Stage: which answer is better? A language model with a score head learns it from pairs, or from what was judged.

The trunk begins as the SFT model, the head fresh and small. Pairs lie side by side in packed rows, and an answer's
score is that of its last token (model/scored.py). Beside the accuracy on held-out pairs stands that of a rule which
reads nothing: the longer answer wins. A reward model that does not beat it has learnt to count.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from groundup.adapt.folder import save_adapter
from groundup.adapt.scored import write_labels
from groundup.config import Recipe
from groundup.config.reward import RewardConfig
from groundup.data.batch import Batch
from groundup.data.mix import permutation
from groundup.model.scored import Scored, save_scorer
from groundup.objectives.documents import Documents
from groundup.objectives.next_token import IGNORE
from groundup.objectives.reward import (
    BINS,
    calibration_error,
    from_divergence,
    judged,
    pairwise,
    reliability,
    share_won,
)
from groundup.tokenizer import Tokenizer
from groundup.train.stage import Datasets, Place, TokenStage, open_rows

if TYPE_CHECKING:
    from groundup.train.start import Start

KINDS = {"pair": "preference", "divergence": "preference", "process": "stepwise", "outcome": "outcome"}


class Reward(TokenStage):
    """A reward model of pairs, steps or outcomes. Its loss is a mean over pairs, or over judgements."""

    def __init__(self, data: Datasets, recipe: Recipe, place: Place, tokenizer: Tokenizer) -> None:
        super().__init__(data, recipe, place, tokenizer)
        self.settings, self.tokenizer = recipe.reward, with_pad(tokenizer)

    @classmethod
    def open(cls, recipe: Recipe, tokenizer: Tokenizer, cache: Path) -> Datasets:
        return open_rows(KINDS[recipe.reward.loss], recipe, tokenizer, cache)

    def prepare(self, begun: Start) -> nn.Module:
        scored = begun.model if begun.adapted is None else begun.adapted.model
        scored.pad_token_id = self.tokenizer.pad_id
        return cast(nn.Module, begun.model)

    def about(self) -> tuple[str, str]:
        data, what = self.train, "pairs" if self.settings.paired else "answers"
        judgements = "" if self.settings.paired else f", {data.trained_tokens:,} judgements"
        held = (
            f"{data.documents:,} {what}{judgements} in {len(data):,} rows of {data.seq_len} ({100 * data.fill:.1f}% "
            f"full); {len(self.val) if self.val else 'no'} rows held out"
        )
        return held, f"{self.rows} rows, {self.rows * data.seq_len:,} positions"

    def count(self, batch: Batch) -> tuple[int, int]:
        real_BT = batch.doc_ids_BT >= 0
        if self.settings.paired:
            return Documents(batch.doc_ids_BT).number // 2, int(real_BT.sum())
        return int((batch.labels_BT != IGNORE).sum()), int(real_BT.sum())

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        scores_BT = cast(Scored, model).scores_BT(batch.input_ids_BT, batch.position_ids_BT, batch.doc_ids_BT)
        if not self.settings.paired:
            scores_N, right_N = marked(scores_BT, batch)
            told = {"train_accuracy": ((scores_N > 0) == right_N).sum(), "mean_reward": scores_N.sum()}
            return *judged(scores_N, right_N), _detached(told)
        chosen_P, rejected_P = ends(scores_BT, batch)
        told = {
            "train_accuracy": share_won(chosen_P, rejected_P), "margin": (chosen_P - rejected_P).sum(),
            "mean_reward": (chosen_P + rejected_P).sum() / 2,
        }  # fmt: skip
        return *pair_loss(self.settings, scores_BT, chosen_P, rejected_P, batch), _detached(told)

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Over the same `eval_rows` held-out rows each time: accuracy and what it would be without reading, how far the
        probabilities can be trusted, and mean scores."""
        if self.val is None:
            return {}
        world, size = self.place.world, self.config.batch_size
        rows = permutation(len(self.val), self.seed)[: self.config.eval_rows][world.rank :: world.size]
        measure = self._measure_pairs if self.settings.paired else self._measure_judgements
        sums, bins = torch.zeros(7, dtype=torch.float64), torch.zeros(3, BINS, dtype=torch.float64)
        for at in range(0, len(rows), size):
            found, calibration = measure(cast(Scored, model), self.val.batch(rows[at : at + size]))
            sums, bins = sums + found, bins + calibration
        together = torch.tensor(world.sum([*sums.tolist(), *bins.flatten().tolist()]), dtype=torch.float64)
        sums, bins = together[: len(sums)], together[len(sums) :].view(3, BINS)
        loss, count, right, baseline, brier, good, bad = sums.tolist()
        figures = {"val_loss": loss / count, "accuracy": right / count}
        figures |= {"calibration_error": calibration_error(bins), "brier": brier / count}
        if self.settings.paired:
            mean = {"chosen_score": good / count, "rejected_score": bad / count}
            return figures | {"longer_baseline": baseline / count} | mean
        mean = {"right_score": good / max(baseline, 1), "wrong_score": bad / max(count - baseline, 1)}
        return figures | {"majority_baseline": max(baseline, count - baseline) / count} | mean

    def _scores(self, model: Scored, held: Batch) -> Tensor:
        """[B, T] fp64, on the CPU, where the figures are reckoned."""
        batch = held.to(self.place.device)
        return model.scores_BT(batch.input_ids_BT, batch.position_ids_BT, batch.doc_ids_BT).cpu().double()

    def _measure_pairs(self, model: Scored, batch: Batch) -> tuple[Tensor, Tensor]:
        scores_BT = self._scores(model, batch)
        chosen_P, rejected_P = ends(scores_BT, batch)
        loss, count = pair_loss(self.settings, scores_BT, chosen_P, rejected_P, batch)
        tokens_D = Documents(batch.doc_ids_BT).count(batch.labels_BT != IGNORE)
        won_P = (chosen_P - rejected_P).sigmoid()
        sums = [loss, count, share_won(chosen_P, rejected_P), share_won(tokens_D[0::2], tokens_D[1::2])]
        sums += [(1 - won_P).square().sum(), chosen_P.sum(), rejected_P.sum()]
        return torch.stack([value.double() for value in sums]), reliability(won_P, torch.ones_like(won_P))

    def _measure_judgements(self, model: Scored, batch: Batch) -> tuple[Tensor, Tensor]:
        scores_N, right_N = marked(self._scores(model, batch), batch)
        loss, count = judged(scores_N, right_N)
        sure_N = scores_N.sigmoid()
        sums = [loss, count, ((scores_N > 0) == right_N).sum(), right_N.sum()]
        sums += [(sure_N - right_N.double()).square().sum(), scores_N[right_N].sum(), scores_N[~right_N].sum()]
        return torch.stack([value.double() for value in sums]), reliability(sure_N, right_N)

    def save(self, begun: Start, folder: Path, tokenizer: Tokenizer) -> None:
        """A stock sequence-classification folder; of an adapter PEFT's files, the score head among them."""
        if begun.adapted is None:
            save_scorer(begun.model, folder)
        else:
            save_adapter(begun.adapted, folder, begun.base)
            write_labels(folder, cast(Any, begun.adapted.model).labels)
        self.tokenizer.save(folder)


def ends(scores_BT: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """(chosen_P, rejected_P): the scores of each pair's last tokens."""
    last_D = Documents(batch.doc_ids_BT).last(batch.doc_ids_BT >= 0)
    scores_D = scores_BT.flatten()[last_D]
    return scores_D[0::2], scores_D[1::2]


def marked(scores_BT: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """(scores, whether it was right) wherever something was judged."""
    kept_BT = batch.labels_BT != IGNORE
    return scores_BT[kept_BT], batch.labels_BT[kept_BT] == 1


def pair_loss(
    settings: RewardConfig, scores_BT: Tensor, chosen_P: Tensor, rejected_P: Tensor, batch: Batch
) -> tuple[Tensor, Tensor]:
    """As the recipe has it."""
    if settings.loss == "pair":
        return pairwise(chosen_P, rejected_P, settings.margin, settings.centring)
    total, count = from_divergence(scores_BT, batch.input_ids_BT, batch.doc_ids_BT, settings.margin)
    return total + settings.centring * (chosen_P + rejected_P).square().sum(), count


def with_pad(tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer with padding that no chat ends with: other programs read the score at the last token that is none.

    Many tokenizers pad with the token that ends an answer. Then another special token pads.
    """
    if not tokenizer.chat_template:
        return tokenizer
    said = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
    last = tokenizer.render(said).ids[-1]
    if tokenizer.pad_id != last:
        return tokenizer
    ends_ids = {last, *tokenizer.stop_ids}
    free = [text for text, number in tokenizer.plain.control.items() if number not in ends_ids]
    known = [text for name, text in tokenizer.special.items() if name in ("unk_token", "bos_token") and text in free]
    if not free:
        return tokenizer
    config = copy.deepcopy(tokenizer.config) | {"pad_token": (known or free)[0]}
    return Tokenizer(tokenizer.backend, config, tokenizer.chat_template, tokenizer.more_stop_ids, tokenizer.where)


def _detached(told: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().float() for name, value in told.items()}
