"""A student's head against its teacher's: how far apart their next tokens are, a chunk of tokens at a time.

Two tensors of tokens x vocabulary would stand here at once. As in loss.py no more than a chunk of them exists: the
divergence is turned in place into the gradient of the student's logits, multiplied out and overwritten by the next.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from groundup.ops.loss import IGNORE, accumulate_, default_chunk

SMALLEST = 1e-30  # a probability below it counts as this much, where a logarithm is taken


@dataclass(frozen=True)
class Terms:
    """loss = cross_entropy * CE(label) + divergence * D(teacher, student), with D of both at this temperature.

    beta 0: D = KL(teacher || student); 1: KL(student || teacher); between, with M = beta * teacher + (1 - beta) *
    student: D = beta * KL(teacher || M) + (1 - beta) * KL(student || M).
    """

    cross_entropy: float = 0.0
    divergence: float = 1.0
    beta: float = 0.0
    temperature: float = 1.0


@dataclass(frozen=True)
class Beside:
    """A teacher that was run on the same tokens: its last hidden states [..., E], and its head of as many ids as the
    student's. No gradient goes back to it."""

    hidden_NE: Tensor
    head_VE: Tensor


@dataclass(frozen=True)
class Likeliest:
    """What a teacher said before: for each trained token, in their order, its K likeliest next tokens.

    logprobs_MK: at the temperature of the loss, over the whole vocabulary. All other ids together are one further
    outcome, so the divergence is that of K + 1 outcomes: never more than the whole one, and equal to it at K = V.
    """

    ids_MK: Tensor
    logprobs_MK: Tensor


