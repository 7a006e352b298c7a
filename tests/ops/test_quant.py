"""The quantisation schemes against known values, against torch's own operators, and by what must always hold."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from groundup.ops.quant import (
    Grouped,
    MinMax,
    Percentile,
    dynamic_linear,
    fake_quantize,
    int_product,
    levels,
    llm_int8_linear,
    pack_int4,
    qat_linear,
    quantize,
    quantize_groups,
    row_digits,
    scale_and_zero,
    static_linear,
    to_levels,
    unpack_int4,
)
from groundup.ops.quant_nf4 import dynamic_levels, nf4_levels, quantize_nf4

PER = ["tensor", "channel", 16]


def random(*shape: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def assert_rounding(x: torch.Tensor, back: torch.Tensor, scale: torch.Tensor) -> None:
    """|x - dq(q(x))| <= scale / 2, but for fp32's own rounding."""
    assert back.shape == x.shape
    blocks = (x - back).abs().reshape(len(scale), -1)
    assert (blocks <= scale * (0.5 + 1e-4)).all()
    assert blocks.max() > scale.min() * 0.3  # it was rounded at all


# affine


def test_worked_by_hand():
    x = torch.tensor([[-1.0, 0.0, 0.5, 2.0]])
    symmetric = quantize(x, per="tensor")  # scale 2 / 127
    assert symmetric.q.tolist() == [[-64, 0, 32, 127]] and symmetric.zero.tolist() == [[0]]
    assert symmetric.scale.item() == pytest.approx(2 / 127)
    asymmetric = quantize(x, symmetric=False, per="tensor")  # scale 3 / 255, 0 at 85; 42.5: ties to even
    assert asymmetric.q.tolist() == [[0, 85, 127, 255]] and asymmetric.zero.tolist() == [[85]]
    assert asymmetric.dequantize().tolist()[0] == pytest.approx([-1.0, 0.0, 42 * 3 / 255, 2.0])
    assert quantize(torch.tensor([[-14.0, 6.6, 1.0, 3.0]]), bits=4).q.tolist() == [
        [-7, 3, 0, 2]
    ]  # 0.5 and 1.5: to even


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("per", PER)
def test_nothing_is_further_off_than_half_a_step(bits, symmetric, per):
    x = random(6, 48) + 0.3
    part = quantize(x, bits, symmetric, per)
    assert_rounding(x, part.dequantize(), part.scale)
    first, last = levels(bits, symmetric)
    assert part.q.min() >= first and part.q.max() <= last
    assert len(part.scale) == {"tensor": 1, "channel": 6}.get(per, 6 * 48 // 16)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("per", PER)
def test_a_second_rounding_changes_nothing(symmetric, per):
    part = quantize(random(4, 32), 8, symmetric, per)
    again = quantize(part.dequantize(), 8, symmetric, per)
    assert torch.equal(part.q, again.q)


def test_invariants():
    x = random(5, 32)
    part = quantize(x)
    torch.testing.assert_close(quantize(-x).q, -part.q)  # symmetric: a mirror
    torch.testing.assert_close(quantize(4 * x).q, part.q)  # levels know no unit
    assert (part.q.abs().amax(1) == 127).all()  # each row uses its whole range
    relu = quantize(x.relu(), symmetric=False)
    assert (relu.dequantize()[x <= 0] == 0).all()  # 0 is exact
    shifted = quantize(x + 10, symmetric=False)  # the range holds 0 even where the numbers do not
    assert (shifted.zero == 0).all()
    assert not quantize(torch.zeros(3, 8)).dequantize().any()
    assert not quantize(torch.zeros(3, 8), symmetric=False).dequantize().any()


def test_smaller_groups_and_more_bits_lose_less():
    x = random(8, 64) * random(8, 1, seed=1).exp()  # channels of unlike size

    def lost(bits, per):
        return (x - quantize(x, bits, per=per).dequantize()).square().mean()

    assert lost(8, "tensor") > lost(8, "channel") > lost(8, 16) > 0
    assert lost(4, 16) > 50 * lost(8, 16)  # four bits: sixteen times the step


def test_a_group_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="groups of 5 do not divide rows of 32"):
        quantize(random(2, 32), per=5)


