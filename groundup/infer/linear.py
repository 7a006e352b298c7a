"""How is a matrix kept while a model answers? As it is, or in 8 or 4 bits: fewer bytes to read a token, less to keep.

    scheme         weights                            activations                     bits a weight, D inputs
    None           as they are                        as they are                     32
    "int8"         8 bits, a scale an output          two 8-bit digits, a scale a row 8 + 32 / D
    "int8-weight"  8 bits, a scale an output          as they are                     8 + 32 / D
    "int4"         4 bits, scale and centre for 32    as they are                     4 + 32 / 32

What each computes stands in ops/quant.py as plain torch; here are the ways that are fast. On a CPU C kernels
(ops/csrc/int8.c, int4.c), whose results for a row do not depend on the rows beside it; on CUDA torch's integer
products. Without a compiler and on other devices, plain torch.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import torch
import torch.nn.functional as F

from groundup.errors import UserError
from groundup.ops.native import native
from groundup.ops.quant import Grouped, pack_int4, quantize, quantize_groups, row_digits, unpack_int4

SCHEMES = ("int8", "int8-weight", "int4")
GROUP = 32  # inputs that share a scale in int4
CHUNK = 4096  # outputs quantised at a time: what is needed beside the result stays small
DIGITS = 2  # int8 numbers that an activation becomes in int8; with one, giants among them cost too much
AMX_ROWS = 9  # from so many rows on tiles are faster than dot products, where a processor has them


class Product:
    """x_ND -> x @ weight^T + bias, [N, E], in x's dtype. No gradients."""

    def __init__(self, weight_ED: torch.Tensor, bias_E: torch.Tensor | None) -> None:
        self.out_features, self.in_features = weight_ED.shape
        self.bias = None if bias_E is None else bias_E.detach()

    def __call__(self, x_ND: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    @property
    def nbytes(self) -> int:
        """Bytes of all that is kept."""
        tensors = {t.data_ptr(): t for t in vars(self).values() if isinstance(t, torch.Tensor)}
        return sum(t.numel() * t.element_size() for t in tensors.values())


def make_linear(weight_ED: torch.Tensor, bias_E: torch.Tensor | None, scheme: str | None) -> Product:
    """The fastest way here to multiply by this matrix. scheme None shares the weight's storage; others need it no more.

    Raises UserError on an unknown scheme.
    """
    if scheme is None:
        return Plain(weight_ED, bias_E)
    if scheme not in SCHEMES:
        raise UserError("quantize", f"{scheme!r} is no scheme", f"use {', '.join(SCHEMES)}, or leave it out")
    weight_ED = weight_ED.detach()
    if weight_ED.device.type == "cpu" and native("int8") is not None and native("int4") is not None:
        native_kinds: dict[str, Callable[..., Product]] = {
            "int8": NativeInt8, "int8-weight": NativeInt8Weight, "int4": NativeInt4,
        }  # fmt: skip
        return native_kinds[scheme](weight_ED, bias_E)
    kinds: dict[str, Callable[..., Product]] = {"int8": TorchInt8, "int8-weight": TorchInt8Weight, "int4": TorchInt4}
    if scheme == "int4" and weight_ED.device.type == "cuda" and TinyGemm.fits(weight_ED):
        return TinyGemm(weight_ED, bias_E)
    return kinds[scheme](weight_ED, bias_E)


def head_scheme(scheme: str | None) -> str | None:
    """The scheme of the output head: 8 bits where the blocks have 4.

    Its rounding goes straight into the logits. SmolLM2-135M with nothing but the head in 4 bits: KL 0.053; in 8: 0.002.
    """
    return "int8" if scheme == "int4" else scheme


class Plain(Product):
    """No quantisation."""

    def __init__(self, weight_ED: torch.Tensor, bias_E: torch.Tensor | None) -> None:
        super().__init__(weight_ED, bias_E)
        self.weight = weight_ED

    def __call__(self, x_ND: torch.Tensor) -> torch.Tensor:
        return F.linear(x_ND, self.weight, self.bias)


# C kernels, CPU


class _Native(Product):
    """Weights in panels of 16 outputs, addresses taken once."""

    def __init__(self, weight_ED: torch.Tensor, bias_E: torch.Tensor | None) -> None:
        super().__init__(weight_ED, bias_E)
        self.bias = None if self.bias is None else self.bias.float().contiguous()

    def _address(self, tensor: torch.Tensor | None) -> int | None:
        return None if tensor is None else tensor.data_ptr()

    def _floats(self, x_ND: torch.Tensor, width: int) -> torch.Tensor:
        """x as the kernels read it, padded with zeros to `width` inputs; they cannot look at its shape themselves."""
        if x_ND.ndim != 2 or x_ND.shape[1] != self.in_features:
            raise ValueError(f"x is {tuple(x_ND.shape)}, the matrix takes rows of {self.in_features}")
        if x_ND.dtype is not torch.float32:
            x_ND = x_ND.float()
        return F.pad(x_ND, (0, width - self.in_features)) if width != self.in_features else x_ND.contiguous()


class NativeInt8(_Native):
    """csrc/int8.c: dynamic_linear of ops/quant.py, with two digits."""

    def __init__(self, weight_ED: torch.Tensor, bias_E: torch.Tensor | None) -> None:
        super().__init__(weight_ED, bias_E)
        self.padded = _round_up(self.in_features, 64)
        self.panels, self.scale = _int8_panels(weight_ED, self.padded, outputs=32, offset=128)
        self.function = _function("int8", "int8_linear", pointers=6, ints=7)
        self.addresses = [self._address(t) for t in (self.panels, self.scale, self.bias)]

    def __call__(self, x_ND: torch.Tensor) -> torch.Tensor:
        x, n = self._floats(x_ND, self.in_features), len(x_ND)
        y_NE = x.new_empty(n, self.out_features)
        scratch = x.new_empty(_round_up(n * DIGITS, 32) * (self.padded // 4 + 2))
        sizes = n, self.in_features, self.padded, self.out_features, DIGITS, AMX_ROWS, torch.get_num_threads()
        self.function(x.data_ptr(), *self.addresses, y_NE.data_ptr(), scratch.data_ptr(), *sizes)
        return y_NE if x_ND.dtype is torch.float32 else y_NE.to(x_ND.dtype)


class NativeInt8Weight(_Native):
    """csrc/int4.c with 8 bits: F.linear(x, quantize(weight).dequantize())."""

    def __init__(self, weight_ED: torch.Tensor, bias_E: torch.Tensor | None) -> None:
        super().__init__(weight_ED, bias_E)
        self.padded = _round_up(self.in_features, 4)
        self.panels, self.scale = _int8_panels(weight_ED, self.padded, outputs=16)
        self.function = _function("int4", "int8_weight_linear", pointers=5, ints=4)
        self.addresses = [self._address(t) for t in (self.panels, self.scale, self.bias)]

    def __call__(self, x_ND: torch.Tensor) -> torch.Tensor:
        x, n = self._floats(x_ND, self.padded), len(x_ND)
        y_NE = x.new_empty(n, self.out_features)
        sizes = n, self.padded, self.out_features, torch.get_num_threads()
        self.function(x.data_ptr(), *self.addresses, y_NE.data_ptr(), *sizes)
        return y_NE if x_ND.dtype is torch.float32 else y_NE.to(x_ND.dtype)


class NativeInt4(_Native):
    """csrc/int4.c: F.linear(x, quantize_groups(weight).dequantize())."""

    def __init__(self, weight_ED: torch.Tensor, bias_E: torch.Tensor | None, group: int = GROUP) -> None:
        super().__init__(weight_ED, bias_E)
        self.padded, self.group = _round_up(self.in_features, group), group
        panels, params = [], []
        for rows_ED in weight_ED.split(CHUNK):
            part = quantize_groups(F.pad(rows_ED, (0, self.padded - self.in_features)), group)
            panels.append(_panels(pack_int4(part.q.flatten(1)).view(torch.int32), 16))
            params.append(_panels(torch.stack([part.scale, part.centre], dim=2).flatten(1).view(torch.int16), 16))
        self.panels, self.params = torch.cat(panels), torch.cat(params)  # params: [E/16, groups * 2, 16]
        self.function = _function("int4", "int4_linear", pointers=6, ints=5)
        self.addresses = [self._address(t) for t in (self.panels, self.params, self.bias)]

    def __call__(self, x_ND: torch.Tensor) -> torch.Tensor:
        x, n = self._floats(x_ND, self.padded), len(x_ND)
        y_NE, sums = x.new_empty(n, self.out_features), x.new_empty(n, self.padded // self.group)
        sizes = n, self.padded, self.out_features, self.group, torch.get_num_threads()
        self.function(x.data_ptr(), *self.addresses, y_NE.data_ptr(), sums.data_ptr(), *sizes)
        return y_NE if x_ND.dtype is torch.float32 else y_NE.to(x_ND.dtype)


def _int8_panels(
    weight_ED: torch.Tensor, width: int, outputs: int, offset: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Panels of the quantised weight (four of an output's bytes in a word, plus `offset`), and the scales [E]."""
    panels, scales = [], []
    for rows_ED in weight_ED.split(CHUNK):
        part = quantize(rows_ED)
        bytes_EK = F.pad(part.q, (0, width - rows_ED.shape[1])).view(torch.uint8) ^ offset  # + 128 is the sign bit
        panels.append(_panels(bytes_EK.view(torch.int32), outputs))
        scales.append(part.scale.flatten())
    return torch.cat(panels), torch.cat(scales)


def _panels(rows_EK: torch.Tensor, outputs: int) -> torch.Tensor:
    """[E, K] -> [E / 16, K, 16], E filled up to a multiple of `outputs`: what one column needs lies side by side."""
    filled = F.pad(rows_EK, (0, 0, 0, -len(rows_EK) % outputs))
    return filled.unflatten(0, (-1, 16)).transpose(1, 2).contiguous()


def _round_up(number: int, step: int) -> int:
    return -(-number // step) * step


def _function(library: str, name: str, pointers: int, ints: int) -> Callable[..., None]:
    loaded = native(library)
    assert loaded is not None
    function = getattr(loaded, name)
    function.argtypes, function.restype = [ctypes.c_void_p] * pointers + [ctypes.c_int] * ints, None
    return function


# torch: CUDA, and any device without the kernels


class TorchInt8(Product):
    """dynamic_linear with torch._int_mm, which on CUDA wants more than 16 rows and multiples of 8."""

    def __init__(self, weight_ED: torch.Tensor, bias_E: torch.Tensor | None) -> None:
        super().__init__(weight_ED, bias_E)
        part = quantize(weight_ED)
        fill = (0, -self.in_features % 8, 0, -self.out_features % 8)
        self.q_ED, self.scale_1E = F.pad(part.q, fill), part.scale.T.contiguous()

    def __call__(self, x_ND: torch.Tensor) -> torch.Tensor:
        (q, scale), n = row_digits(x_ND, DIGITS), len(x_ND)
        short = max(0, 32 - DIGITS * n) if x_ND.is_cuda else 0
        rows = F.pad(q.flatten(0, 1), (0, self.q_ED.shape[1] - self.in_features, 0, short))
        sums = torch._int_mm(rows, self.q_ED.T)[: DIGITS * n, : self.out_features].unflatten(0, (DIGITS, n))
        y_NE = (sums * (scale * self.scale_1E)).sum(0)
        return (y_NE if self.bias is None else y_NE + self.bias).to(x_ND.dtype)


class TorchInt8Weight(Product):
    """The weight becomes floats at every call, and its scale goes onto the result."""

    def __init__(self, weight_ED: torch.Tensor, bias_E: torch.Tensor | None) -> None:
        super().__init__(weight_ED, bias_E)
        part = quantize(weight_ED)
        self.q_ED, self.scale_E = part.q, part.scale.flatten()

    def __call__(self, x_ND: torch.Tensor) -> torch.Tensor:
        y_NE = F.linear(x_ND, self.q_ED.to(x_ND.dtype)) * self.scale_E
        return (y_NE if self.bias is None else y_NE + self.bias).to(x_ND.dtype)


class TorchInt4(Product):
    """The weight becomes floats at every call."""

    def __init__(self, weight_ED: torch.Tensor, bias_E: torch.Tensor | None, group: int = GROUP) -> None:
        super().__init__(weight_ED, bias_E)
        self.group = group
        part = quantize_groups(F.pad(weight_ED, (0, -self.in_features % group)), group)
        self.packed, self.scale, self.centre = pack_int4(part.q), part.scale, part.centre

    def __call__(self, x_ND: torch.Tensor) -> torch.Tensor:
        weight_ED = Grouped(unpack_int4(self.packed), self.scale, self.centre).dequantize()[:, : self.in_features]
        return F.linear(x_ND, weight_ED.to(x_ND.dtype), None if self.bias is None else self.bias.to(x_ND.dtype))


class TinyGemm(Product):
    """torch's int4 kernel for CUDA (compute capability 8.0 and newer), computing in bf16. The same numbers are kept."""

    def __init__(self, weight_ED: torch.Tensor, bias_E: torch.Tensor | None, group: int = GROUP) -> None:
        super().__init__(weight_ED, bias_E)
        self.group = group
        part = quantize_groups(weight_ED, group)
        levels_ED = (part.q + 8).flatten(1).to(torch.uint8)  # 0..15: it takes 8 for the centre
        tiles = next(t for t in (8, 4, 2) if self.in_features % (16 * t) == 0)
        self.packed = torch._convert_weight_to_int4pack(levels_ED[:, ::2] << 4 | levels_ED[:, 1::2], tiles)
        self.params_GE2 = torch.stack([part.scale, part.centre], dim=-1).transpose(0, 1).contiguous()

    @staticmethod
    def fits(weight_ED: torch.Tensor) -> bool:
        outputs, inputs = weight_ED.shape
        return inputs % GROUP == 0 and outputs % 8 == 0 and torch.cuda.get_device_capability(weight_ED.device)[0] >= 8

    def __call__(self, x_ND: torch.Tensor) -> torch.Tensor:
        y_NE = torch._weight_int4pack_mm(x_ND.bfloat16(), self.packed, self.group, self.params_GE2)
        return (y_NE if self.bias is None else y_NE + self.bias).to(x_ND.dtype)