def linear_distill(
    hidden_ND: Tensor,
    head_VD: Tensor,
    teacher: Beside | Likeliest,
    labels_N: Tensor,
    terms: Terms,
    weights_N: Tensor | None = None,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, cross entropy, divergence): fp32 sums over the tokens whose label is not -100.

    The loss has gradients in hidden states and head, as far as they want them; the two others are for people: not
    multiplied by terms or weights_N (a factor for each token's loss). hidden may be [..., D], labels and weights [...].
    Products run in autocast's type, softmax and sums in fp32. chunk: tokens at a time.
    """
    hidden_ND, labels_N = hidden_ND.reshape(-1, hidden_ND.shape[-1]), labels_N.reshape(-1)
    factors_N = None if weights_N is None else weights_N.reshape(-1)
    kind, dtype, size = hidden_ND.device.type, _product_dtype(hidden_ND), chunk or default_chunk(head_VD)
    with torch.autocast(kind, enabled=False):  # it would lower the precision of sums, too
        return _LinearDistill.apply(hidden_ND, head_VD, teacher, labels_N, terms, factors_N, size, dtype)


@torch.no_grad()
def likeliest(
    hidden_NE: Tensor, head_VE: Tensor, labels_N: Tensor, k: int, temperature: float = 1.0, chunk: int | None = None
) -> Likeliest:
    """The k likeliest next tokens of each token whose label is not -100, the likeliest first."""
    kind, dtype, size = hidden_NE.device.type, _product_dtype(hidden_NE), chunk or default_chunk(head_VE)
    kept_M = (labels_N.reshape(-1) != IGNORE).nonzero().squeeze(1)
    hidden_ME, head = hidden_NE.reshape(-1, hidden_NE.shape[-1])[kept_M].to(dtype), head_VE.to(dtype)
    ids_MK = kept_M.new_empty(len(kept_M), k)
    logprobs_MK = torch.empty_like(ids_MK, dtype=torch.float32)
    with torch.autocast(kind, enabled=False):
        for start in range(0, len(kept_M), size):
            rows = slice(start, start + size)
            found = _log_softmax_(torch.mm(hidden_ME[rows], head.T).float(), temperature).topk(k)
            logprobs_MK[rows], ids_MK[rows] = found.values, found.indices
    return Likeliest(ids_MK, logprobs_MK)


def linear_distill_reference(
    hidden_ND: Tensor, head_VD: Tensor, teacher: Beside, labels_N: Tensor, terms: Terms, weights_N: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The plain form: all logits of both at once, torch's own gradients."""
    kept_N = labels_N != IGNORE
    logits_MV = (hidden_ND[kept_N] @ head_VD.T).float()
    teacher_MV = (teacher.hidden_NE[kept_N] @ teacher.head_VE.T).float()
    log_s, log_t = ((each / terms.temperature).log_softmax(-1) for each in (logits_MV, teacher_MV))
    if terms.beta == 0:
        losses_M = (log_t.exp() * (log_t - log_s)).sum(-1)
    elif terms.beta == 1:
        losses_M = (log_s.exp() * (log_s - log_t)).sum(-1)
    else:
        mixed = torch.logaddexp(log_t + math.log(terms.beta), log_s + math.log(1 - terms.beta))
        to_teacher, to_student = (log_t.exp() * (log_t - mixed)).sum(-1), (log_s.exp() * (log_s - mixed)).sum(-1)
        losses_M = terms.beta * to_teacher + (1 - terms.beta) * to_student
    nats_M = torch.nn.functional.cross_entropy(logits_MV, labels_N[kept_N], reduction="none")
    factors_M = 1.0 if weights_N is None else weights_N[kept_N]
    loss = (factors_M * (terms.cross_entropy * nats_M + terms.divergence * losses_M)).sum()
    return loss, nats_M.sum(), losses_M.sum()


class _LinearDistill(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        head_VD: Tensor,
        teacher: Beside | Likeliest,
        labels_N: Tensor,
        terms: Terms,
        factors_N: Tensor | None,
        chunk: int,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor, Tensor]:
        kept_M = (labels_N != IGNORE).nonzero().squeeze(1)  # ignored tokens cost nothing
        labels_M, hidden_MD, head = labels_N[kept_M], hidden_ND[kept_M].to(dtype), head_VD.to(dtype)
        says = _Teacher(teacher, kept_M, terms, dtype)
        need_hidden, need_head = ctx.needs_input_grad[:2]
        grad_MD = torch.empty_like(hidden_MD) if need_hidden else None
        grad_VD = hidden_ND.new_zeros(head_VD.shape, dtype=torch.float32) if need_head else None
        sums = hidden_ND.new_zeros(3, dtype=torch.float32)
        for start in range(0, len(kept_M), chunk):
            rows = slice(start, start + chunk)
            logits_CV = torch.mm(hidden_MD[rows], head.T).float()
            nats_C1, far_C1, slopes_CV = _losses(logits_CV, labels_M[rows], says, rows, terms)
            losses_C1 = terms.cross_entropy * nats_C1 + terms.divergence * far_C1
            if factors_N is not None:
                factors_C1 = factors_N[kept_M[rows], None].float()
                losses_C1, slopes_CV = losses_C1 * factors_C1, slopes_CV.mul_(factors_C1)
            sums += torch.stack([losses_C1.sum(), nats_C1.sum(), far_C1.sum()])
            slopes_CV = slopes_CV.to(dtype)
            if grad_MD is not None:
                torch.mm(slopes_CV, head, out=grad_MD[rows])
            if grad_VD is not None:
                accumulate_(grad_VD, hidden_MD[rows], slopes_CV)
        ctx.save_for_backward(grad_MD, grad_VD, kept_M)
        ctx.shape, ctx.dtypes = hidden_ND.shape, (hidden_ND.dtype, head_VD.dtype)
        loss, nats, far = (sums[i].clone() for i in range(3))
        ctx.mark_non_differentiable(nats, far)
        return loss, nats, far

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor, *_: Any) -> Any:
        grad_MD, grad_VD, kept_M = ctx.saved_tensors
        grad_hidden = grad_head = None
        if grad_MD is not None:
            grad_MD = grad_MD.mul_(scale).to(ctx.dtypes[0])
            grad_hidden = grad_MD.new_zeros(ctx.shape).index_copy_(0, kept_M, grad_MD)
        if grad_VD is not None:
            grad_head = grad_VD.mul_(scale).to(ctx.dtypes[1])
        return grad_hidden, grad_head, None, None, None, None, None, None


