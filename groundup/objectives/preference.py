"""Which answer is better? DPO and its relatives: losses of whole answers' log probabilities, no reward model between.

An answer's implicit reward is beta * log(pi(answer) / pi_ref(answer)) (DPO, arXiv 2305.18290, equation 5): how much
likelier than under the reference the policy has made it. Losses are per pair, or per answer where answers are judged
one by one; nothing here sums or divides over a batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

PairLoss = Literal["dpo", "robust", "ipo", "hinge", "simpo", "orpo", "apo_zero", "apo_down"]
Divergence = Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"]
LARGEST_LOG = 80.0  # exp of more is no fp32 number
LEAST_NATS = 1e-6  # surprise a token, below which an answer counts as certain: its odds are no number


@dataclass(frozen=True)
class Answers:
    """logps_D: log probability of each answer, summed over its tokens_D tokens. reference_D: the reference's, or 0."""

    logps_D: Tensor
    reference_D: Tensor
    tokens_D: Tensor

    @property
    def ratios(self) -> Tensor:
        """log(pi / pi_ref) of each answer."""
        return self.logps_D - self.reference_D

    @property
    def means(self) -> Tensor:
        """log pi a token."""
        return self.logps_D / self.tokens_D.clamp(min=1)

    def side(self, which: int) -> Answers:
        """Of pairs that lie side by side: 0 the chosen answers, 1 the rejected ones."""
        return Answers(self.logps_D[which::2], self.reference_D[which::2], self.tokens_D[which::2])


def pair_losses(
    loss: PairLoss,
    chosen: Answers,
    rejected: Answers,
    beta: float,
    *,
    label_smoothing: float = 0.0,
    margin: float = 0.0,
    average: bool | None = None,
    f_divergence_type: Divergence = "reverse_kl",
    f_alpha_divergence_coef: float = 0.5,
) -> Tensor:
    """losses_P of pairs.

    label_smoothing: dpo, robust, simpo. margin: simpo. average: scores a token instead of summed ones (None: for ipo
    alone), f_divergence_type: dpo, robust, ipo, hinge.
    """
    if loss == "simpo":  # arXiv 2405.14734, equation 6
        return smoothed(beta * (chosen.means - rejected.means) - margin, label_smoothing)
    if loss == "orpo":  # arXiv 2403.07691, equations 6 and 7; the cross entropy is each answer's mean
        return -chosen.means - beta * F.logsigmoid(log_odds(chosen.means) - log_odds(rejected.means))
    if loss == "apo_zero":  # arXiv 2408.06266, equation 7: chosen up, rejected down
        return torch.sigmoid(-beta * chosen.ratios) + torch.sigmoid(beta * rejected.ratios)
    if loss == "apo_down":  # equation 8: both down, the rejected one further
        return torch.sigmoid(beta * chosen.ratios) + torch.sigmoid(-beta * (chosen.ratios - rejected.ratios))
    sides = [scores(side.ratios, f_divergence_type, f_alpha_divergence_coef) for side in (chosen, rejected)]
    if loss == "ipo" if average is None else average:
        sides = [score / side.tokens_D.clamp(min=1) for score, side in zip(sides, (chosen, rejected), strict=True)]
    h = sides[0] - sides[1]
    if loss == "dpo":  # arXiv 2305.18290, equation 7; averaged: Tulu 3, 2411.15124; smoothed: ericmitchell.ai/cdpo.pdf
        return smoothed(beta * h, label_smoothing)
    if loss == "robust":  # arXiv 2403.00409: unbiased where that share of pairs is flipped
        clean, flipped = -F.logsigmoid(beta * h), -F.logsigmoid(-beta * h)
        return ((1 - label_smoothing) * clean - label_smoothing * flipped) / (1 - 2 * label_smoothing)
    if loss == "ipo":  # arXiv 2310.12036, equation 17; beta is its tau
        return (h - 1 / (2 * beta)).square()
    if loss == "hinge":  # SLiC-HF, arXiv 2305.10425, as RSO has it, 2309.06657
        return torch.relu(1 - beta * h)
    raise ValueError(f"no loss of pairs is called {loss!r}")


def unpaired_losses(
    answers: Answers,
    wanted_D: Tensor,
    beta: float,
    baseline: float | Tensor = 0.0,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """losses_D of answers that are wanted or not: KTO (arXiv 2402.01306, equations 7 and 8).

    baseline: KL of policy and reference, estimated from answers to other questions, never negative, without gradient.
    0: APO-zero's unpaired form (2408.06266).
    """
    gains_D = beta * (answers.ratios - baseline)
    weights_D = torch.where(wanted_D, desirable_weight, undesirable_weight)
    return weights_D * torch.sigmoid(torch.where(wanted_D, -gains_D, gains_D))


def rewards(loss: str, answers: Answers, beta: float) -> Tensor:
    """What the loss takes for the reward of each answer, for people: without gradient."""
    logs_D = answers.means if loss in ("simpo", "orpo") else answers.ratios
    return beta * logs_D.detach()


def smoothed(x: Tensor, label_smoothing: float) -> Tensor:
    """-log sigmoid(x), of which a share takes the pair the other way round."""
    if not label_smoothing:
        return -F.logsigmoid(x)
    return -(1 - label_smoothing) * F.logsigmoid(x) - label_smoothing * F.logsigmoid(-x)


def scores(ratios: Tensor, divergence: Divergence, alpha: float) -> Tensor:
    """f'(pi / pi_ref) of the divergence that holds the policy (f-DPO, arXiv 2309.16240, table 1), from log ratios."""
    if divergence == "reverse_kl" or (divergence == "alpha_divergence" and abs(alpha - 1) < 1e-6):
        return ratios
    if divergence == "forward_kl":
        return 1 - (-ratios).clamp(max=LARGEST_LOG).exp()
    if divergence == "js_divergence":
        return math.log(2) + F.logsigmoid(ratios)
    return torch.expm1(((alpha - 1) * ratios).clamp(max=LARGEST_LOG)) / (alpha - 1)


def log_odds(means: Tensor) -> Tensor:
    """log(p / (1 - p)) from log p."""
    means = means.clamp(max=-LEAST_NATS)
    far = means < -math.log(2)  # each form is exact where the other one loses digits; both must be finite everywhere
    below = torch.log1p(-torch.where(far, means, -1.0).exp())
    above = torch.log(-torch.expm1(torch.where(far, -1.0, means)))
    return means - torch.where(far, below, above)
