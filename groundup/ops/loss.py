"""The output head with its cross entropy, log probabilities and entropy, a chunk of tokens at a time.

Logits are the largest tensor of a small model (tokens x vocabulary). Here no more than one chunk of them exists: its
softmax is turned in place into the gradient of the logits, multiplied out into the gradients of hidden states and
head, and overwritten by the next. The idea is that of Liger's and torch's linear_cross_entropy.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

IGNORE = -100


def linear_cross_entropy_reference(
    hidden_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    labels_N: torch.Tensor,
    weights_N: torch.Tensor | None = None,
) -> torch.Tensor:
    """The plain form: all logits at once."""
    logits_NV = (hidden_ND @ weight_VD.T).float()
    losses_N = F.cross_entropy(logits_NV, labels_N, ignore_index=IGNORE, reduction="none")
    return (losses_N if weights_N is None else losses_N * weights_N).sum()


def linear_cross_entropy(
    hidden_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    labels_N: torch.Tensor,
    chunk: int | None = None,
    weights_N: torch.Tensor | None = None,
) -> torch.Tensor:
    """Sum over tokens with label != -100 of weight * -log softmax(hidden @ weight^T)[label], an fp32 scalar.

    hidden may be [..., D] and labels [...]. chunk: tokens at a time (default: default_chunk). weights_N: a factor for
    each token's loss (not trained itself). Products run in autocast's type, softmax and sums in fp32.
    """
    hidden_ND, labels_N = hidden_ND.reshape(-1, hidden_ND.shape[-1]), labels_N.reshape(-1)
    factors_N = None if weights_N is None else weights_N.reshape(-1)
    loss = _LinearCrossEntropy.apply(
        hidden_ND, weight_VD, labels_N, factors_N, chunk or default_chunk(weight_VD), _product_dtype(hidden_ND)
    )
    assert isinstance(loss, torch.Tensor)
    return loss


def selective_logprobs(
    hidden_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    labels_N: torch.Tensor,
    chunk: int | None = None,
    temperature: float = 1.0,
) -> torch.Tensor:
    """log softmax(hidden @ weight^T / temperature)[label] of each token, fp32, in labels' shape; 0 where it is -100.

    Keeps no logits: the backward pass computes each chunk of them once more.
    """
    return _selective(hidden_ND, weight_VD, labels_N, chunk, temperature, "")[0]


def selective_logprobs_and_entropy(
    hidden_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    labels_N: torch.Tensor,
    chunk: int | None = None,
    temperature: float = 1.0,
    entropy_grad: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(selective_logprobs, entropy in nats of the same softmax, 0 where the label is -100), from the same logits.

    entropy_grad: whether the entropy has a gradient too, for an entropy bonus.
    """
    return _selective(hidden_ND, weight_VD, labels_N, chunk, temperature, "trained" if entropy_grad else "told")


def entropy(
    hidden_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    labels_N: torch.Tensor,
    chunk: int | None = None,
    temperature: float = 1.0,
) -> torch.Tensor:
    """Entropy in nats of softmax(hidden @ weight^T / temperature), fp32; 0 where the label is -100. No gradient."""
    with torch.no_grad():
        return selective_logprobs_and_entropy(hidden_ND, weight_VD, labels_N, chunk, temperature)[1]


