"""The block of model/block.py for answering: matrices joined, and what lies between them in C, fp32 on a CPU.

A step for a few sequences reads every weight once and does little else, so the calls between the products are what can
be saved: q, k and v are one product, gate and up another, and norm, RoPE, cache and attention are four calls into
csrc/decode.c. Joining costs no memory: the model's parameters become views of the joined matrices.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import nn

from groundup.infer.adapters import add_deltas
from groundup.infer.linear import make_linear
from groundup.infer.paged import PagedRows
from groundup.model.attention import Attention
from groundup.model.block import Block
from groundup.model.ffn import FeedForward
from groundup.model.norm import RMSNorm
from groundup.model.rope import rope_frequencies, rope_table
from groundup.model.transformer import Transformer
from groundup.ops.linear import linear
from groundup.ops.native import native, pointer

Rope = tuple[torch.Tensor, torch.Tensor]  # cos and sin, [N, d / 2]
Linear = Callable[[torch.Tensor], torch.Tensor]


def fuse(model: Transformer, scheme: str | None) -> FusedModel | None:
    """The model for answering; None where this machine or model needs the plain blocks.

    scheme: how the matrices are quantised (linear.py); None: as they are. Quantised, the model given is used up: its
    own matrices are let go.
    """
    weight, library = model.head_weight, native("decode")
    plain = all(type(part) in _KNOWN for block in model.blocks for part in block.modules())
    if library is None or weight.device.type != "cpu" or weight.dtype != torch.float32 or not plain:
        return None
    return FusedModel(model, scheme, library) if model.config.head_dim <= LARGEST_HEAD else None


_KNOWN = (Block, Attention, FeedForward, RMSNorm, nn.Linear)
LARGEST_HEAD = 256  # csrc/decode.c keeps a head's sums on the stack


class FusedModel:
    def __init__(self, model: Transformer, scheme: str | None, library: ctypes.CDLL) -> None:
        self.embed, self.norm, self.library = model.model.embed_tokens, model.model.norm, library
        self.rope = functools.partial(rope_table, *rope_frequencies(model.config))
        with torch.no_grad():
            self.blocks = [FusedBlock(cast(Block, block), scheme, library) for block in model.blocks]

    def hidden(self, ids_N: torch.Tensor, rows: PagedRows) -> torch.Tensor:
        """Hidden states after the last norm, [N, D]; keys and values go into the cache."""
        x_ND, rope = self.embed(ids_N), self.rope(rows.positions_N)
        whole = not rows.adapters and all(block.spec is not None for block in self.blocks)
        batch = self._batch(rows, rope, len(x_ND)) if whole else None
        for block in self.blocks:
            x_ND = block.at_once(x_ND, batch, rows) if batch is not None else block(x_ND, rope, rows)
        return add_norm(self.library, x_ND, None, self.norm.weight, ctypes.c_float(self.norm.eps))

    @property
    def matrices(self) -> list[torch.Tensor]:
        """The large ones, as far as they are not quantised."""
        joined = [part for block in self.blocks for part in (block.qkv, block.o, block.gate_up, block.down)]
        return [part.weight for part in joined if part.weight is not None]

    def _batch(self, rows: PagedRows, rope: Rope, n: int) -> BatchSpec:
        block = self.blocks[0].spec
        assert block is not None
        numbers = 2 * block.hidden + (3 * block.heads + 2 * block.kv_heads) * block.d + 3 * block.wide
        held = (*rope, rows.slots_N, rows.tables_SW, rows.sequence_N, rows.lengths_N, torch.empty(n * numbers))
        batch = BatchSpec(n, rows.cache.block_size, rows.tables_SW.shape[1], *(tensor.data_ptr() for tensor in held))
        batch.held = held  # ctypes keeps addresses, not what lies there
        return batch


class BlockSpec(ctypes.Structure):
    """Block of csrc/decode.c."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in (
            "norm", "qkv", "qkv_bias", "q_norm", "k_norm", "o", "o_bias", "ffn_norm", "gate_up", "gate_up_bias", "down",
            "down_bias",
        )),
        *((name, ctypes.c_int) for name in ("hidden", "heads", "kv_heads", "d", "wide")),
        ("eps", ctypes.c_float),
    ]  # fmt: skip


class BatchSpec(ctypes.Structure):
    """Batch of csrc/decode.c."""

    _fields_ = [
        *((name, ctypes.c_int) for name in ("n", "size", "width")),
        *((name, ctypes.c_void_p) for name in (
            "cosines", "sines", "slots", "tables", "sequences", "lengths", "scratch",
        )),
    ]  # fmt: skip


def add_norm(
    library: ctypes.CDLL, x_ND: torch.Tensor, delta_ND: torch.Tensor | None, weight_D: torch.Tensor, eps: ctypes.c_float
) -> torch.Tensor:
    """x += delta, in place; the normalised x."""
    out_ND = torch.empty_like(x_ND)
    library.add_rms_norm(*map(pointer, (x_ND, delta_ND, weight_D, out_ND)), *x_ND.shape, eps)
    return out_ND


def product(weight_ED: torch.Tensor, bias_E: torch.Tensor | None, scheme: str | None) -> Linear:
    """x @ weight^T + bias, quantised or not; a row's result does not depend on the others."""
    if scheme is None:
        return functools.partial(linear, weight_ED=weight_ED, bias_E=bias_E)
    return make_linear(weight_ED, bias_E, scheme)


