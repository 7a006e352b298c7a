"""Distillation's losses: against TRL's, against torch's own, and in their limits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from groundup.config import DistillConfig
from groundup.objectives.distill import QUERIES, distill, match_attention, match_hidden
from groundup.ops.distill import Beside, Likeliest, Terms

MADE = json.loads((Path(__file__).parent / "fixtures" / "distill.json").read_text(encoding="utf-8"))
STUDENT, TEACHER, LABELS = (torch.tensor(MADE[name]) for name in ("student", "teacher", "labels"))


def ours(student: torch.Tensor, teacher: torch.Tensor, labels: torch.Tensor, terms: Terms) -> tuple[Any, Any, Any]:
    """Of logits: hidden states are they themselves, heads the identity."""
    eye = torch.eye(student.shape[-1])
    return distill(student, eye, Beside(teacher, eye), labels, terms)


@pytest.mark.parametrize("case", MADE["cases"], ids=lambda c: f"beta {c['beta']}, temperature {c['temperature']}")
def test_gkd_is_trl_s(case: dict[str, Any]) -> None:
    leaf = STUDENT.clone().requires_grad_()
    terms = Terms(0.0, 1.0, case["beta"], case["temperature"])
    loss, count, metrics = ours(leaf, TEACHER, LABELS, terms)
    assert count == 7
    torch.testing.assert_close(loss.item(), case["loss"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(metrics["divergence"], loss.detach())
    (slopes,) = torch.autograd.grad(loss, leaf)
    torch.testing.assert_close(slopes, torch.tensor(case["slopes"]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_gkd_is_a_live_trl_s(beta: float) -> None:
    trainer = pytest.importorskip("trl.experimental.gkd.gkd_trainer", reason="TRL is not installed").GKDTrainer
    generator = torch.Generator().manual_seed(7)
    student, teacher = (4 * torch.randn(3, 11, 29, generator=generator) for _ in range(2))
    labels = torch.randint(0, 29, (3, 11), generator=generator).masked_fill(torch.rand(3, 11) < 0.3, -100)
    theirs = trainer.generalized_jsd_loss(student, teacher, labels, beta, 1.4, reduction="sum")
    torch.testing.assert_close(
        ours(student, teacher, labels, Terms(0.0, 1.0, beta, 1.4))[0], theirs, atol=1e-5, rtol=1e-5
    )


def test_beta_names_the_two_kls() -> None:
    kept = LABELS != -100
    s, t = STUDENT[kept].log_softmax(-1), TEACHER[kept].log_softmax(-1)
    forward = F.kl_div(s, t, reduction="sum", log_target=True)  # KL(teacher || student)
    reverse = F.kl_div(t, s, reduction="sum", log_target=True)
    assert abs(forward - reverse) > 1  # the test could not tell them apart otherwise
    torch.testing.assert_close(ours(STUDENT, TEACHER, LABELS, Terms(0.0, 1.0, 0.0))[0], forward)
    torch.testing.assert_close(ours(STUDENT, TEACHER, LABELS, Terms(0.0, 1.0, 1.0))[0], reverse)
    for beta, limit in ((1e-4, forward / 1), (1 - 1e-4, reverse)):  # D / beta, D / (1 - beta) tend to them
        scaled = ours(STUDENT, TEACHER, LABELS, Terms(0.0, 1.0, beta))[0] / min(beta, 1 - beta)
        assert scaled.item() == pytest.approx(limit.item(), rel=0.02)


def test_jsd_is_symmetric_at_a_half() -> None:
    one, other = (ours(*pair, LABELS, Terms(0.0, 1.0, 0.5))[0] for pair in ((STUDENT, TEACHER), (TEACHER, STUDENT)))
    torch.testing.assert_close(one, other)
    assert one < 7 * torch.log(torch.tensor(2.0))  # at most ln 2 a token


def test_classic_distillation_is_hinton_s_and_gkd_has_no_square() -> None:
    """alpha * CE + (1 - alpha) * T^2 * KL, as the recipe's settings make it of Terms."""
    temperature, alpha, kept = 3.0, 0.4, LABELS != -100
    kl = F.kl_div(
        (STUDENT[kept] / temperature).log_softmax(-1), (TEACHER[kept] / temperature).softmax(-1), reduction="sum"
    )
    nats = F.cross_entropy(STUDENT[kept], LABELS[kept], reduction="sum")
    for name, factor in (("forward_kl", temperature**2), ("jsd", 1.0)):
        config = DistillConfig(teacher="t", alpha=alpha, temperature=temperature, divergence=name, beta=0.0)
        terms = Terms(config.alpha, config.weight, config.mixture, config.temperature)
        loss, _, metrics = ours(STUDENT, TEACHER, LABELS, terms)
        torch.testing.assert_close(loss, alpha * nats + (1 - alpha) * factor * kl)
        torch.testing.assert_close(metrics["cross_entropy"], nats)
        torch.testing.assert_close(metrics["divergence"], kl)


def test_token_weights_are_factors_of_both_terms() -> None:
    weights = torch.rand(2, 5, generator=torch.Generator().manual_seed(3)) * 10
    eye, terms = torch.eye(7), Terms(0.5, 0.5, 0.5)
    whole = distill(STUDENT, eye, Beside(TEACHER, eye), LABELS, terms, weights)[0]
    single = sum(
        weights[place]
        * distill(STUDENT[place][None], eye, Beside(TEACHER[place][None], eye), LABELS[place][None], terms)[0]
        for place in zip(*(LABELS != -100).nonzero(as_tuple=True), strict=True)
    )
    torch.testing.assert_close(whole, single)


