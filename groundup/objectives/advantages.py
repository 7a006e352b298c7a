"""How much better than expected was it? Rewards of completions turned into advantages of their tokens.

With a learnt value: generalised advantage estimation. Without: the other answers to the same prompt are what was
expected. A completion without a reward (NaN: its grader failed) is left out of every baseline, with advantage 0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from groundup.objectives.documents import Documents

Scale = Literal["group", "batch", "none"]
Sums = Callable[[list[float]], list[float]]  # adds figures up over the ranks


def group_advantages(rewards_N: Tensor, groups_N: Tensor, scale: Scale = "group", eps: float = 1e-4) -> Tensor:
    """(r - mean of its group) / (std + eps): GRPO, arXiv 2402.03300, section 4.1.2. Unbiased std, as in TRL.

    groups_N: the prompt that each completion answers, any integers. scale: the std is the group's, or that of all
    rewards here (batch), or left out (none: Dr. GRPO, arXiv 2503.20783, section 3.2). A group whose rewards are all
    equal, one of a single completion too, has advantages of exactly 0.
    """
    rewards_N, group_N, groups = _grouped(rewards_N, groups_N)
    valid_N = ~rewards_N.isnan()
    differences_N = rewards_N - _means(rewards_N, valid_N, group_N, groups)
    if scale == "group":
        count_G = _sums(valid_N.double(), valid_N, group_N, groups)
        squares_G = _sums(differences_N.square(), valid_N, group_N, groups)
        differences_N = differences_N / ((squares_G / (count_G - 1).clamp(min=1)).sqrt()[group_N] + eps)
    elif scale == "batch":
        valid_M = rewards_N[valid_N]
        differences_N = differences_N / ((valid_M.std() if len(valid_M) > 1 else 0.0) + eps)
    return differences_N.masked_fill(~valid_N | uniform(rewards_N, groups_N), 0.0).float()


def leave_one_out(rewards_N: Tensor, groups_N: Tensor) -> Tensor:
    """r - mean of the others in its group: RLOO, arXiv 2402.14740. 0 where there are no others."""
    rewards_N, group_N, groups = _grouped(rewards_N, groups_N)
    valid_N = ~rewards_N.isnan()
    count_N = _sums(valid_N.double(), valid_N, group_N, groups)[group_N]
    # r - (sum - r)/(n - 1) = (r - mean) n/(n - 1)
    advantages_N = (rewards_N - _means(rewards_N, valid_N, group_N, groups)) * count_N / (count_N - 1).clamp(min=1)
    return advantages_N.masked_fill(~valid_N | uniform(rewards_N, groups_N), 0.0).float()


def uniform(rewards_N: Tensor, groups_N: Tensor) -> Tensor:
    """uniform_N: whether all rewards of the completion's group are equal, so that nothing can be learnt from it.

    DAPO's dynamic sampling (arXiv 2503.14476, equation 11) draws other prompts in place of these.
    """
    rewards_N, group_N, groups = _grouped(rewards_N, groups_N)
    low_G, high_G = (rewards_N.new_full((groups,), sign * torch.inf) for sign in (1, -1))
    low_G = low_G.scatter_reduce(0, group_N, rewards_N.nan_to_num(torch.inf, torch.inf, -torch.inf), "amin")
    high_G = high_G.scatter_reduce(0, group_N, rewards_N.nan_to_num(-torch.inf, torch.inf, -torch.inf), "amax")
    return (low_G >= high_G)[group_N]  # above it: no reward at all


def overlong_penalty(lengths_N: Tensor, max_tokens: int, buffer: int) -> Tensor:
    """0 up to max_tokens - buffer, then falling to -1 at max_tokens. DAPO, arXiv 2503.14476, equation 13."""
    over_N = lengths_N.float() - (max_tokens - buffer)
    return -(over_N / buffer).clamp(0, 1) if buffer else -(over_N > 0).float()


def token_rewards(scores_D: Tensor, penalties_BT: Tensor, doc_ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """rewards_BT: minus the penalty at each masked-in token, plus the document's score at the last of them.

    With penalty beta * kl(policy, reference) it is InstructGPT's reward, arXiv 2203.02155, equation 2.
    """
    rewards_BT = torch.where(mask_BT.bool(), -penalties_BT, 0.0)
    last_D = Documents(doc_ids_BT).last(mask_BT)
    there_D = last_D >= 0
    return rewards_BT.flatten().index_add(0, last_D[there_D], scores_D.to(rewards_BT)[there_D]).view_as(rewards_BT)


def gae(rewards_S: Tensor, values_S: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """(advantages, returns) of one completion that ends after its S-th token. The plain form.

    delta_t = r_t + gamma V_(t+1) - V_t; A_t = delta_t + gamma lambda A_(t+1). Equations 11 and 12 of PPO,
    arXiv 1707.06347, after arXiv 1506.02438. The value's target is the return A_t + V_t.
    """
    rewards, values = rewards_S.double().tolist(), [*values_S.double().tolist(), 0.0]
    advantages, advantage = [0.0] * len(rewards), 0.0
    for t in reversed(range(len(rewards))):
        advantage = rewards[t] + gamma * values[t + 1] - values[t] + gamma * lam * advantage
        advantages[t] = advantage
    advantages_S = values_S.new_tensor(advantages)
    return advantages_S, advantages_S + values_S


@torch.no_grad()
def gae_packed(
    rewards_BT: Tensor, values_BT: Tensor, doc_ids_BT: Tensor, mask_BT: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """(advantages_BT, returns_BT) of the documents of packed rows, 0 where mask_BT is 0.

    Time counts the policy's own tokens: the value after the last one before an observation is that of the first one
    behind it. With values 0, gamma = lambda = 1 the advantages are the rewards to come (REINFORCE++, arXiv 2501.03262).
    """
    own_M = mask_BT.flatten().nonzero().squeeze(1)
    document_M = Documents(doc_ids_BT).index_BT.flatten()[own_M]
    rewards_M, values_M = rewards_BT.flatten()[own_M].float(), values_BT.flatten()[own_M].float()
    goes_on_M = torch.zeros_like(values_M)
    goes_on_M[:-1] = (document_M[1:] == document_M[:-1]).float()
    deltas_M = rewards_M + gamma * goes_on_M * values_M.roll(-1) - values_M
    advantages_M = _discounted(deltas_M, gamma * lam * goes_on_M)
    empty_N = torch.zeros_like(values_BT, dtype=torch.float32).flatten()
    advantages_N, returns_N = (empty_N.index_copy(0, own_M, x) for x in (advantages_M, advantages_M + values_M))
    return advantages_N.view_as(values_BT), returns_N.view_as(values_BT)


def whiten(values_T: Tensor, mask_T: Tensor, shift_mean: bool = True, sums: Sums | None = None) -> Tensor:
    """(values - mean) / std over the masked-in ones of all ranks, 0 elsewhere. shift_mean False: the mean stays.

    Unbiased variance and rsqrt(var + 1e-8), as in TRL. sums: adds up over ranks; all of them must call.
    """
    add: Sums = sums or (lambda figures: figures)
    own_M = values_T[mask_T.bool()].detach().cpu().double()
    total, count = add([float(own_M.sum()), float(len(own_M))])
    mean = total / max(count, 1.0)
    [squares] = add([float((own_M - mean).square().sum())])
    scale = (squares / max(count - 1, 1.0) + 1e-8) ** -0.5
    values_T = values_T.float()
    whitened_T = (values_T - mean) * scale + (0.0 if shift_mean else mean)
    return torch.where(mask_T.bool(), whitened_T, 0.0)


def _discounted(x_M: Tensor, decay_M: Tensor) -> Tensor:
    """y[t] = x[t] + decay[t] * y[t + 1] in log2(M) steps, each doubling how far a token sees. decay must end in 0."""
    step, x_M, decay_M = 1, x_M.clone(), decay_M.clone()
    while step < len(x_M):
        x_M[:-step] += decay_M[:-step] * x_M[step:]
        decay_M[:-step] *= decay_M[step:].clone()
        step *= 2
    return x_M


def _grouped(rewards_N: Tensor, groups_N: Tensor) -> tuple[Tensor, Tensor, int]:
    """Rewards in fp64, the groups numbered from 0, and how many there are."""
    unique_G, group_N = groups_N.unique(return_inverse=True)
    return rewards_N.double(), group_N, len(unique_G)


def _sums(values_N: Tensor, valid_N: Tensor, group_N: Tensor, groups: int) -> Tensor:
    return values_N.new_zeros(groups).index_add(0, group_N, torch.where(valid_N, values_N, 0.0))


def _means(values_N: Tensor, valid_N: Tensor, group_N: Tensor, groups: int) -> Tensor:
    """The mean of each item's group."""
    count_G = _sums(torch.ones_like(values_N), valid_N, group_N, groups)
    return (_sums(values_N, valid_N, group_N, groups) / count_G.clamp(min=1))[group_N]
