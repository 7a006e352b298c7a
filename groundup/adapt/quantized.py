"""How is a frozen matrix kept in half a byte a number, and trained through? QLoRA's base, and one of 8 bits.

    "nf4"   4 bits, 16 levels for a bell curve, a scale for 64 numbers (ops/quant_nf4.py)    0.52 bytes a parameter
    "int8"  8 bits, a scale for each output (LLM.int8's weights, arXiv 2208.07339)           1.01

The matrix is made again where it is needed, in the forward pass and once more in the backward pass, a layer at a time,
and never kept: beside the adapter a step holds one matrix in full. On CUDA NF4 runs in bitsandbytes' kernels where they
are installed, on a CPU in csrc/nf4.c. LLM.int8's other half, integer products, is for answering: gradients want more.
"""

from __future__ import annotations

import functools
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from groundup.errors import UserError
from groundup.ops.quant import TINY
from groundup.ops.quant_nf4 import BLOCK, NF4, SECOND_BLOCK, dequantize_nf4_, dynamic_levels, nf4_levels, quantize_nf4

ROWS_AT_ONCE = 4096  # outputs quantised at a time


def quantize_base(model: nn.Module, kind: Literal["nf4", "int8"], double_quant: bool = True) -> None:
    """Replace every frozen nn.Linear of the model's blocks, in place; head and embeddings stay as they are.

    UserError, with nothing changed: NF4 where a layer's inputs are no multiple of 64; nothing frozen to quantise.
    """
    blocks: Any = model.blocks
    inside = {id(part) for part in blocks.modules()}
    found = [
        (parent, f"{prefix}.{name}" if prefix else name, name)
        for prefix, parent in model.named_modules()
        for name, child in parent.named_children()
        if id(child) in inside and type(child) is nn.Linear and not any(p.requires_grad for p in child.parameters())
    ]
    if not found:
        why = f"there is nothing to keep in {kind}: no frozen nn.Linear in the blocks"
        raise UserError("adapt.base", why, "use adapt.base=full")
    for parent, path, name in found if kind == "nf4" else ():
        width = getattr(parent, name).in_features
        if width % BLOCK:
            fix = "use adapt.base=int8 or adapt.base=full"
            raise UserError(path, f"{width} inputs are no multiple of {BLOCK}, the block of NF4", fix)
    for parent, _, name in found:
        layer = getattr(parent, name)
        setattr(parent, name, NF4Base(layer, double_quant) if kind == "nf4" else Int8Base(layer))


class QuantizedBase(nn.Module):
    """A frozen linear layer without its matrix. Differentiable in its input only."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.bias = layer.bias

    def dequantize_(self, out_ED: torch.Tensor) -> torch.Tensor:
        """The matrix into `out`, contiguous fp32."""
        raise NotImplementedError

    def dequantize(self) -> torch.Tensor:
        """The matrix, [E, D] fp32."""
        device = next(self.buffers()).device
        return self.dequantize_(torch.empty(self.out_features, self.in_features, device=device))

    def forward(self, x_D: torch.Tensor) -> torch.Tensor:
        """x @ matrix^T + bias in x's dtype, or in autocast's."""
        out: torch.Tensor = _Product.apply(x_D.to(_product_dtype(x_D)), self)
        return out

    @property
    def nbytes(self) -> int:
        """Bytes of all that is kept of the matrix."""
        return sum(buffer.numel() * buffer.element_size() for buffer in self.buffers())

    def _keep(self, **tensors: torch.Tensor | None) -> None:
        """As buffers, so that they move with the model; a checkpoint does not hold what the base's folder does."""
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor, persistent=False)

    def _apply(self, fn: Any, recurse: bool = True) -> QuantizedBase:
        """Moved to another device, but never cast: scales in bf16 would be others."""
        kept = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in kept.items():
            moved = self._buffers[name]
            if buffer is not None and moved is not None and moved.dtype != buffer.dtype:
                self._buffers[name] = buffer.to(moved.device)
        return self

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class NF4Base(QuantizedBase):
    """codes, tops, second, offset: as in ops/quant_nf4.NF4."""

    codes: torch.Tensor
    tops: torch.Tensor
    second: torch.Tensor | None
    offset: torch.Tensor | None

    def __init__(self, layer: nn.Linear, double_quant: bool = True) -> None:
        super().__init__(layer)
        kept = quantize_nf4(layer.weight, double_quant)
        self._keep(codes=kept.codes, tops=kept.tops, second=kept.second, offset=kept.offset)

    @property
    def nf4(self) -> NF4:
        shape = torch.Size((self.out_features, self.in_features))
        return NF4(self.codes, self.tops, self.second, self.offset, shape)

    def dequantize_(self, out_ED: torch.Tensor) -> torch.Tensor:
        return dequantize_nf4_(self.nf4, out_ED)

    def forward(self, x_D: torch.Tensor) -> torch.Tensor:
        library = _bitsandbytes() if x_D.device.type == "cuda" else None
        if library is None:
            return super().forward(x_D)
        x_D = x_D.to(_product_dtype(x_D))
        bias = None if self.bias is None else self.bias.to(x_D.dtype)
        codes = self.codes.view(-1, 1)
        out: torch.Tensor = library.matmul_4bit(x_D, codes, quant_state=self._state(library, x_D.dtype), bias=bias)
        return out

    def _state(self, library: Any, dtype: torch.dtype) -> Any:
        """The same buffers as bitsandbytes wants them named."""
        make, device = library.functional.QuantState, self.codes.device
        second = None
        if self.second is not None:
            second = make(self.second, code=dynamic_levels(device), blocksize=SECOND_BLOCK, dtype=torch.float32)
        return make(
            self.tops, shape=torch.Size((self.out_features, self.in_features)), code=nf4_levels(device),
            blocksize=BLOCK, quant_type="nf4", dtype=dtype, offset=self.offset, state2=second,
        )  # fmt: skip


class Int8Base(QuantizedBase):
    """q: int8 [E, D]; scale: fp32 [E, 1], a row's largest / 127."""

    q: torch.Tensor
    scale: torch.Tensor

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer)
        weight = layer.weight.detach()
        scale = weight.abs().amax(1, keepdim=True).float().clamp_min(TINY) / 127
        parts = zip(weight.split(ROWS_AT_ONCE), scale.split(ROWS_AT_ONCE), strict=True)
        self._keep(q=torch.cat([(w.float() / s).round().to(torch.int8) for w, s in parts]), scale=scale)

    def dequantize_(self, out_ED: torch.Tensor) -> torch.Tensor:
        return out_ED.copy_(self.q).mul_(self.scale)


class _Product(torch.autograd.Function):
    """What autograd would keep for a product with a frozen matrix is the matrix: here it is made again instead."""

    @staticmethod
    def forward(ctx: Any, x_D: torch.Tensor, base: QuantizedBase) -> torch.Tensor:
        ctx.base = base
        bias = None if base.bias is None else base.bias.to(x_D.dtype)
        return F.linear(x_D, base.dequantize().to(x_D.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_E: torch.Tensor) -> Any:
        return grad_E @ ctx.base.dequantize().to(grad_E.dtype), None


def _product_dtype(x: torch.Tensor) -> torch.dtype:
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


@functools.cache
def _bitsandbytes() -> Any:
    """The library, or None where it is not installed."""
    try:
        import bitsandbytes
    except ImportError:
        return None
    return bitsandbytes
