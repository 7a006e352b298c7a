"""Which tokens should become likelier, and how far may they move? The losses of PPO and of the GRPO family.

All are - weight(ratio) * advantage, summed over the policy's own tokens, where ratio = pi(token) / pi_old(token), and
differ in two things: whether a ratio is a token's or a whole completion's, and what a mean is taken over.
Log probabilities are those at the sampling temperature.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from groundup.objectives.advantages import Sums
from groundup.objectives.documents import Documents

PolicyKind = Literal["ppo", "grpo", "dr_grpo", "dapo", "gspo", "cispo"]
KLKind = Literal["k1", "k2", "k3"]
LARGEST_LOG = 20.0  # logs of ratios are held within this before exp: one absurd token must not become an infinity


class _Kind(NamedTuple):
    ratio: Literal["token", "sequence", "weight"]  # weight: clipped, and no gradient goes through it
    mean: Literal["token", "sequence", "fixed"]  # over all tokens; of each completion; its sum / max_tokens


KINDS: dict[PolicyKind, _Kind] = {
    "ppo": _Kind("token", "token"),  # arXiv 1707.06347, equation 7
    "grpo": _Kind("token", "sequence"),  # arXiv 2402.03300, equation 3
    "dr_grpo": _Kind("token", "fixed"),  # arXiv 2503.20783, section 3.2
    "dapo": _Kind("token", "token"),  # arXiv 2503.14476, equation 8, with clip_high above clip_low
    "gspo": _Kind("sequence", "sequence"),  # arXiv 2507.18071, equation 5
    "cispo": _Kind("weight", "token"),  # arXiv 2506.13585
}


def policy_loss(
    logprobs_BT: Tensor,
    old_BT: Tensor | None,
    advantages_BT: Tensor,
    mask_BT: Tensor,
    doc_ids_BT: Tensor,
    kind: PolicyKind = "grpo",
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    *,
    delta: float | None = None,
    max_tokens: int | None = None,
    importance_BT: Tensor | None = None,
    reference_BT: Tensor | None = None,
    kl_coef: float = 0.0,
    kl_kind: KLKind = "k3",
    entropy_BT: Tensor | None = None,
    entropy_coef: float = 0.0,
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """(sum, count, metrics): metrics are sums over the same count. Only logprobs_BT and entropy_BT get a gradient.

    mask_BT: 1 at the policy's own tokens. old_BT: their logprobs when they were sampled; None: the very same weights,
    ratio 1. Ratios are held to [1 - clip_low, 1 + clip_high]; cispo clips its weights so (clip_low 1: not from below).
    delta: the ratio of a token with a negative advantage counts at most this (dual clip, arXiv 1912.09729, equation 5).
    max_tokens: what dr_grpo divides by. importance_BT: a factor for each token (importance_weights).
    kl_coef * kl(logprobs, reference) is added, entropy_coef * entropy taken off, in the mean of the kind.
    """
    how, documents, own_BT = KINDS[kind], Documents(doc_ids_BT), mask_BT.bool()
    logprobs_BT = torch.where(own_BT, logprobs_BT.float(), 0.0)
    old_BT = logprobs_BT.detach() if old_BT is None else torch.where(own_BT, old_BT.detach().float(), 0.0)
    advantages_BT = torch.where(own_BT, advantages_BT.detach().float(), 0.0)
    log_ratio_BT = logprobs_BT - old_BT
    if how.ratio == "sequence":
        log_ratio_BT = documents.spread(documents.mean(log_ratio_BT, own_BT))
    ratio_BT = _exp(log_ratio_BT)
    losses_BT = _surrogate(how, logprobs_BT, ratio_BT, advantages_BT, clip_low, clip_high, delta)
    if importance_BT is not None:
        losses_BT = losses_BT * torch.where(own_BT, importance_BT.detach(), 0.0)
    ratio_BT = ratio_BT.detach()
    below_BT, above_BT = ratio_BT < 1 - clip_low, ratio_BT > 1 + clip_high
    if how.ratio != "weight":  # there the clipped bound is the smaller of the two only on one side
        below_BT, above_BT = below_BT & (advantages_BT < 0), above_BT & (advantages_BT > 0)
    metrics = {
        "approx_kl": kl(old_BT, logprobs_BT.detach(), "k3"),
        "ratio": ratio_BT,
        "clip_fraction_low": below_BT.float(),
        "clip_fraction_high": above_BT.float(),
    }
    if reference_BT is not None:
        kl_BT = kl(logprobs_BT, torch.where(own_BT, reference_BT.detach().float(), 0.0), kl_kind)
        losses_BT = losses_BT + kl_coef * kl_BT
        metrics["kl"] = kl_BT.detach()
    if entropy_BT is not None:
        losses_BT = losses_BT - entropy_coef * entropy_BT
        metrics["entropy"] = entropy_BT.detach()
    total = _total(losses_BT, own_BT, documents, how.mean, max_tokens)
    over = "token" if how.mean == "token" else "sequence"
    sums = {name: _total(values_BT, own_BT, documents, over, None) for name, values_BT in metrics.items()}
    return total, _count(own_BT, documents, how.mean), sums


def policy_count(mask_BT: Tensor, doc_ids_BT: Tensor, kind: PolicyKind) -> Tensor:
    """What the sum of policy_loss is divided by: the policy's tokens, or the completions that have any of them."""
    return _count(mask_BT.bool(), Documents(doc_ids_BT), KINDS[kind].mean)


