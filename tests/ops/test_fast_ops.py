"""Every hand-written forward and backward equals autograd over the plain formula."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from groundup.ops.norm import norm_linear, rms_norm, rms_norm_reference
from groundup.ops.rope import apply_rope, norm_and_turn, pairs_first
from groundup.ops.swiglu import residual_ffn, swiglu

EPS = 1e-5


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def assert_same(fast, plain, inputs, tolerance: float = 1e-4) -> None:
    """Outputs, and gradients of every input under a random slope for each output."""
    fast, plain = ((out,) if isinstance(out, torch.Tensor) else out for out in (fast, plain))
    slopes = [torch.randn(out.shape, generator=torch.Generator().manual_seed(9)) for out in plain]
    for a, b in zip(fast, plain, strict=True):
        torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)
    for a, b in zip(torch.autograd.grad(fast, inputs, slopes), torch.autograd.grad(plain, inputs, slopes), strict=True):
        torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


def test_rms_norm():
    x, weight = random(3, 5, 16), random(16, seed=1)
    assert_same(rms_norm(x, weight, EPS), rms_norm_reference(x, weight, EPS), (x, weight))
    expected = F.rms_norm(x, (16,), weight, EPS)
    torch.testing.assert_close(rms_norm(x, weight, EPS), expected)
    tiny = x.detach() * 1e-4  # here eps decides
    torch.testing.assert_close(rms_norm(tiny, weight, EPS), F.rms_norm(tiny, (16,), weight, EPS))
    assert not rms_norm(torch.zeros(2, 16), weight, EPS).any()


def test_rms_norm_keeps_half_precision():
    x = random(4, 16).to(torch.bfloat16)
    assert rms_norm(x, torch.ones(16), EPS).dtype == torch.bfloat16


@pytest.mark.parametrize("biased", [False, True])
def test_norm_linear_passes_the_residual_on(biased):
    x, weight = random(7, 16), random(24, 16, seed=1)
    bias = random(24, seed=2) if biased else None
    inputs = (x, weight) if bias is None else (x, weight, bias)
    plain = (x * 1.0, F.linear(rms_norm_reference(x, torch.ones(16), EPS), weight, bias))
    assert_same(norm_linear(x, weight, bias, EPS), plain, inputs)


def test_frozen_matrices_get_no_gradient():
    x, weight = random(7, 16), random(24, 16, seed=1).detach()
    kept, out = norm_linear(x, weight, None, EPS)
    (kept.sum() + out.sum()).backward()
    assert x.grad is not None and weight.grad is None


@pytest.mark.parametrize("tokens", [1, 5, 600])  # 600: two chunks, the last one short
def test_residual_ffn(tokens):
    x, gate, up, down = random(tokens, 8), random(12, 8, seed=1), random(12, 8, seed=2), random(8, 12, seed=3)
    hat = rms_norm_reference(x, torch.ones(8), EPS)
    plain = x + swiglu(hat @ gate.T, hat @ up.T) @ down.T
    assert_same(residual_ffn(x, torch.cat([gate, up]), down, EPS), plain, (x, gate, up, down), 1e-3)


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("groups", [(1, 4), (2, 2), (3, 1)])
def test_norm_and_turn(groups, normed):
    """Against norm, then apply_rope in Hugging Face's order of pairs; the outputs differ in that order alone."""
    kv_heads, group = groups
    rows, length, dim, heads = 2, 5, 8, kv_heads * group
    q, k, v = (
        random(rows, length, heads, dim),
        random(rows, length, kv_heads, dim, seed=1),
        random(rows, length, kv_heads, dim, seed=2),
    )
    q_weight, k_weight = random(dim, seed=3), random(dim, seed=4)
    angle = random(rows, length, dim // 2, seed=5).detach()
    cos, sin = angle.cos() * 1.3, angle.sin() * 1.3  # YaRN scales them

    def paired(x: torch.Tensor) -> torch.Tensor:
        return pairs_first(x.movedim(-1, 0), dim).flatten(0, 2).movedim(0, -1)

    qn, kn = (rms_norm_reference(q, q_weight, EPS), rms_norm_reference(k, k_weight, EPS)) if normed else (q, k)
    plain_q = paired(apply_rope(qn, cos, sin)).unflatten(2, groups)
    plain = (plain_q, paired(apply_rope(kn, cos, sin)), v * 1.0)
    scales = None
    if normed:
        scales = torch.cat([paired(q_weight).expand(heads, -1), paired(k_weight).expand(kv_heads, -1)])
    joint = torch.cat([paired(q), paired(k), v], 2)
    fast = norm_and_turn(joint, scales, torch.complex(cos, sin), groups, EPS)
    assert_same(fast, plain, (q, k, v, q_weight, k_weight) if normed else (q, k, v))


def test_rope_turns_by_relative_position():
    """q at m against k at n depends on m - n alone."""
    q, k = random(1, 1, 1, 16), random(1, 1, 1, 16, seed=1)
    inv_freq = 10.0 ** -torch.arange(8.0)

    def score(m: int, n: int) -> torch.Tensor:
        turned = [
            apply_rope(x, (p * inv_freq).cos()[None, None], (p * inv_freq).sin()[None, None])
            for x, p in ((q, m), (k, n))
        ]
        return (turned[0] * turned[1]).sum()

    torch.testing.assert_close(score(7, 3), score(104, 100), atol=1e-4, rtol=1e-4)
    assert abs(score(7, 3) - score(7, 4)) > 1e-3
