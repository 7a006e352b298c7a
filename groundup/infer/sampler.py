"""Which token comes next? Pure functions of logits; every row of a batch has settings of its own.

The order is that of transformers: repetition penalty, temperature, top_k, top_p, min_p, then one draw.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from groundup.infer.params import SamplingParams


@dataclass(frozen=True)
class Settings:
    """The settings of B rows as tensors (B, 1), fp32 but top_k (int64); greedy_B bool."""

    greedy_B: Tensor
    temperature_B1: Tensor
    top_k_B1: Tensor
    top_p_B1: Tensor
    min_p_B1: Tensor
    penalty_B1: Tensor

    @property
    def all_greedy(self) -> bool:
        return bool(self.greedy_B.all())

    @property
    def penalised(self) -> bool:
        return bool((self.penalty_B1 != 1).any())

    def rows(self, index: Tensor) -> Settings:
        """The settings of some of the rows."""
        return Settings(**{name: value[index] for name, value in vars(self).items()})


def settings(params: Sequence[SamplingParams], vocab_size: int, device: torch.device | str = "cpu") -> Settings:
    """Gather B requests' settings; top_k 0 becomes the whole vocabulary."""

    def column(values: list[float], dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=device)[:, None]

    return Settings(
        greedy_B=torch.tensor([p.temperature == 0 for p in params], device=device),
        temperature_B1=column([p.temperature or 1.0 for p in params]),
        top_k_B1=column([min(p.top_k, vocab_size) or vocab_size for p in params], torch.int64),
        top_p_B1=column([p.top_p for p in params]),
        min_p_B1=column([p.min_p for p in params]),
        penalty_B1=column([p.repetition_penalty for p in params]),
    )


def repetition_penalty(logits_BV: Tensor, seen_BV: Tensor, penalty_B1: Tensor) -> Tensor:
    """Divide the positive logits of seen tokens by the penalty and multiply the negative ones (CTRL, section 4.1)."""
    pushed_BV = torch.where(logits_BV > 0, logits_BV / penalty_B1, logits_BV * penalty_B1)
    return torch.where(seen_BV, pushed_BV, logits_BV)


def filtered_probs(logits_BV: Tensor, s: Settings) -> tuple[Tensor, Tensor]:
    """Probabilities after temperature and cuts, largest first, not renormalised, and the token ids of that order.

    top_k keeps ties with the k-th; top_p keeps the token that crosses p (arXiv 1904.09751); min_p keeps what has
    min_p times the largest probability or more (arXiv 2407.01082).
    """
    logits_BV, order_BV = (logits_BV.float() / s.temperature_B1).sort(dim=-1, descending=True)
    kth_B1 = logits_BV.gather(-1, s.top_k_B1 - 1)
    probs_BV = logits_BV.masked_fill(logits_BV < kth_B1, -torch.inf).softmax(-1)
    before_BV = probs_BV.cumsum(-1) - probs_BV
    # The most likely token always stays; rounding must not let top_p = 1 cut the tail.
    outside_BV = (before_BV >= s.top_p_B1) & (s.top_p_B1 < 1)
    outside_BV[:, 0] = False
    probs_BV = probs_BV.masked_fill(outside_BV, 0)
    return probs_BV.masked_fill(probs_BV < s.min_p_B1 * probs_BV[:, :1], 0), order_BV


def sample(logits_BV: Tensor, s: Settings, uniform_B: Tensor | None = None, seen_BV: Tensor | None = None) -> Tensor:
    """Choose one token a row, ids (B,).

    uniform_B: one draw from [0, 1) a row, each from its own request's generator; not needed when all rows are greedy.
    seen_BV: bool, tokens of prompt and answer so far; None: no row has a repetition penalty.
    """
    logits_BV = logits_BV.float()
    if seen_BV is not None:
        logits_BV = repetition_penalty(logits_BV, seen_BV, s.penalty_B1)
    best_B = logits_BV.argmax(-1)
    if s.all_greedy or uniform_B is None:
        return best_B
    probs_BV, order_BV = filtered_probs(logits_BV, s)
    cumulative_BV = probs_BV.cumsum(-1)
    target_B1 = uniform_B.to(cumulative_BV)[:, None] * cumulative_BV[:, -1:]
    # The first place whose cumulative probability exceeds the target: places of probability 0 are never chosen.
    place_B1 = torch.searchsorted(cumulative_BV, target_B1, right=True)
    last_B1 = (probs_BV > 0).sum(-1, keepdim=True) - 1
    return torch.where(s.greedy_B, best_B, order_BV.gather(-1, place_B1.minimum(last_B1)).squeeze(-1))