class FusedBlock:
    def __init__(self, block: Block, scheme: str | None, library: ctypes.CDLL) -> None:
        attention, mlp = block.self_attn, block.mlp
        self.library, self.layer, self.dim = library, attention.layer, attention.head_dim
        self.eps = ctypes.c_float(block.input_layernorm.eps)
        self.norms = (block.input_layernorm.weight, block.post_attention_layernorm.weight)
        self.qk_norms = (attention.q_norm.weight, attention.k_norm.weight) if attention.qk_norm else (None, None)
        self.qkv = Joined([attention.q_proj, attention.k_proj, attention.v_proj], scheme)
        self.o, self.down = Joined([attention.o_proj], scheme), Joined([mlp.down_proj], scheme)
        self.gate_up = Joined([mlp.gate_proj, mlp.up_proj], scheme)
        if scheme is not None:  # kept quantised, not twice
            for layer in (part for part in block.modules() if isinstance(part, nn.Linear)):
                layer.weight.data = layer.weight.new_empty(0)

        self.spec = self._spec(block) if scheme is None else None

    def _spec(self, block: Block) -> BlockSpec:
        """All that csrc/decode.c needs to compute this block by itself."""
        attention, dims = block.self_attn, self.dim
        parts = (self.qkv, self.o, self.gate_up, self.down)
        qkv, o, gate_up, down = ((part.weight, part.bias) for part in parts)
        tensors = (self.norms[0], *qkv, *self.qk_norms, *o, self.norms[1], *gate_up, *down)
        spec = BlockSpec(
            *(None if tensor is None else tensor.data_ptr() for tensor in tensors),
            attention.q_proj.in_features, attention.q_proj.out_features // dims, attention.k_proj.out_features // dims,
            dims, block.mlp.down_proj.in_features, self.eps.value,
        )  # fmt: skip
        spec.held = tensors
        return spec

    def at_once(self, x_ND: torch.Tensor, batch: BatchSpec, rows: PagedRows) -> torch.Tensor:
        """As __call__, in one call into C; in place."""
        assert self.spec is not None
        keys, values = rows.cache.keys[self.layer], rows.cache.values[self.layer]
        self.library.block(ctypes.byref(self.spec), ctypes.byref(batch), *map(pointer, (keys, values, x_ND)))
        return x_ND

    def __call__(self, x_ND: torch.Tensor, rope: Rope, rows: PagedRows) -> torch.Tensor:
        hidden_ND = add_norm(self.library, x_ND, None, self.norms[0], self.eps)
        out_NHd = self._attention(self.qkv(hidden_ND, rows), rope, rows)
        hidden_ND = add_norm(self.library, x_ND, self.o(out_NHd.flatten(1), rows), self.norms[1], self.eps)
        return x_ND.add_(self.down(self._swiglu(self.gate_up(hidden_ND, rows)), rows))

    def _attention(self, qkv_NE: torch.Tensor, rope: Rope, rows: PagedRows) -> torch.Tensor:
        keys, values = rows.cache.keys[self.layer], rows.cache.values[self.layer]
        kv_heads, n = keys.shape[1], len(qkv_NE)
        heads = qkv_NE.shape[1] // self.dim - 2 * kv_heads
        q_NHd = qkv_NE.new_empty(n, heads, self.dim)
        before, after = map(pointer, (qkv_NE, *self.qk_norms)), map(pointer, (*rope, rows.slots_N, q_NHd, keys, values))
        self.library.split_turn_store(*before, self.eps, *after, n, heads, kv_heads, self.dim, rows.cache.block_size)
        return rows.answer(self.layer, q_NHd)

    def _swiglu(self, gate_up_N2F: torch.Tensor) -> torch.Tensor:
        n, wide = len(gate_up_N2F), gate_up_N2F.shape[1] // 2
        out_NF = gate_up_N2F.new_empty(n, wide)
        self.library.silu_mul(pointer(gate_up_N2F), pointer(out_NF), n, wide)
        return out_NF


class Joined:
    """Several matrices that read the same, as one product, and the adapters of each."""

    def __init__(self, layers: Sequence[nn.Linear], scheme: str | None) -> None:
        self.layers = layers
        self.bias = None if layers[0].bias is None else joined([layer.bias for layer in layers])
        self.weight: torch.Tensor | None = joined([layer.weight for layer in layers])
        self.product = product(self.weight, self.bias, scheme)
        if scheme is not None:
            self.weight = None  # it is kept quantised

    def __call__(self, x_ND: torch.Tensor, rows: PagedRows) -> torch.Tensor:
        return add_deltas(self.product(x_ND), x_ND, self.layers, rows.adapters)


def joined(parameters: Sequence[torch.Tensor]) -> torch.Tensor:
    """One tensor of several, which become views of it; joined once, however often asked."""
    first, rows = parameters[0].data, sum(len(p) for p in parameters)
    ends = [p.data.data_ptr() + p.numel() * p.itemsize for p in parameters]
    if all(p.data.data_ptr() == end for p, end in zip(parameters[1:], ends[:-1], strict=True)) and all(
        p.data.untyped_storage().data_ptr() == first.untyped_storage().data_ptr() for p in parameters
    ):
        return first.as_strided((rows, *first.shape[1:]), first.stride())
    whole = torch.cat([p.data for p in parameters])
    for parameter, part in zip(parameters, whole.split([len(p) for p in parameters]), strict=True):
        parameter.data = part
    return whole