def kl(logprobs: Tensor, reference: Tensor, kind: KLKind = "k3") -> Tensor:
    """Estimates of KL(policy || reference) from tokens that the policy sampled; joschu.net/blog/kl-approx.html.

    k1 = log ratio, unbiased and of either sign; k2 = its square / 2, biased; k3 = exp(-log ratio) + log ratio - 1,
    unbiased and never negative (GRPO, arXiv 2402.03300, equation 4). For rewards k1; in a loss k2 or k3: the gradient
    of k1 itself is zero on average.
    """
    log_ratio = logprobs - reference
    if kind == "k1":
        return log_ratio
    if kind == "k2":
        return log_ratio.square() / 2
    if kind == "k3":
        return _exp(-log_ratio) + log_ratio - 1
    raise ValueError(f"kl: no kind {kind!r}")


class AdaptiveKL:
    """beta moved up when the KL is above its target and down when below: arXiv 1909.08593, section 2.2.

    horizon: over how many completions an error of 20 % or more moves beta by 20 %. Keep `beta` in checkpoints.
    """

    def __init__(self, beta: float, target: float, horizon: int) -> None:
        self.beta, self.target, self.horizon = beta, target, horizon

    def update(self, kl: float, completions: int) -> float:
        error = min(max(kl / self.target - 1, -0.2), 0.2)
        self.beta *= 1 + error * completions / self.horizon
        return self.beta


def value_loss(
    values_BT: Tensor, old_values_BT: Tensor, returns_BT: Tensor, mask_BT: Tensor, clip: float | None = 0.2
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """(sum, count, metrics) of the squared error / 2 over tokens, the worse of the value's and the clipped value's.

    The value clipped to within `clip` of the old one: TRL's and DeepSpeed-Chat's form; None: no clipping.
    """
    own_BT = mask_BT.bool()
    values_BT = torch.where(own_BT, values_BT.float(), 0.0)
    old_BT, returns_BT = (torch.where(own_BT, x.detach().float(), 0.0) for x in (old_values_BT, returns_BT))
    errors_BT = (values_BT - returns_BT).square()
    clipped_BT = errors_BT.detach()
    if clip is not None:
        clipped_BT = (old_BT + (values_BT - old_BT).clamp(-clip, clip) - returns_BT).square()
        worse_BT = torch.maximum(errors_BT, clipped_BT)
    else:
        worse_BT = errors_BT
    metrics = {"value_clip_fraction": (clipped_BT > errors_BT).float().sum(), "value": values_BT.detach().sum()}
    return worse_BT.sum() / 2, own_BT.sum(), metrics


def importance_weights(
    logprobs_BT: Tensor,
    engine_BT: Tensor,
    mask_BT: Tensor,
    doc_ids_BT: Tensor,
    cap: float = 2.0,
    level: Literal["token", "sequence"] = "token",
    over: Literal["truncate", "mask"] = "truncate",
) -> Tensor:
    """weights_BT = min(pi_trainer / pi_engine, cap), without gradient: the engine's rounding is not the trainer's.

    Truncated importance sampling (Yao et al. 2025, fengyao.notion.site/off-policy-rl). logprobs_BT: from before the
    first update on the rollout. level sequence: of whole completions. over mask: weights above the cap become 0.
    """
    documents, own_BT = Documents(doc_ids_BT), mask_BT.bool()
    log_BT = torch.where(own_BT, logprobs_BT.detach().float() - engine_BT.detach().float(), 0.0)
    if level == "sequence":
        log_BT = documents.spread(documents.sum(log_BT, own_BT))
    weights_BT = _exp(log_BT)
    return weights_BT.masked_fill(weights_BT > cap, 0.0) if over == "mask" else weights_BT.clamp(max=cap)


def explained_variance(values_BT: Tensor, returns_BT: Tensor, mask_BT: Tensor, sums: Sums | None = None) -> float:
    """1 - var(returns - values) / var(returns) over all ranks: 1 foresees all, 0 is no better than a constant.

    0 if the returns do not vary. sums: adds up over ranks; all of them must call.
    """
    add: Sums = sums or (lambda figures: figures)
    own_BT = mask_BT.bool()
    returns_M, values_M = (x[own_BT].detach().cpu().double() for x in (returns_BT, values_BT))
    errors_M = returns_M - values_M
    returned, missed, count = add([float(returns_M.sum()), float(errors_M.sum()), float(len(returns_M))])
    count = max(count, 1.0)
    squares = [float((returns_M - returned / count).square().sum()), float((errors_M - missed / count).square().sum())]
    variance, unexplained = add(squares)
    return 1 - unexplained / variance if variance > 0 else 0.0


def _surrogate(
    how: _Kind,
    logprobs_BT: Tensor,
    ratio_BT: Tensor,
    advantages_BT: Tensor,
    clip_low: float,
    clip_high: float,
    delta: float | None,
) -> Tensor:
    """The loss of each token."""
    clipped_BT = ratio_BT.clamp(1 - clip_low, 1 + clip_high)
    if how.ratio == "weight":
        return -clipped_BT.detach() * advantages_BT * logprobs_BT
    bounded_BT = ratio_BT if delta is None else ratio_BT.clamp(max=delta)
    return -torch.minimum(bounded_BT * advantages_BT, clipped_BT * advantages_BT)


def _total(values_BT: Tensor, own_BT: Tensor, documents: Documents, mean: str, max_tokens: int | None) -> Tensor:
    """The sum whose count is that of the kind."""
    if mean == "sequence":
        return documents.mean(values_BT, own_BT).sum()
    total = torch.where(own_BT, values_BT, 0.0).sum()
    if mean == "token":
        return total
    if not max_tokens:
        raise ValueError("dr_grpo divides by max_tokens, which is missing")
    return total / max_tokens


def _count(own_BT: Tensor, documents: Documents, mean: str) -> Tensor:
    return own_BT.sum() if mean == "token" else (documents.count(own_BT) > 0).sum()


def _exp(logs: Tensor) -> Tensor:
    return logs.clamp(-LARGEST_LOG, LARGEST_LOG).exp()