class _Teacher:
    """Either kind of teacher, asked for the divergence of a chunk of trained tokens."""

    def __init__(self, teacher: Beside | Likeliest, kept_M: Tensor, terms: Terms, dtype: torch.dtype) -> None:
        self.terms = terms
        if isinstance(teacher, Beside):
            hidden_NE = teacher.hidden_NE.reshape(-1, teacher.hidden_NE.shape[-1])
            self.hidden_ME, self.head_VE = hidden_NE[kept_M].to(dtype), teacher.head_VE.to(dtype)
            self.against = self._beside
        else:
            self.likeliest, self.against = teacher, self._likeliest

    def _beside(self, log_s_CV: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        log_t_CV = torch.mm(self.hidden_ME[rows], self.head_VE.T).float()
        return _divergence(log_s_CV, _log_softmax_(log_t_CV, self.terms.temperature), self.terms.beta)

    def _likeliest(self, log_s_CV: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        """By K + 1 outcomes. The slope of the last, all other ids, is shared among them by their probabilities."""
        ids_CK, log_t_CK = self.likeliest.ids_MK[rows].long(), self.likeliest.logprobs_MK[rows].float()
        log_s_CK = log_s_CV.gather(1, ids_CK)
        others_CV = log_s_CV.exp_().scatter_(1, ids_CK, 0.0)
        rest_s_C1 = others_CV.sum(1, keepdim=True).clamp_(min=SMALLEST)
        rest_t_C1 = (1 - log_t_CK.exp().sum(1, keepdim=True)).clamp_(min=SMALLEST)
        log_s_CE, log_t_CE = torch.cat([log_s_CK, rest_s_C1.log()], 1), torch.cat([log_t_CK, rest_t_C1.log()], 1)
        far_C1, slopes_CE = _divergence(log_s_CE, log_t_CE, self.terms.beta)
        slopes_CV = others_CV.mul_(slopes_CE[:, -1:] / rest_s_C1)
        return far_C1, slopes_CV.scatter_(1, ids_CK, slopes_CE[:, :-1])


def _losses(
    logits_CV: Tensor, labels_C: Tensor, says: _Teacher, rows: slice, terms: Terms
) -> tuple[Tensor, Tensor, Tensor]:
    """(cross entropies [C, 1], divergences [C, 1], the gradient of their weighted sum in the logits [C, V])."""
    labels_C1, own = labels_C[:, None], terms.cross_entropy
    minus_C1 = logits_CV.new_full(labels_C1.shape, -own)
    if terms.temperature == 1.0:
        log_s_CV = _log_softmax_(logits_CV, 1.0)
        nats_C1 = -log_s_CV.gather(1, labels_C1)
        probs_CV = log_s_CV.exp().mul_(own) if own else None
    else:
        nats_C1 = logits_CV.logsumexp(1, keepdim=True) - logits_CV.gather(1, labels_C1)
        probs_CV = logits_CV.softmax(1).mul_(own) if own else None
        log_s_CV = _log_softmax_(logits_CV, terms.temperature)
    far_C1, slopes_CV = says.against(log_s_CV, rows)
    slopes_CV *= terms.divergence / terms.temperature
    if probs_CV is not None:
        slopes_CV += probs_CV
        slopes_CV.scatter_add_(1, labels_C1, minus_C1)
    return nats_C1, far_C1, slopes_CV


def _log_softmax_(logits_CV: Tensor, temperature: float) -> Tensor:
    """In place of the logits."""
    if temperature != 1.0:
        logits_CV /= temperature
    return torch.log_softmax(logits_CV, 1, out=logits_CV)


def _divergence(log_s_CV: Tensor, log_t_CV: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """(D [C, 1], its gradient in the student's logits, [C, V]). Both arguments are used up.

    A divergence sum f(s, t) has the gradient s * (g - sum s g) with g = df/ds: -t / s for KL(teacher || student),
    log(s / t) for KL(student || teacher), (1 - beta) * log(s / M) for the mixture M.
    """
    probs_t_CV = log_t_CV.exp() if beta < 1 else None
    ratio_CV = log_t_CV.neg_().add_(log_s_CV)  # log(s / t)
    probs_s_CV = log_s_CV.exp_()
    if probs_t_CV is None:
        far_C1 = _dot(probs_s_CV, ratio_CV)
        return far_C1, ratio_CV.sub_(far_C1).mul_(probs_s_CV)
    if beta == 0:
        return -_dot(probs_t_CV, ratio_CV), probs_s_CV.sub_(probs_t_CV)
    base = log_s_CV.new_tensor(math.log(1 - beta))
    to_mixed_CV = torch.logaddexp(base, math.log(beta) - ratio_CV).neg_()  # log(s / M)
    student_C1 = _dot(probs_s_CV, to_mixed_CV)
    teacher_C1 = _dot(probs_t_CV, to_mixed_CV) - _dot(probs_t_CV, ratio_CV)
    slopes_CV = to_mixed_CV.sub_(student_C1).mul_(probs_s_CV).mul_(1 - beta)
    return beta * teacher_C1 + (1 - beta) * student_C1, slopes_CV


def _dot(a_CV: Tensor, b_CV: Tensor) -> Tensor:
    """The rows' scalar products, [C, 1], without a tensor of the products."""
    return torch.bmm(a_CV[:, None], b_CV[:, :, None]).squeeze(2)


def _product_dtype(hidden: Tensor) -> torch.dtype:
    kind = hidden.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