@pytest.mark.filterwarnings("ignore:torch.quantize_per")
@pytest.mark.parametrize("symmetric", [True, False])
def test_levels_equal_torch(symmetric):
    x, kind = random(6, 40), torch.qint8 if symmetric else torch.quint8
    whole = quantize(x, 8, symmetric, "tensor")
    theirs = torch.quantize_per_tensor(x, whole.scale.item(), int(whole.zero), kind)
    assert torch.equal(whole.q, theirs.int_repr().view(1, -1))
    torch.testing.assert_close(whole.dequantize(), theirs.dequantize())
    rows = quantize(x, 8, symmetric, "channel")
    theirs = torch.quantize_per_channel(x, rows.scale[:, 0].double(), rows.zero[:, 0], 0, kind)
    assert torch.equal(rows.q, theirs.int_repr())


def test_scales_equal_torch_observers():
    observer = pytest.importorskip("torch.ao.quantization.observer")
    x = random(6, 40) + 0.5
    watcher = observer.MinMaxObserver(dtype=torch.quint8, qscheme=torch.per_tensor_affine)
    watcher(x)
    scale, zero = watcher.calculate_qparams()
    ours = quantize(x, symmetric=False, per="tensor")
    assert ours.scale.item() == pytest.approx(scale.item()) and ours.zero.item() == zero.item()
    rows = observer.PerChannelMinMaxObserver(dtype=torch.quint8, qscheme=torch.per_channel_affine)
    rows(x)
    scale, zero = rows.calculate_qparams()
    ours = quantize(x, symmetric=False)
    torch.testing.assert_close(ours.scale[:, 0], scale)
    assert torch.equal(ours.zero[:, 0], zero.int())


def test_4_bits_equal_torchao():
    primitives = pytest.importorskip("torchao.quantization.quant_primitives")
    x = random(4, 64)
    part = quantize(x, 4, symmetric=False, per=32)
    theirs = primitives.quantize_affine(x, (1, 32), part.scale.view(4, 2), part.zero.view(4, 2), torch.uint8, 0, 15)
    assert torch.equal(part.q.view(4, 64), theirs)


# int4


def test_int4_pairs():
    q = torch.tensor([[-8, 7, 0, -1], [1, 2, 3, 4]])
    assert pack_int4(q).tolist() == [[0x78, 0xF0], [0x21, 0x43]]
    assert torch.equal(unpack_int4(pack_int4(q)), q.to(torch.int8))
    both = torch.cartesian_prod(torch.arange(16), torch.arange(16)).to(torch.uint8)
    assert torch.equal(unpack_int4(pack_int4(both), signed=False), both)
    assert len(pack_int4(both).unique()) == 256


