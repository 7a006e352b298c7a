"""Log probabilities and entropies from one pass of chunks equal the plain forms and TRL's, gradients included."""

from __future__ import annotations

import math

import pytest
import torch

from groundup.ops.loss import entropy, selective_logprobs, selective_logprobs_and_entropy

TOKENS, WIDTH, VOCAB = 37, 16, 53


def case(spread: float = 1.0):
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, WIDTH, generator=draw).mul(spread).requires_grad_()
    weight = torch.randn(VOCAB, WIDTH, generator=draw).requires_grad_()
    labels = torch.randint(0, VOCAB, (TOKENS,), generator=draw)
    labels[::5] = -100
    return hidden, weight, labels


def plain(hidden, weight, labels, temperature):
    logprobs = torch.log_softmax(hidden @ weight.T / temperature, -1)
    entropies = -(logprobs.exp() * logprobs).sum(-1)
    own = labels != -100
    picked = logprobs.gather(1, labels.clamp(min=0)[:, None]).squeeze(1)
    return torch.where(own, picked, 0.0), torch.where(own, entropies, 0.0)


@pytest.mark.parametrize("spread", [0.1, 1.0, 5.0])
@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.5])
@pytest.mark.parametrize("chunk", [1, 7, None])
def test_values_and_gradients_equal_the_plain_form(chunk, temperature, spread):
    hidden, weight, labels = case(spread)
    draw = torch.Generator().manual_seed(1)
    a, b = torch.randn(TOKENS, generator=draw), torch.randn(TOKENS, generator=draw)
    ours = selective_logprobs_and_entropy(hidden, weight, labels, chunk, temperature, entropy_grad=True)
    theirs = plain(hidden, weight, labels, temperature)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-5)
    gradients = [torch.autograd.grad((a * x[0] + b * x[1]).sum(), (hidden, weight)) for x in (ours, theirs)]
    torch.testing.assert_close(*gradients, atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(selective_logprobs(hidden, weight, labels, chunk, temperature), ours[0])


def test_gradients_by_finite_differences():
    hidden, weight, labels = (x.detach()[:4] if i == 0 else x.detach() for i, x in enumerate(case()))
    weight, labels = weight[:6], labels[:4] % 6

    def total(hidden, weight):
        logprobs, entropies = selective_logprobs_and_entropy(hidden, weight, labels, 3, 0.8, entropy_grad=True)
        return (logprobs * 0.3 + entropies * 1.7).sum()

    hidden, weight = hidden.requires_grad_(), weight.clone().requires_grad_()
    grads = torch.autograd.grad(total(hidden, weight), (hidden, weight))
    for which, grad in enumerate(grads):
        step = torch.zeros_like((hidden, weight)[which])
        step[1, 2] = 1e-2
        sides = [
            total(*(x + s * step if i == which else x for i, x in enumerate((hidden, weight)))).item() for s in (1, -1)
        ]
        assert grad[1, 2].item() == pytest.approx((sides[0] - sides[1]) / 2e-2, abs=2e-3)


def test_without_entropy_grad_it_is_told_and_no_more():
    hidden, weight, labels = case()
    logprobs, entropies = selective_logprobs_and_entropy(hidden, weight, labels)
    assert logprobs.requires_grad and not entropies.requires_grad
    (logprobs.sum() - 5 * entropies.sum()).backward()
    alone = torch.autograd.grad(selective_logprobs(hidden, weight, labels).sum(), (hidden, weight))
    assert torch.equal(hidden.grad, alone[0]) and torch.equal(weight.grad, alone[1])
    assert not entropy(hidden, weight, labels).requires_grad
    assert torch.equal(entropy(hidden, weight, labels), entropies)


def test_an_entropy_bonus_alone_flattens_the_distribution():
    hidden, weight, labels = case()
    before = entropy(hidden, weight, labels).sum()
    gain = selective_logprobs_and_entropy(hidden, weight, labels, entropy_grad=True)[1].sum()
    (grad,) = torch.autograd.grad(gain, hidden)
    assert entropy(hidden + 0.01 * grad, weight, labels).sum() > before
    assert not grad[labels == -100].any()


def test_extremes():
    """All tokens alike: log V. One certain token: 0, not NaN, though the others' probabilities underflow."""
    weight, labels = torch.eye(4), torch.tensor([1, 2])
    hidden = torch.tensor([[0.0, 0, 0, 0], [0.0, 0, 900, 0]], requires_grad=True)
    logprobs, entropies = selective_logprobs_and_entropy(hidden, weight, labels, entropy_grad=True)
    assert entropies.tolist() == pytest.approx([math.log(4), 0.0])
    assert logprobs.tolist() == pytest.approx([-math.log(4), 0.0])
    (logprobs + entropies).sum().backward()
    assert hidden.grad.isfinite().all() and not hidden.grad[1].any()


def test_shapes_frozen_parts_and_nothing_trained():
    hidden, weight, labels = case()
    batched = selective_logprobs_and_entropy(hidden[:36].view(4, 9, WIDTH), weight, labels[:36].view(4, 9))
    assert [x.shape for x in batched] == [(4, 9), (4, 9)]
    none = selective_logprobs_and_entropy(hidden, weight.detach(), torch.full_like(labels, -100), entropy_grad=True)
    (none[0] + none[1]).sum().backward()
    assert not none[0].any() and not none[1].any() and not hidden.grad.any() and weight.grad is None


def test_products_in_half_precision_sums_in_single():
    hidden, weight, labels = case()
    with torch.autocast("cpu", torch.bfloat16):
        ours = selective_logprobs_and_entropy(hidden, weight, labels)
    theirs = plain(hidden, weight, labels, 1.0)
    assert all(x.dtype == torch.float32 for x in ours)
    torch.testing.assert_close(ours, tuple(x.detach() for x in theirs), atol=0.1, rtol=0.05)


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_trl_says_the_same(temperature):
    utils = pytest.importorskip("trl.trainer.utils", reason="the reference of log probabilities and entropy")
    hidden, weight, labels = case()
    own = labels != -100
    theirs = utils.selective_log_softmax_and_entropy(
        hidden @ weight.T, labels.clamp(min=0), temperature=temperature, row_mask=own.long()
    )
    ours = selective_logprobs_and_entropy(hidden, weight, labels, temperature=temperature, entropy_grad=True)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, torch.where(own, b, 0.0), atol=1e-5, rtol=1e-5)
    gradients = [torch.autograd.grad((x[0] - 0.3 * x[1])[own].sum(), (hidden, weight)) for x in (ours, theirs)]
    torch.testing.assert_close(*gradients, atol=1e-4, rtol=1e-4)
