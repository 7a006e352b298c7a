"""NF4: the 16 levels where a bell curve puts its numbers (QLoRA, Dettmers et al. 2023, arXiv 2305.14314).

Trained weights are close to normal. Equal steps waste levels on the rare large ones; here each level stands for about
as many weights as any other.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from groundup.ops.quant import TINY, pack_int4, unpack_int4

FP8_MAX = 448.0  # of float8_e4m3fn


@functools.cache
def nf4_levels() -> torch.Tensor:
    """The 16 levels, from -1 to 1, fp32.

    Quantiles of the normal distribution, from the middle (0, a level of its own) to the share `edge` of it: 8 above, 7
    below, each side evenly spaced in probability, and all divided by the largest. The edge cannot be 1, whose quantile
    is infinite: half a step is left out, a step being 1/15 on one side and 1/16 on the other; the mean is taken.
    """
    edge = 1 - (1 / 30 + 1 / 32) / 2
    above = torch.special.ndtri(torch.linspace(0.5, edge, 9, dtype=torch.float64))
    below = -torch.special.ndtri(torch.linspace(edge, 0.5, 8, dtype=torch.float64))
    return (torch.cat([below, above[1:]]) / above[-1]).float()


@dataclass(frozen=True)
class NF4:
    """codes: two a byte, uint8 [blocks, block / 2]. A block's largest |x| is offset + c1 / 448 * c2.

    c2: fp8 (e4m3) [blocks / 256, 256], padded; c1: fp32 [blocks / 256, 1]; offset: fp32 scalar, the mean.
    """

    codes: torch.Tensor
    c2: torch.Tensor
    c1: torch.Tensor
    offset: torch.Tensor
    shape: torch.Size

    def dequantize(self) -> torch.Tensor:
        """level * the block's largest, fp32. NF4 units are levels first, scales second (equation 6)."""
        top_n1 = self._tops()[: len(self.codes), None]
        filled = nf4_levels()[unpack_int4(self.codes, signed=False).long()] * top_n1
        return filled.flatten()[: self.shape.numel()].view(self.shape)

    def _tops(self) -> torch.Tensor:
        return (self.c2.float() * (self.c1 / FP8_MAX)).flatten() + self.offset

    def bits(self) -> float:
        """Stored bits a number: 4 + 8 / 64 + 32 / (64 * 256) = 4.127."""
        stored = sum(t.numel() * t.element_size() for t in (self.codes, self.c1, self.offset)) + len(self.codes)
        return 8 * stored / self.shape.numel()


def quantize_nf4(x: torch.Tensor, block: int = 64, second_block: int = 256) -> NF4:
    """4 bits a number, a scale for every `block` of them in row order, and the scales themselves in 8 bits.

    Double quantisation (section 3): scales are all positive, so their mean is taken off first; then fp8, with an fp32
    scale for every `second_block` of them.
    """
    flat = x.float().flatten()
    blocks = torch.nn.functional.pad(flat, (0, -len(flat) % block)).view(-1, block)
    top_n = blocks.abs().amax(1).clamp_min(TINY)
    levels = nf4_levels()
    codes = torch.bucketize(blocks / top_n[:, None], (levels[1:] + levels[:-1]) / 2)  # the nearest level
    offset = top_n.mean()
    rest = torch.nn.functional.pad(top_n - offset, (0, -len(top_n) % second_block)).view(-1, second_block)
    c1 = rest.abs().amax(1, keepdim=True).clamp_min(TINY)
    c2 = (rest / c1 * FP8_MAX).to(torch.float8_e4m3fn)
    return NF4(pack_int4(codes), c2, c1, offset, x.shape)
