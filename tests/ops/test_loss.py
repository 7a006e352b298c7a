"""The chunked head equals the plain one: value, gradients, ignored labels, weights."""

from __future__ import annotations

import pytest
import torch

from groundup.ops.loss import linear_cross_entropy, linear_cross_entropy_reference, selective_logprobs


def case(tokens: int = 37, width: int = 16, vocab: int = 53, dtype: torch.dtype = torch.float32, spread: float = 1.0):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, width, generator=generator).mul(spread).to(dtype).requires_grad_()
    weight = torch.randn(vocab, width, generator=generator).to(dtype).requires_grad_()
    labels = torch.randint(0, vocab, (tokens,), generator=generator)
    labels[::5] = -100
    return hidden, weight, labels


@pytest.mark.parametrize("spread", [1.0, 100.0])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("chunk", [1, 7, 1000, None])
def test_loss_and_gradients_equal_the_plain_form(chunk, weighted, spread):
    hidden, weight, labels = case(spread=spread)
    weights = torch.rand(37, generator=torch.Generator().manual_seed(1)) if weighted else None
    ours = linear_cross_entropy(hidden, weight, labels, chunk=chunk, weights_N=weights)
    ours_grads = torch.autograd.grad(ours * 0.3, (hidden, weight))
    plain = linear_cross_entropy_reference(hidden, weight, labels, weights)
    plain_grads = torch.autograd.grad(plain * 0.3, (hidden, weight))
    torch.testing.assert_close(ours, plain, atol=1e-4, rtol=1e-5)
    for a, b in zip(ours_grads, plain_grads, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_extreme_logits_stay_exact():
    """A label whose probability underflows in fp32 still has the loss that its logits say."""
    weight = torch.eye(3)
    hidden = torch.tensor([[0.0, 300.0, 0.0], [0.0, 0.0, 90.0]], requires_grad=True)
    loss = linear_cross_entropy(hidden, weight, torch.tensor([0, 1]))
    assert loss.item() == pytest.approx(390.0)


def test_shapes_of_a_batch_and_no_trained_token():
    hidden, weight, labels = case(tokens=36)
    batched = linear_cross_entropy(hidden.view(4, 9, 16), weight, labels.view(4, 9))
    torch.testing.assert_close(batched, linear_cross_entropy(hidden, weight, labels))
    none = linear_cross_entropy(hidden, weight, torch.full_like(labels, -100))
    none.backward()
    assert none.item() == 0 and not hidden.grad.any() and not weight.grad.any()


def test_only_what_needs_a_gradient_gets_one():
    hidden, weight, labels = case()
    linear_cross_entropy(hidden, weight.detach(), labels).backward()
    assert hidden.grad is not None
    linear_cross_entropy(hidden.detach(), weight, labels).backward()
    assert weight.grad is not None
    with torch.no_grad():
        linear_cross_entropy(hidden, weight, labels)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("chunk", [5, None])
def test_selective_logprobs_equal_log_softmax(chunk, temperature):
    hidden, weight, labels = case(tokens=36)
    slopes = torch.randn(4, 9, generator=torch.Generator().manual_seed(2))
    ours = selective_logprobs(hidden.view(4, 9, 16), weight, labels.view(4, 9), chunk, temperature)
    ours_grads = torch.autograd.grad((ours * slopes).sum(), (hidden, weight))
    kept = labels != -100
    plain = (hidden @ weight.T / temperature).log_softmax(-1).gather(1, labels.clamp(min=0)[:, None])[:, 0] * kept
    plain_grads = torch.autograd.grad((plain * slopes.view(-1)).sum(), (hidden, weight))
    assert ours.shape == (4, 9) and not ours.view(-1)[~kept].any()
    torch.testing.assert_close(ours.view(-1), plain, atol=1e-5, rtol=1e-5)
    for a, b in zip(ours_grads, plain_grads, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_half_precision_inside_autocast_keeps_fp32_gradients():
    hidden, weight, labels = case()
    exact = linear_cross_entropy(hidden, weight, labels)
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight, labels)
        logprobs = selective_logprobs(hidden, weight, labels)
    loss.backward()
    assert loss.dtype == logprobs.dtype == hidden.grad.dtype == weight.grad.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=0.02)
    assert -logprobs.sum().item() == pytest.approx(exact.item(), rel=0.02)


def test_labels_do_not_make_the_caller_keep_logits():
    """What autograd keeps between forward and backward is as large as the gradients, not tokens x vocabulary."""
    tokens, width, vocab = 512, 8, 4096
    hidden, weight, labels = case(tokens, width, vocab)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        linear_cross_entropy(hidden, weight, labels)
        selective_logprobs(hidden, weight, labels)
    assert sum(kept) < tokens * vocab / 10