@pytest.mark.parametrize("group", [32, 64])
def test_groups_of_4_bits(group):
    weight = random(6, 128, scale=0.05) + 0.01
    part = quantize_groups(weight, group)
    assert part.q.shape == (6, 128 // group, group) and part.scale.dtype == part.centre.dtype == torch.bfloat16
    assert (part.q.amin(-1) == -8).all() and (part.q.amax(-1) == 7).all()  # every level is used
    error = (weight - part.dequantize()).abs().unflatten(1, (-1, group))
    step, centre = part.scale.float()[..., None], part.centre.float()[..., None]
    assert (error <= step / 2 + (8 * step + centre.abs()) / 256).all()  # half a step, and bf16's rounding of both
    exact = Grouped(part.q, part.scale, part.centre).dequantize()
    assert torch.equal(quantize_groups(exact, group).dequantize(), exact)


# activations: as they arrive, or from examples


def test_dynamic_linear_rounds_each_row_by_itself():
    x, weight, bias = random(5, 64), random(7, 64, seed=1, scale=0.1), random(7, seed=2)
    x[3] *= 1000
    part = quantize(weight)
    out = dynamic_linear(x, part, bias)
    rounded = F.linear(quantize(x).dequantize(), part.dequantize(), bias)
    torch.testing.assert_close(out, rounded, rtol=1e-4, atol=1e-3)
    plain = F.linear(x, weight, bias)
    assert ((out - plain).norm(dim=1) / (plain - bias).norm(dim=1)).max() < 0.02
    torch.testing.assert_close(dynamic_linear(x[:1], part, bias), out[:1], rtol=0, atol=0)  # alone as among others


def test_a_second_digit_keeps_what_a_giant_takes():
    x, weight = random(5, 64), random(7, 64, seed=1, scale=0.1)
    x[:, 3] = 300.0
    part = quantize(weight)
    exact = F.linear(x, part.dequantize())
    one, two = ((dynamic_linear(x, part, digits=d) - exact).norm() for d in (1, 2))
    assert two < one / 150  # 254 times finer, but for fp32's own rounding
    q, scales = row_digits(x, 2)
    assert q.dtype == torch.int8 and q.abs().max() == 127
    assert torch.equal(q[0], quantize(x).q) and torch.equal(scales[0], quantize(x).scale)
    assert ((scales * q).sum(0) - x).abs().max() <= scales[1].max() * 0.51
    assert not dynamic_linear(x * 0, part, digits=2).any()


def test_integer_products_are_exact():
    a, b = torch.full((1, 4096), 127, dtype=torch.int8), torch.full((1, 4096), -127, dtype=torch.int8)
    assert int_product(a, b).item() == -127 * 127 * 4096  # beyond what fp32 counts one by one


def test_static_linear_from_a_calibrated_range():
    weight, bias = random(7, 64, seed=1, scale=0.1), random(7, seed=2)
    watcher = MinMax()
    for seed in range(10, 14):
        watcher.observe(random(20, 64, seed=seed).relu())
    x, part = random(5, 64, seed=10).relu(), quantize(weight)
    out = static_linear(x, watcher.range(), part, bias)
    scale, zero = scale_and_zero(*watcher.range(), symmetric=False)
    rounded = (to_levels(x, scale, zero, symmetric=False) - zero) * scale
    torch.testing.assert_close(out, F.linear(rounded, part.dequantize(), bias), rtol=1e-4, atol=1e-4)
    assert (out - F.linear(x, weight, bias)).abs().max() < 0.05
    torch.testing.assert_close(
        static_linear(x * 0 + 99, watcher.range(), part),  # beyond the range everything is cut to its end
        static_linear(x * 0 + watcher.high, watcher.range(), part),
    )


def test_observers():
    low_high, middle = MinMax(), Percentile(0.9)
    for part in torch.arange(1001.0).roll(500).split(100):
        low_high.observe(part)
        middle.observe(part)
    assert [float(v) for v in low_high.range()] == [0, 1000]
    assert [float(v) for v in middle.range()] == pytest.approx([50, 950])
    x = random(1000)
    x[0] = 1000.0
    giant, robust = MinMax(), Percentile(0.99)
    for watcher in (giant, robust):
        watcher.observe(x)

    def lost(range_x):
        scale, zero = scale_and_zero(*range_x, symmetric=False)
        return ((to_levels(x, scale, zero, symmetric=False) - zero) * scale - x)[1:].square().mean()

    assert lost(robust.range()) < lost(giant.range()) / 10


# training that knows


@pytest.mark.parametrize("symmetric", [True, False])
def test_fake_quantize_equals_torch_forward_and_backward(symmetric):
    x = random(6, 40).requires_grad_()
    scale, zero = scale_and_zero(torch.tensor(-1.0), torch.tensor(1.3), symmetric=symmetric)  # some are cut
    ours = fake_quantize(x, scale, zero, 8, symmetric)
    theirs = torch.fake_quantize_per_tensor_affine(x, scale.item(), int(zero), *levels(8, symmetric))
    torch.testing.assert_close(ours, theirs)
    slope = random(6, 40, seed=1)
    (ours_grad,), (theirs_grad,) = torch.autograd.grad(ours, x, slope), torch.autograd.grad(theirs, x, slope)
    assert torch.equal(ours_grad, theirs_grad)
    assert (ours_grad == 0).any() and torch.equal(ours_grad[ours_grad != 0], slope[ours_grad != 0])


def test_qat_sees_what_the_quantised_layer_computes():
    x, weight, bias = random(5, 64), random(7, 64, seed=1), random(7, seed=2)
    torch.testing.assert_close(qat_linear(x, weight, bias), dynamic_linear(x, quantize(weight), bias))


def test_training_that_knows_the_rounding_loses_less():
    """2 bits, inputs that depend on each other: weights make up for each other's rounding if they are told of it."""
    x = random(256, 4, seed=3) @ random(4, 16, seed=4) + 0.1 * random(256, 16, seed=5)
    exact = random(8, 16, seed=1)
    weight = exact.clone().requires_grad_()

    def loss() -> float:
        return F.mse_loss(F.linear(x, quantize(weight.detach(), bits=2).dequantize()), x @ exact.T).item()

    before, optimizer = loss(), torch.optim.Adam([weight], lr=0.01)
    for step in range(200):
        optimizer.param_groups[0]["lr"] = 0.01 * (1 - step / 200)
        optimizer.zero_grad()
        F.mse_loss(qat_linear(x, weight, bits=2), x @ exact.T).backward()
        optimizer.step()
    assert loss() < before / 2


# LLM.int8


def test_llm_int8_keeps_outlier_columns():
    x, weight, bias = random(6, 64), random(9, 64, seed=1, scale=0.1), random(9, seed=2)
    x = x.clamp(-3, 3)
    torch.testing.assert_close(llm_int8_linear(x, weight, bias), dynamic_linear(x, quantize(weight), bias))
    x[2, 5], x[:, 11] = 60.0, -80.0  # one giant makes a column, and so does a whole column of them
    plain = F.linear(x, weight, bias)
    dynamic, split = dynamic_linear(x, quantize(weight), bias) - plain, llm_int8_linear(x, weight, bias) - plain
    assert split.norm() < dynamic.norm() / 10
    torch.testing.assert_close(llm_int8_linear(x, weight, bias, threshold=0.0), plain)  # all are outliers
    few = [i for i in range(64) if i not in (5, 11)]
    by_hand = dynamic_linear(x[:, few], quantize(weight[:, few])) + bias + x[:, [5, 11]] @ weight[:, [5, 11]].T
    torch.testing.assert_close(llm_int8_linear(x, weight, bias), by_hand)


# NF4


def nf4_codes(part):
    """Of each block, 0 to 15."""
    return torch.stack([part.codes >> 4, part.codes & 15], -1).flatten(1)


def test_nf4_levels_are_quantiles_of_the_normal_distribution():
    edge = 1 - (1 / 30 + 1 / 32) / 2  # half a step is left out, a step being 1/15 below and 1/16 above: their mean
    above = torch.special.ndtri(torch.linspace(0.5, edge, 9, dtype=torch.float64))
    below = -torch.special.ndtri(torch.linspace(edge, 0.5, 8, dtype=torch.float64))
    torch.testing.assert_close(nf4_levels(), (torch.cat([below, above[1:]]) / above[-1]).float(), atol=2e-6, rtol=0)


def test_nf4_levels_are_used_alike_by_normal_numbers():
    part = quantize_nf4(random(1, 64 * 4000))
    shares = torch.bincount(nf4_codes(part).flatten().long(), minlength=16) / (64 * 4000)
    assert shares[1:15].min() > 0.03 and shares.max() < 0.11  # 4 equal bits would give 0.0005 to 0.16
    assert (shares[1:15].max() / shares[1:15].min()) < 3


def test_nf4_takes_the_nearest_level_of_the_block():
    x = random(5, 48)  # 240: the last block of 64 is filled up
    part = quantize_nf4(x)
    top = F.pad(x.flatten(), (0, 16)).view(-1, 64).abs().amax(1, keepdim=True)
    near = (F.pad(x.flatten(), (0, 16)).view(-1, 64) / top)[..., None] - nf4_levels()
    assert torch.equal(nf4_codes(part).long(), near.abs().argmin(-1))
    assert part.dequantize().shape == x.shape


def test_levels_of_scales_are_finer_towards_zero():
    levels = dynamic_levels()
    assert len(levels) == len(levels.unique()) == 256 and (levels.diff() > 0).all()
    assert levels[-1] == 1 and 0 in levels and levels.abs()[levels != 0].min() < 1e-6
    assert torch.equal(levels[(levels > 0) & (levels < 1)], -levels[levels < 0].flip(0))
    decade = levels[(levels > 0.1) & (levels < 1)]
    torch.testing.assert_close(decade.diff(), torch.full((63,), 0.9 / 64), atol=1e-6, rtol=0)


def test_double_quantisation():
    x = random(512, 64, scale=0.02)
    part, plain = quantize_nf4(x), quantize_nf4(x, double=False)
    assert 8 * part.nbytes / x.numel() == pytest.approx(4 + 8 / 64 + 32 / (64 * 256), abs=2e-3)
    assert 8 * plain.nbytes / x.numel() == 4.5
    tops = x.abs().amax(1)
    assert torch.equal(plain.scales(), tops)
    assert (part.scales() / tops - 1).abs().max() < 0.05
    once, twice = (x - plain.dequantize()).square().mean(), (x - part.dequantize()).square().mean()
    assert once < twice < 1.05 * once  # what the second rounding adds
    assert math.sqrt(twice) < 0.1 * x.std()
    assert not quantize_nf4(torch.zeros(3, 64)).dequantize().any()
    linear = quantize(x, 4, per=64)
    assert twice < (x - linear.dequantize()).square().mean()  # better than equal steps for a bell curve


def test_4_bits_in_order_of_error():
    """On normal weights, 64 sharing a scale: equal symmetric steps, NF4, and all 16 levels from min to max."""
    x = random(256, 64, seed=3)
    symmetric = (x - quantize(x, 4, per=64).dequantize()).square().mean()
    nf4 = (x - quantize_nf4(x).dequantize()).square().mean()
    assert nf4 < symmetric
