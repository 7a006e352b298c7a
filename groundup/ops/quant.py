"""How does a number fit into 8 or 4 bits? The known schemes, each as plain as its formula.

All are one idea: x is about scale * (q - zero), with q a small integer. They differ in who shares a scale (a tensor, a
channel, a group), in when it is chosen (a weight's once; an activation's as it arrives, or from examples before), and
in what becomes of values that do not fit. The fast products stand in infer/linear.py, NF4 in quant_nf4.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

TINY = torch.finfo(torch.float32).tiny  # the scale of a block of zeros


@dataclass(frozen=True)
class Quantized:
    """Integers q [blocks, size], int8 or uint8; scale, zero: [blocks, 1], fp32 and int32; shape: the tensor's own."""

    q: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor
    shape: torch.Size

    def dequantize(self) -> torch.Tensor:
        """scale * (q - zero), fp32."""
        return ((self.q - self.zero) * self.scale).view(self.shape)


def levels(bits: int, symmetric: bool) -> tuple[int, int]:
    """Smallest and largest q. Symmetric: -127 to 127 at 8 bits, so that -x has the level opposite to that of x."""
    return (1 - 2 ** (bits - 1), 2 ** (bits - 1) - 1) if symmetric else (0, 2**bits - 1)


def scale_and_zero(
    low: torch.Tensor, high: torch.Tensor, bits: int = 8, symmetric: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """The step and the level of 0 for numbers from low to high (Jacob et al. 2017, arXiv 1712.05877, section 2.1).

    Symmetric: scale = max |x| / 127, zero = 0. Asymmetric: scale = (high - low) / 255, zero = round(-low / scale); the
    range is stretched to hold 0, which then is exact: padding and ReLU's zeros stay zeros.
    """
    first, last = levels(bits, symmetric)
    if symmetric:
        scale = (torch.maximum(-low, high) / last).clamp_min(TINY)
        return scale, torch.zeros_like(scale, dtype=torch.int32)
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = ((high - low) / (last - first)).clamp_min(TINY)
    return scale, first - (low / scale).round().int()


def to_levels(
    x: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, bits: int = 8, symmetric: bool = True
) -> torch.Tensor:
    """q = clamp(round(x / scale) + zero). Inside the range |x - scale * (q - zero)| <= scale / 2; outside it is cut."""
    q = (x / scale).round() + zero
    return q.clamp(*levels(bits, symmetric)).to(torch.int8 if symmetric else torch.uint8)


def quantize(x: torch.Tensor, bits: int = 8, symmetric: bool = True, per: str | int = "channel") -> Quantized:
    """Affine quantisation from min and max. per: who shares a scale.

    "tensor": all; "channel": a row of the first axis (an output of a weight [E, D], a token of activations [N, D]);
    a number: that many neighbours on the last axis, which it must divide (a group).
    """
    if isinstance(per, int) and x.shape[-1] % per:
        raise ValueError(f"groups of {per} do not divide rows of {x.shape[-1]}")
    blocks = x.float()
    if isinstance(per, int):
        blocks = blocks.reshape(-1, per)
    else:
        blocks = blocks.reshape(1, -1) if per == "tensor" else blocks.flatten(1)
    low, high = blocks.aminmax(dim=1, keepdim=True)
    scale, zero = scale_and_zero(low, high, bits, symmetric)
    return Quantized(to_levels(blocks, scale, zero, bits, symmetric), scale, zero, x.shape)


@dataclass(frozen=True)
class Grouped:
    """4-bit groups: q [E, G, g] int8 in -8..7; scale, centre [E, G] bf16. A weight is about scale * q + centre."""

    q: torch.Tensor
    scale: torch.Tensor
    centre: torch.Tensor

    def dequantize(self) -> torch.Tensor:
        """[E, G * g], fp32."""
        return (self.q * self.scale.float()[..., None] + self.centre.float()[..., None]).flatten(1)


def quantize_groups(weight_ED: torch.Tensor, group: int = 32) -> Grouped:
    """4 bits with a scale and a centre for each group of inputs: all 16 levels between its min and its max.

    The centre is a float, not a level: 0 need not be exact in a weight. So store llama.cpp's Q4_1 and torch's tinygemm.
    Both numbers are kept in bf16, which q is fitted to: 4 + 32 / group bits a weight.
    """
    blocks = weight_ED.float().unflatten(1, (-1, group))
    low, high = blocks.aminmax(dim=-1)
    scale = ((high - low) / 15).bfloat16()
    centre = (low + 8 * scale.float()).bfloat16()
    step = torch.where(scale > 0, scale.float(), 1.0)  # a group of equal numbers is its centre
    q = ((blocks - centre.float()[..., None]) / step[..., None]).round().clamp(-8, 7)
    return Grouped(q.to(torch.int8), scale, centre)


def pack_int4(q: torch.Tensor) -> torch.Tensor:
    """Pairs of 4-bit numbers (-8..7 or 0..15) of the last axis in one byte each, uint8, the first in the low half."""
    low, high = (q.to(torch.int16) & 15).unflatten(-1, (-1, 2)).unbind(-1)
    return (low | high << 4).to(torch.uint8)


def unpack_int4(packed: torch.Tensor, signed: bool = True) -> torch.Tensor:
    """The inverse: int8 in -8..7, or uint8 in 0..15."""
    pairs = torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2)
    return (pairs ^ 8).to(torch.int8) - 8 if signed else pairs  # 8..15 mean -8..-1


def int_product(a_ND: torch.Tensor, b_ED: torch.Tensor) -> torch.Tensor:
    """a @ b^T in integers, int32 [N, E]: exact."""
    return a_ND.int() @ b_ED.int().T


