"""NF4: the 16 levels where a bell curve puts its numbers (QLoRA, Dettmers et al. 2023, arXiv 2305.14314).

Trained weights are close to normal. Equal steps waste levels on the rare large ones; here each level stands for about
as many weights as any other. Bytes and numbers are those of bitsandbytes, in which QLoRA's users exchange models: the
first of two codes in the high half of its byte, and the scales, where they are quantised in turn, on the 256 levels of
its signed dynamic map. (The paper says 8-bit floats; nobody's files hold those.)
"""

from __future__ import annotations

import functools
from ctypes import c_float, c_int64
from dataclasses import dataclass

import torch

from groundup.ops.native import native, pointer
from groundup.ops.quant import unpack_int4

BLOCK = 64  # numbers that share a scale
SECOND_BLOCK = 256  # scales that share one of theirs
AT_ONCE = 2**16  # blocks quantised at a time: what is needed beside the result stays small
SMALLEST = 1e-38  # a scale below is taken for this one, as bitsandbytes does

# The quantiles of the normal distribution at even steps, 8 below and 9 from the middle (0, a level of its own) up to
# 1 - (1/30 + 1/32) / 2, all divided by the largest, in the digits of the paper's appendix E.
LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


@functools.cache
def nf4_levels(device: torch.device | str = "cpu") -> torch.Tensor:
    """The 16 levels, from -1 to 1, fp32."""
    return torch.tensor(LEVELS, device=device)


@functools.cache
def dynamic_levels(device: torch.device | str = "cpu") -> torch.Tensor:
    """256 levels from -1 to 1, fp32, finer towards 0 (8-Bit Approximations for Parallelism, arXiv 1511.04561).

    Decades from 10^-6 to 1 have 1, 2, 4 ... 64 levels of each sign: the middles of so many equal pieces of the decade.
    """
    levels = [torch.tensor([0.0, 1.0])]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2**decade + 1)
        middles = 10 ** (decade - 6) * ((edges[:-1] + edges[1:]) / 2)
        levels += [middles, -middles]
    return torch.cat(levels).sort().values.to(device)


@dataclass(frozen=True)
class NF4:
    """codes: two a byte, uint8 [blocks, 32]. tops: a block's largest |x|, fp32 [blocks].

    Doubly quantised, tops are uint8 codes: a largest is dynamic_levels[code] * second + offset, with second fp32 [1 for
    256 blocks] and offset, an fp32 scalar, the mean.
    """

    codes: torch.Tensor
    tops: torch.Tensor
    second: torch.Tensor | None
    offset: torch.Tensor | None
    shape: torch.Size

    def dequantize(self) -> torch.Tensor:
        """level * the block's largest, fp32: levels first, scales second (equation 6)."""
        codes = self.codes.view(len(self.codes), -1)
        pairs = unpack_int4(codes, signed=False).unflatten(1, (-1, 2)).flip(-1).flatten(1)  # the high half first
        filled = nf4_levels(codes.device)[pairs.long()] * self.scales()[:, None]
        return filled.flatten()[: self.shape.numel()].view(self.shape)

    def scales(self) -> torch.Tensor:
        """The largest of each block, fp32."""
        if self.second is None or self.offset is None:
            return self.tops
        second = self.second.repeat_interleave(SECOND_BLOCK)[: len(self.tops)]
        return dynamic_levels(self.tops.device)[self.tops.long()] * second + self.offset

    @property
    def nbytes(self) -> int:
        """Bytes of all that is kept: 4 + 8 / 64 + 32 / (64 * 256) = 4.127 bits a number, with plain scales 4.5."""
        kept = (self.codes, self.tops, self.second, self.offset)
        return sum(t.numel() * t.element_size() for t in kept if t is not None)


def quantize_nf4(x: torch.Tensor, double: bool = True) -> NF4:
    """4 bits a number and a scale for every 64 of them in row order; `double`: the scales in 8 bits, too.

    Double quantisation (section 3): scales are all positive, so their mean is taken off first.
    """
    flat = x.detach().flatten()
    filled = torch.nn.functional.pad(flat, (0, -len(flat) % BLOCK)).view(-1, BLOCK)
    parts = [_codes(part.float()) for part in filled.split(AT_ONCE)]
    codes, tops = (torch.cat(column) for column in zip(*parts, strict=True))
    if not double:
        return NF4(codes, tops, None, None, x.shape)
    offset = tops.mean()
    rest = torch.nn.functional.pad(tops - offset, (0, -len(tops) % SECOND_BLOCK)).view(-1, SECOND_BLOCK)
    second = rest.abs().amax(1)
    tops8 = _nearest(rest * (1 / second.clamp_min(SMALLEST))[:, None], dynamic_levels(x.device))
    return NF4(codes, tops8.flatten()[: len(tops)].contiguous(), second, offset, x.shape)


def _codes(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes [blocks, 32] and largest values of blocks of 64."""
    tops = blocks.abs().amax(1)
    codes = _nearest(blocks * (1 / tops.clamp_min(SMALLEST))[:, None], nf4_levels(blocks.device))
    return codes[:, ::2] << 4 | codes[:, 1::2], tops


def _nearest(x: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """The number of the nearest level, uint8."""
    return torch.bucketize(x.clamp(-1, 1), (levels[1:] + levels[:-1]) / 2, out_int32=True).to(torch.uint8)


def dequantize_nf4_(x: NF4, out: torch.Tensor) -> torch.Tensor:
    """`x.dequantize()` into `out`, fp32 of the same size, contiguous: csrc/nf4.c where it can be, else as above."""
    library = native("nf4") if out.device.type == "cpu" else None
    if library is None or x.shape.numel() % BLOCK:
        return out.copy_(x.dequantize().view(out.shape))
    levels = dynamic_levels() if x.second is not None else None
    offset = float(x.offset) if x.offset is not None else 0.0
    library.nf4_dequantize(
        *map(pointer, (x.codes, x.tops, x.second, levels, nf4_levels(), out)),
        c_float(offset), c_int64(len(x.codes)), torch.get_num_threads(),
    )  # fmt: skip
    return out