def _selective(
    hidden_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    labels_N: torch.Tensor,
    chunk: int | None,
    temperature: float,
    entropy: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    logprobs_N, entropy_N = _SelectiveLogprobs.apply(
        hidden_ND.reshape(-1, hidden_ND.shape[-1]),
        weight_VD,
        labels_N.reshape(-1),
        chunk or default_chunk(weight_VD),
        temperature,
        _product_dtype(hidden_ND),
        entropy,
    )
    return logprobs_N.view(labels_N.shape), entropy_N.view(labels_N.shape if entropy else 0)


def default_chunk(weight_VD: torch.Tensor) -> int:
    """Tokens a chunk: logits that a cache holds on a CPU (8 MB), 64M logits on a GPU, whose products want to be larger.

    At least 64 tokens, on a CPU 256: the head is read once a chunk, and its gradient read and written.
    """
    if weight_VD.device.type == "cpu":
        return min(512, max(256, 2**21 // weight_VD.shape[0]))
    return max(64, 2**26 // weight_VD.shape[0])


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: torch.Tensor,
        weight_VD: torch.Tensor,
        labels_N: torch.Tensor,
        factors_N: torch.Tensor | None,
        chunk: int,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        kept_M = (labels_N != IGNORE).nonzero().squeeze(1)  # ignored tokens cost nothing
        hidden_MD, head_VD = _take(hidden_ND, kept_M).to(dtype), weight_VD.to(dtype)
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        grad_MD = torch.empty_like(hidden_MD) if need_hidden else None
        grad_VD = hidden_ND.new_zeros(weight_VD.shape, dtype=torch.float32) if need_weight else None
        total = hidden_ND.new_zeros((), dtype=torch.float32)
        for rows, logprobs_C1, probs_CV in _chunks(hidden_MD, head_VD, labels_N[kept_M], chunk):
            factors_C1 = None if factors_N is None else factors_N[kept_M[rows], None].float()
            total -= (logprobs_C1 if factors_C1 is None else logprobs_C1 * factors_C1).sum()
            slopes_CV = _minus_one_hot_(probs_CV, labels_N[kept_M[rows]])
            slopes_CV = (slopes_CV if factors_C1 is None else slopes_CV.mul_(factors_C1)).to(dtype)
            if grad_MD is not None:
                torch.mm(slopes_CV, head_VD, out=grad_MD[rows])
            if grad_VD is not None:
                accumulate_(grad_VD, hidden_MD[rows], slopes_CV)
        ctx.save_for_backward(grad_MD, grad_VD, kept_M)
        ctx.tokens, ctx.dtypes = len(labels_N), (hidden_ND.dtype, weight_VD.dtype)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: torch.Tensor) -> Any:
        grad_MD, grad_VD, kept_M = ctx.saved_tensors
        hidden_dtype, weight_dtype = ctx.dtypes
        grad_hidden = None if grad_MD is None else _put(grad_MD.mul_(scale).to(hidden_dtype), kept_M, ctx.tokens)
        grad_weight = None if grad_VD is None else grad_VD.mul_(scale).to(weight_dtype)
        return grad_hidden, grad_weight, None, None, None, None


class _SelectiveLogprobs(torch.autograd.Function):
    """Log probabilities and entropies. entropy: "" (none), "told" (no gradient), "trained"."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: torch.Tensor,
        weight_VD: torch.Tensor,
        labels_N: torch.Tensor,
        chunk: int,
        temperature: float,
        dtype: torch.dtype,
        entropy: str,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        kept_M = (labels_N != IGNORE).nonzero().squeeze(1)
        logprobs_M = hidden_ND.new_empty(len(kept_M), dtype=torch.float32)
        entropy_M = torch.empty_like(logprobs_M) if entropy else logprobs_M.new_empty(0)
        hidden_MD, head_VD = _take(hidden_ND, kept_M).to(dtype), weight_VD.to(dtype)
        for rows, logprobs_C1, probs_CV in _chunks(hidden_MD, head_VD, labels_N[kept_M], chunk, temperature):
            logprobs_M[rows] = logprobs_C1.squeeze(1)
            if entropy:
                entropy_M[rows] = torch.special.entr(probs_CV, out=probs_CV).sum(1)
        ctx.save_for_backward(hidden_ND, weight_VD, labels_N, kept_M)
        ctx.settings = chunk, temperature, dtype, entropy == "trained"
        entropy_N = _put(entropy_M, kept_M, len(labels_N)) if entropy else entropy_M
        if entropy != "trained":
            ctx.mark_non_differentiable(entropy_N)
        return _put(logprobs_M, kept_M, len(labels_N)), entropy_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: torch.Tensor, grad_entropy_N: torch.Tensor) -> Any:
        hidden_ND, weight_VD, labels_N, kept_M = ctx.saved_tensors
        chunk, temperature, dtype, with_entropy = ctx.settings
        hidden_MD, head_VD = _take(hidden_ND, kept_M).to(dtype), weight_VD.to(dtype)
        need_weight = ctx.needs_input_grad[1]  # a frozen head costs nothing
        grad_MD = torch.empty_like(hidden_MD)
        grad_VD = hidden_ND.new_zeros(weight_VD.shape, dtype=torch.float32) if need_weight else None
        for rows, _, probs_CV in _chunks(hidden_MD, head_VD, labels_N[kept_M], chunk, temperature):
            factors_C1 = grad_N[kept_M[rows], None] / -temperature
            if with_entropy:  # d entropy / d logit = -p log p - p * entropy
                entropies_CV, slopes_C1 = torch.special.entr(probs_CV), grad_entropy_N[kept_M[rows], None] / temperature
                entropies_CV -= probs_CV * entropies_CV.sum(1, keepdim=True)
                entropies_CV *= slopes_C1
            slopes_CV = _minus_one_hot_(probs_CV, labels_N[kept_M[rows]]).mul_(factors_C1)
            slopes_CV = (slopes_CV.add_(entropies_CV) if with_entropy else slopes_CV).to(dtype)
            torch.mm(slopes_CV, head_VD, out=grad_MD[rows])
            if grad_VD is not None:
                accumulate_(grad_VD, hidden_MD[rows], slopes_CV)
        grad_hidden = _put(grad_MD.to(hidden_ND.dtype), kept_M, len(labels_N))
        grad_weight = None if grad_VD is None else grad_VD.to(weight_VD.dtype)
        return grad_hidden, grad_weight, None, None, None, None, None


def _chunks(
    hidden_MD: torch.Tensor, head_VD: torch.Tensor, labels_M: torch.Tensor, chunk: int, temperature: float = 1.0
) -> Any:
    """For each chunk of tokens: its slice, the labels' logprobs [C, 1], and all probabilities [C, V], both fp32.

    The probabilities stand in one buffer that the caller may spoil and the next chunk overwrites.
    """
    buffer = hidden_MD.new_empty(min(chunk, len(hidden_MD)), head_VD.shape[0])
    for start in range(0, len(hidden_MD), chunk):
        rows = slice(start, start + chunk)
        hidden_CD = hidden_MD[rows]
        logits_CV = torch.mm(hidden_CD, head_VD.T, out=buffer[: len(hidden_CD)]).float()
        if temperature != 1.0:
            logits_CV /= temperature
        own_C1, top_C1 = logits_CV.gather(1, labels_M[rows, None]), logits_CV.amax(1, keepdim=True)
        probs_CV = torch.softmax(logits_CV, 1, out=logits_CV)
        # log of the sum of exponentials, from the one probability that cannot underflow
        yield rows, own_C1 - (top_C1 - probs_CV.amax(1, keepdim=True).log()), probs_CV


def _minus_one_hot_(probs_CV: torch.Tensor, labels_C: torch.Tensor) -> torch.Tensor:
    """The gradient of -log p[label] in the logits, in place of the probabilities."""
    minus_C1 = probs_CV.new_full((len(labels_C), 1), -1.0)
    return probs_CV.scatter_add_(1, labels_C[:, None], minus_C1)


def accumulate_(grad_VD: torch.Tensor, hidden_CD: torch.Tensor, slopes_CV: torch.Tensor) -> None:
    """grad += slopes^T @ hidden in fp32. Laid out as the head is: it is added to the head's other gradients."""
    if slopes_CV.dtype == torch.float32:
        grad_VD.addmm_(slopes_CV.T, hidden_CD)
    else:
        grad_VD += slopes_CV.T @ hidden_CD


def _take(x_ND: torch.Tensor, kept_M: torch.Tensor) -> torch.Tensor:
    return x_ND if len(kept_M) == len(x_ND) else x_ND[kept_M]


def _put(x_M: torch.Tensor, kept_M: torch.Tensor, tokens: int) -> torch.Tensor:
    """Back among `tokens` tokens, 0 for those that were left out."""
    return x_M if len(x_M) == tokens else x_M.new_zeros(tokens, *x_M.shape[1:]).index_copy_(0, kept_M, x_M)


def _product_dtype(hidden: torch.Tensor) -> torch.dtype:
    kind = hidden.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