def row_digits(x_ND: torch.Tensor, digits: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Each row of x as 8-bit integers [digits, N, D] and scales [digits, N, 1]: x is about the sum of scale * q.

    The first is `quantize`, by the row's own largest number. A second rounds what the first left, 254 times finer: with
    both x keeps nearly 16 bits, and two products of bytes stand in for one of floats.
    """
    rest, q, scales = x_ND.float(), [], []
    scale = (rest.abs().amax(1, keepdim=True) / 127).clamp_min(TINY)
    for _ in range(digits):
        q.append((rest / scale).round().clamp(-127, 127))
        scales.append(scale)
        rest, scale = rest - q[-1] * scale, (scale / 254).clamp_min(TINY)
    return torch.stack(q).to(torch.int8), torch.stack(scales)


def dynamic_linear(
    x_ND: torch.Tensor, weight: Quantized, bias_E: torch.Tensor | None = None, digits: int = 1
) -> torch.Tensor:
    """Integer activations by 8-bit weights; each row of x is quantised as it arrives (row_digits).

    weight: quantize(weight_ED), symmetric per channel. y = s_x s_w (q_x @ q_w^T): one scale a row, one a column.
    """
    q, scales = row_digits(x_ND, digits)
    y_NE = sum(int_product(one, weight.q) * (scale * weight.scale.T) for one, scale in zip(q, scales, strict=True))
    assert isinstance(y_NE, torch.Tensor)
    return y_NE if bias_E is None else y_NE + bias_E


class MinMax:
    """Watches activations while calibrating: the smallest and the largest ever seen."""

    def __init__(self) -> None:
        self.low, self.high = torch.tensor(torch.inf), torch.tensor(-torch.inf)

    def observe(self, x: torch.Tensor) -> None:
        self.low, self.high = torch.minimum(self.low, x.amin()), torch.maximum(self.high, x.amax())

    def range(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.low, self.high


class Percentile:
    """Watches activations: the range that holds the middle `share` of them. A rare giant no longer sets the step.

    Keeps all it sees: calibration takes a few hundred rows.
    """

    def __init__(self, share: float = 0.999) -> None:
        self.share, self.seen = share, [torch.empty(0)]

    def observe(self, x: torch.Tensor) -> None:
        self.seen.append(x.detach().float().flatten().cpu())

    def range(self) -> tuple[torch.Tensor, torch.Tensor]:
        tail = (1 - self.share) / 2
        low, high = np.quantile(torch.cat(self.seen).numpy(), [tail, 1 - tail])
        return torch.tensor(float(low)), torch.tensor(float(high))


def static_linear(
    x_ND: torch.Tensor,
    range_x: tuple[torch.Tensor, torch.Tensor],
    weight: Quantized,
    bias_E: torch.Tensor | None = None,
) -> torch.Tensor:
    """As dynamic_linear, with one scale and zero for all activations, from an observer's range: nothing to look for.

    Asymmetric, so sum (q_x - zero) q_w, which the integer kernels compute as q_x @ q_w^T - zero * sum(q_w).
    """
    scale, zero = scale_and_zero(*range_x, symmetric=False)
    q_ND = to_levels(x_ND, scale, zero, symmetric=False)
    y_NE = (int_product(q_ND, weight.q) - zero * weight.q.sum(1).int()) * (scale * weight.scale.T)
    return y_NE if bias_E is None else y_NE + bias_E


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, first: int, last: int) -> Any:
        q = (x / scale).round() + zero
        ctx.save_for_backward((q >= first) & (q <= last))
        return (q.clamp(first, last) - zero) * scale

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        (inside,) = ctx.saved_tensors
        return grad * inside, None, None, None, None


def fake_quantize(
    x: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, bits: int = 8, symmetric: bool = True
) -> torch.Tensor:
    """x as its levels would give it back, with a gradient: for training that knows of the rounding to come.

    Straight-through (Bengio et al. 2013, arXiv 1308.3432): rounding has slope 0 nearly everywhere, so its slope is
    taken for 1 inside the range, and for 0 where a value is cut.
    """
    y = _FakeQuantize.apply(x, scale, zero, *levels(bits, symmetric))
    assert isinstance(y, torch.Tensor)
    return y


def qat_linear(
    x_ND: torch.Tensor, weight_ED: torch.Tensor, bias_E: torch.Tensor | None = None, bits: int = 8
) -> torch.Tensor:
    """A linear layer in quantisation-aware training: what dynamic_linear will compute, up to fp32 rounding."""

    def rounded(rows: torch.Tensor, bits: int) -> torch.Tensor:
        low, high = rows.detach().aminmax(dim=1, keepdim=True)
        return fake_quantize(rows, *scale_and_zero(low, high, bits), bits)

    return F.linear(rounded(x_ND, 8), rounded(weight_ED, bits), bias_E)


def llm_int8_linear(
    x_ND: torch.Tensor, weight_ED: torch.Tensor, bias_E: torch.Tensor | None = None, threshold: float = 6.0
) -> torch.Tensor:
    """LLM.int8 (Dettmers et al. 2022, arXiv 2208.07339): inputs that reach the threshold in some row stay floats.

    Large models have a few such columns of x. One giant would stretch the scale of its whole row, so the product is
    cut in two: dynamic int8 without these columns, plain arithmetic for them.
    """
    outlier_D = (x_ND.abs() >= threshold).any(0)
    y_NE = dynamic_linear(x_ND[:, ~outlier_D], quantize(weight_ED[:, ~outlier_D])) if not outlier_D.all() else 0.0
    return y_NE + F.linear(x_ND[:, outlier_D], weight_ED[:, outlier_D], bias_E)