def test_a_wider_teacher_is_cut_to_the_student_s_ids() -> None:
    """Ids beyond the tokenizer's pad a head up to a round number; they are no part of either distribution."""
    padded = torch.cat([torch.eye(7), torch.full((3, 7), 50.0)])
    terms, eye = Terms(0.2, 0.8), torch.eye(7)
    alone = distill(STUDENT, eye, Beside(TEACHER, eye), LABELS, terms)[0]
    torch.testing.assert_close(distill(STUDENT, eye, Beside(TEACHER, padded), LABELS, terms)[0], alone)
    torch.testing.assert_close(distill(STUDENT, padded, Beside(TEACHER, eye), LABELS, terms)[0], alone)


def test_top_k_counts_over_the_same_tokens() -> None:
    kept = LABELS != -100
    taught = TEACHER[kept].log_softmax(-1).topk(7)
    says = Likeliest(taught.indices, taught.values)
    loss, count, _ = distill(STUDENT, torch.eye(7), says, LABELS, Terms(0.1, 0.9))
    whole = ours(STUDENT, TEACHER, LABELS, Terms(0.1, 0.9))
    assert count == whole[1]
    torch.testing.assert_close(loss, whole[0], atol=1e-4, rtol=1e-4)


def test_hidden_states_are_compared_in_direction_through_a_projection() -> None:
    generator = torch.Generator().manual_seed(1)
    student, teacher = torch.randn(2, 5, 6, generator=generator), torch.randn(2, 5, 9, generator=generator)
    projection = torch.randn(9, 6, generator=generator).requires_grad_()
    kept = LABELS != -100
    a, b = (x[kept] / x[kept].square().mean(-1, keepdim=True).sqrt() for x in (student, teacher))
    plain = sum(F.mse_loss(projection @ x, y) for x, y in zip(a, b, strict=True))
    found = match_hidden(student, teacher, LABELS, projection)
    torch.testing.assert_close(found, plain, atol=1e-4, rtol=1e-4)
    assert torch.autograd.grad(found, projection)[0].abs().sum() > 0
    assert match_hidden(3 * teacher, teacher, LABELS, None) < 1e-6 < match_hidden(-teacher, teacher, LABELS, None)


def heads(number: int, kv: int, dim: int, seed: int, tokens: int = 9) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, tokens, number, dim, generator=generator), torch.randn(
        2, tokens, kv, dim, generator=generator
    )


def plain_attention(queries: torch.Tensor, keys: torch.Tensor, docs: torch.Tensor, mix: Any = None) -> torch.Tensor:
    """[B, H, T, T], by loops over who sees whom."""
    keys = keys.repeat_interleave(queries.shape[2] // keys.shape[2], 2)
    scores = torch.einsum("bthd,bshd->bhts", queries, keys) / queries.shape[-1] ** 0.5
    scores = scores if mix is None else torch.einsum("hg,bgts->bhts", mix, scores)
    for b in range(len(docs)):
        for t in range(docs.shape[1]):
            for s in range(docs.shape[1]):
                if s > t or docs[b, s] != docs[b, t]:
                    scores[b, :, t, s] = -torch.inf
    return scores.softmax(-1)


@pytest.mark.parametrize("mixed", [False, True])
def test_attention_is_compared_inside_documents(mixed: bool) -> None:
    student, teacher = heads(4, 2, 8, 1), heads(6 if mixed else 4, 2, 16, 2)
    mix = torch.rand(6, 4, generator=torch.Generator().manual_seed(3)).requires_grad_() if mixed else None
    docs = torch.tensor([[0, 0, 0, 1, 1, 1, 1, -1, -1], [0] * 9])
    labels = torch.randint(0, 5, (2, 9), generator=torch.Generator().manual_seed(4))
    labels[0, 7:] = labels[1, :3] = -100
    ours, theirs = plain_attention(*student, docs, mix), plain_attention(*teacher, docs)
    far = torch.where(theirs > 0, theirs * (theirs / ours).log(), 0.0).sum(-1).mean(1)
    student[0].requires_grad_()
    found = match_attention(student, teacher, labels, docs, mix)
    torch.testing.assert_close(found, far[labels != -100].sum(), atol=1e-4, rtol=1e-4)
    slopes = torch.autograd.grad(found, [student[0], *([mix] if mix is not None else [])])
    assert all(s.isfinite().all() and s.abs().sum() > 0 for s in slopes)
    assert match_attention(teacher, teacher, labels, docs, None).abs() < 1e-5


def test_attention_is_compared_in_blocks_of_queries() -> None:
    tokens = QUERIES + 30
    student, teacher = heads(2, 1, 4, 1, tokens), heads(2, 2, 4, 2, tokens)
    docs, labels = torch.zeros(2, tokens), torch.zeros(2, tokens, dtype=torch.long)
    whole = match_attention(student, teacher, labels, docs, None)
    halves = 0.0
    for part in (slice(0, 70), slice(70, tokens)):
        some = torch.full_like(labels, -100)
        some[:, part] = 0
        halves += match_attention(student, teacher, some, docs, None)
    torch.testing.assert_close(whole, halves, atol=1e-3, rtol=1e-5)
