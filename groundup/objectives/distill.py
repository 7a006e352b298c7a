"""How far is a student from its teacher? In what it says, in its hidden states, in whom its tokens listen to.

Each is a sum over the tokens whose label is not -100, so that all have the count of the next token's loss.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from groundup.ops.distill import Beside, Likeliest, Terms, linear_distill
from groundup.ops.loss import IGNORE

QUERIES = 128  # tokens whose attention is compared at a time


def distill(
    hidden_BTD: Tensor,
    head_VD: Tensor,
    teacher: Beside | Likeliest,
    labels_BT: Tensor,
    terms: Terms,
    weights_BT: Tensor | None = None,
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """(sum, count, {"cross_entropy", "divergence"}: plain sums over the same count), in nats.

    Terms(alpha, (1 - alpha) * T^2, beta=0, temperature=T) is Hinton et al.'s loss, arXiv 1503.02531, section 2.
    Terms(0, 1, beta) is GKD's generalised Jensen-Shannon divergence, arXiv 2306.13649, equation 1 (as in TRL, beta 0
    and 1 stand for the two KLs that it tends to when divided by its size). Reverse KL: MiniLLM, arXiv 2306.08543.
    """
    width = len(head_VD)
    if isinstance(teacher, Beside):  # ids that only one of them has, beyond the tokenizer's, are compared by none
        width = min(width, len(teacher.head_VE))
        teacher = Beside(teacher.hidden_NE, teacher.head_VE[:width])
    loss, nats, far = linear_distill(hidden_BTD, head_VD[:width], teacher, labels_BT, terms, weights_BT)
    return loss, (labels_BT != IGNORE).sum(), {"cross_entropy": nats, "divergence": far}


def match_hidden(student_BTD: Tensor, teacher_BTE: Tensor, labels_BT: Tensor, projection_ED: Tensor | None) -> Tensor:
    """Sum over tokens of the mean squared difference of projection @ student and teacher.

    TinyBERT, arXiv 1909.10351, equation 8 (the projection: FitNets, arXiv 1412.6550). Each state is first divided by
    its own root mean square: residual streams grow from layer to layer, and a few of their numbers are huge.
    """
    kept_BT = labels_BT != IGNORE
    student_MD, teacher_ME = (_unit(x[kept_BT].float()) for x in (student_BTD, teacher_BTE))
    projected_ME = student_MD if projection_ED is None else F.linear(student_MD, projection_ED)
    return (projected_ME.float() - teacher_ME).square().mean(-1).sum()


def match_attention(
    student: tuple[Tensor, Tensor],
    teacher: tuple[Tensor, Tensor],
    labels_BT: Tensor,
    doc_ids_BT: Tensor,
    mix_HG: Tensor | None,
) -> Tensor:
    """Sum over tokens of KL(teacher's attention || student's), the mean over heads. MiniLM, arXiv 2002.10957, eq. 6.

    student, teacher: queries [B, T, heads, d] and keys [B, T, kv heads, d], turned by their positions. mix_HG: each of
    the teacher's H heads is compared with a learnt mixture of the student's G; None: with its own, where H = G.
    """
    total = student[0].new_zeros((), dtype=torch.float32)
    for row in range(len(labels_BT)):
        asking = (labels_BT[row] != IGNORE).nonzero().squeeze(1)
        for at_Q in asking.split(QUERIES):
            queries_keys = [x[row] for pair in (student, teacher) for x in pair]
            with torch.autocast(total.device.type, enabled=False):
                total = total + checkpoint(
                    _attention_distance, *queries_keys, doc_ids_BT[row], at_Q, mix_HG, use_reentrant=False
                )
    return total


def _attention_distance(
    student_q: Tensor, student_k: Tensor, teacher_q: Tensor, teacher_k: Tensor, docs_T: Tensor, at_Q: Tensor,
    mix_HG: Tensor | None,
) -> Tensor:  # fmt: skip
    places_T = torch.arange(len(docs_T), device=docs_T.device)
    seen_QT = (docs_T[at_Q, None] == docs_T) & (places_T <= at_Q[:, None])
    student_GQT, teacher_HQT = _scores(student_q[at_Q], student_k), _scores(teacher_q[at_Q], teacher_k)
    if mix_HG is not None:
        student_GQT = torch.einsum("hg,gqt->hqt", mix_HG.float(), student_GQT)
    hidden = torch.finfo(torch.float32).min
    log_s, log_t = (x.masked_fill(~seen_QT, hidden).log_softmax(-1) for x in (student_GQT, teacher_HQT))
    far_HQT = torch.where(seen_QT, log_t.exp() * (log_t - log_s), 0.0)
    return far_HQT.sum() / len(far_HQT)


def _scores(q_QHd: Tensor, k_TKd: Tensor) -> Tensor:
    """q k^T / sqrt(d) of each query head, [H, Q, T], fp32."""
    group = q_QHd.shape[1] // k_TKd.shape[1]
    q_HQd, k_HTd = q_QHd.float().transpose(0, 1), k_TKd.float().transpose(0, 1).repeat_interleave(group, 0)
    return q_HQd @ k_HTd.transpose(1, 2) * q_QHd.shape[-1] ** -0.5


def _unit(x_MD: Tensor) -> Tensor:
    return x_MD * (x_MD.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
