"""The output head and its cross entropy, a chunk of tokens at a time.

Logits are the largest tensor of a small model (tokens x vocabulary). Here no more than one chunk of them exists: its
softmax is turned in place into the gradient of the logits, multiplied out into the gradients of hidden states and
head, and forgotten. Same idea as Liger's and torch's linear_cross_entropy.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

IGNORE = -100


def linear_cross_entropy_reference(
    hidden_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    labels_N: torch.Tensor,
    weights_N: torch.Tensor | None = None,
) -> torch.Tensor:
    """The plain form: all logits at once."""
    losses_N = F.cross_entropy((hidden_ND @ weight_VD.T).float(), labels_N, ignore_index=IGNORE, reduction="none")
    return (losses_N if weights_N is None else losses_N * weights_N).sum()


def linear_cross_entropy(
    hidden_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    labels_N: torch.Tensor,
    chunk: int | None = None,
    weights_N: torch.Tensor | None = None,
) -> torch.Tensor:
    """Sum over tokens with label != -100 of weight * -log softmax(hidden @ weight^T)[label], an fp32 scalar.

    hidden may be [..., D] and labels [...]. chunk: tokens at a time (default: what fits the cache).
    weights_N: a factor for each token's loss (not trained itself).
    """
    hidden_ND, labels_N = hidden_ND.reshape(-1, hidden_ND.shape[-1]), labels_N.reshape(-1)
    weights_N = None if weights_N is None else weights_N.reshape(-1)
    if torch.is_autocast_enabled(hidden_ND.device.type):
        dtype = torch.get_autocast_dtype(hidden_ND.device.type)
        hidden_ND, weight_VD = hidden_ND.to(dtype), weight_VD.to(dtype)
    return _LinearCrossEntropy.apply(hidden_ND, weight_VD, labels_N, weights_N, chunk or default_chunk(weight_VD))


def default_chunk(weight_VD: torch.Tensor) -> int:
    """Tokens a chunk: about 4M logits on a CPU, 64M on a GPU, whose products want to be larger."""
    return max(64, (2**22 if weight_VD.device.type == "cpu" else 2**26) // weight_VD.shape[0])


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: torch.Tensor,
        weight_VD: torch.Tensor,
        labels_N: torch.Tensor,
        weights_N: torch.Tensor | None,
        chunk: int,
    ) -> torch.Tensor:
        kept_M = (labels_N != IGNORE).nonzero().squeeze(1)
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.zeros_like(hidden_ND) if need_hidden else None
        grad_weight = torch.zeros_like(weight_VD, dtype=torch.float32) if need_weight else None
        total = torch.zeros((), dtype=torch.float32, device=hidden_ND.device)
        for rows in kept_M.split(chunk):
            hidden = hidden_ND[rows]
            logits = (hidden @ weight_VD.T).float()
            labels = labels_N[rows, None]
            losses = logits.logsumexp(1) - logits.gather(1, labels).squeeze(1)
            factor = None if weights_N is None else weights_N[rows].float()
            total += (losses if factor is None else losses * factor).sum()
            if grad_hidden is None and grad_weight is None:
                continue
            probs = logits.softmax(1).scatter_add_(1, labels, torch.full_like(labels, -1, dtype=torch.float32))
            if factor is not None:
                probs *= factor[:, None]
            probs = probs.to(weight_VD.dtype)
            if grad_hidden is not None:
                grad_hidden[rows] = probs @ weight_VD
            if grad_weight is not None:
                grad_weight += probs.T @ hidden
        ctx.grads = grad_hidden, None if grad_weight is None else grad_weight.to(weight_VD.dtype)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        grad_hidden, grad_weight = ctx.grads
        scale = grads[0]
        scaled = [None if grad is None else grad.mul_(scale) for grad in (grad_hidden, grad_weight)]
        return *scaled, None, None, None
