"""Which answer is better, and is this one right? Losses of scores: of pairs, and of what was judged right or wrong."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from groundup.objectives.documents import Documents

BINS = 10  # of the probability that is given to the likelier of two outcomes, from 1/2 to 1


def pairwise(
    chosen_P: Tensor, rejected_P: Tensor, margin: float | Tensor = 0.0, centring: float = 0.0
) -> tuple[Tensor, Tensor]:
    """(sum over pairs of -log sigmoid(r_c - r_r - margin) + centring (r_c + r_r)^2, number of pairs).

    Bradley and Terry's model of who wins: Ouyang et al. 2022 (arXiv 2203.02155), equation 1; margin: Touvron et al.
    2023 (arXiv 2307.09288), section 3.2.2; centring: Eisenstein et al. 2023 (arXiv 2312.09244), equation 2.
    """
    losses_P = -F.logsigmoid(chosen_P - rejected_P - margin)
    if centring:
        losses_P = losses_P + centring * (chosen_P + rejected_P).square()
    return losses_P.sum(), losses_P.new_tensor(len(losses_P))


def from_divergence(
    scores_BT: Tensor, input_ids_BT: Tensor, doc_ids_BT: Tensor, margin: float = 0.0
) -> tuple[Tensor, Tensor]:
    """DeepSpeed-Chat's loss (arXiv 2308.01320; its reward_model.py): every token has a score for what was said so far.

    -log sigmoid(score_c - score_r - margin), averaged over the places from the first token in which the two differ to
    the end of the longer one, summed over pairs. Beyond its end the shorter keeps its last score, where theirs reads
    the scores of padding. Pairs lie as kind "preference" packs them.
    """
    chosen_PL, rejected_PL, counted_PL = side_by_side(input_ids_BT, doc_ids_BT)
    scores = scores_BT.flatten()
    losses_PL = -F.logsigmoid(scores[chosen_PL] - scores[rejected_PL] - margin)
    losses_P = (losses_PL * counted_PL).sum(1) / counted_PL.sum(1)
    return losses_P.sum(), losses_P.new_tensor(len(losses_P))


def side_by_side(input_ids_BT: Tensor, doc_ids_BT: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of each pair: the places of its chosen and its rejected document in the flattened batch, [P, L], the shorter
    one's last place repeated; and which of the L come after both began to differ and before the longer one ends."""
    documents, real_BT = Documents(doc_ids_BT), doc_ids_BT >= 0
    lengths_D, last_D = documents.count(real_BT).long(), documents.last(real_BT)
    steps_L = torch.arange(int(lengths_D.max()), device=doc_ids_BT.device)
    places_DL = (last_D - lengths_D + 1)[:, None] + torch.minimum(steps_L, lengths_D[:, None] - 1)
    shorter_P, longer_P = lengths_D.view(-1, 2).amin(1), lengths_D.view(-1, 2).amax(1)
    ids_DL = input_ids_BT.flatten()[places_DL]
    differ_PL = (ids_DL[0::2] != ids_DL[1::2]) | (steps_L >= shorter_P[:, None])
    counted_PL = (differ_PL.cumsum(1) > 0) & (steps_L < longer_P[:, None])
    return places_DL[0::2], places_DL[1::2], counted_PL


def judged(scores_N: Tensor, right_N: Tensor) -> tuple[Tensor, Tensor]:
    """(sum of the cross entropies of sigmoid(score) with right or wrong, number of judgements).

    Of whole answers: an outcome verifier (Cobbe et al. 2021, arXiv 2110.14168, section 4). Of the steps of a solution,
    each scored where it ends: a process reward model (Lightman et al. 2023, arXiv 2305.20050, section 2.6).
    """
    losses = F.binary_cross_entropy_with_logits(scores_N, right_N.to(scores_N.dtype), reduction="sum")
    return losses, losses.new_tensor(len(scores_N))


def share_won(one_P: Tensor, other_P: Tensor) -> Tensor:
    """How many of the pairs `one` wins, a draw counting half: who cannot tell two answers apart is right by chance."""
    return ((one_P > other_P).float() + (one_P == other_P).float() / 2).sum()


def reliability(probability_N: Tensor, happened_N: Tensor) -> Tensor:
    """Sums [3, BINS] of how often, with what confidence, and how often rightly the likelier outcome was foretold, by
    confidence. Those of several batches are added up."""
    sure_N = probability_N.double()
    right_N = torch.where(sure_N >= 0.5, happened_N.double(), 1 - happened_N.double())
    sure_N = torch.maximum(sure_N, 1 - sure_N)
    bins_N = ((sure_N - 0.5) * 2 * BINS).long().clamp(0, BINS - 1)
    sums = sure_N.new_zeros(3, BINS)
    return sums.index_add(1, bins_N, torch.stack([torch.ones_like(sure_N), sure_N, right_N]))


def calibration_error(sums: Tensor) -> float:
    """Expected calibration error (Guo et al. 2017, arXiv 1706.04599, equation 3) from the sums of `reliability`."""
    count, sure, right = sums
    return float((sure - right).abs().sum() / count.sum())
