"""The block of block.py once more, for training on a CPU: the same numbers in fewer passes over memory.

Where matrices are small and tokens many, whatever can be done to a matrix instead of to the tokens is: the norms'
weights, the attention scale and the order of RoPE's pairs are folded into copies of the matrices, by plain autograd,
and q, k and v (gate and up) become one product each. What is left to do on tokens stands in ops/. Fewer tokens than
MANY widths are not worth the copies: block.py is faster then, by a seventh at 512 tokens of 576 numbers.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from groundup.model.attention import Attention
from groundup.model.block import Block
from groundup.model.config import ModelConfig
from groundup.model.fast_lora import features, frozen_block, is_frozen
from groundup.model.ffn import FeedForward
from groundup.model.norm import RMSNorm
from groundup.ops.norm import norm_linear
from groundup.ops.rope import norm_and_turn, pairs_first
from groundup.ops.spans import span_attention
from groundup.ops.swiglu import residual_ffn

MANY = 3  # tokens for each number of a hidden state; with 3 to 10 of them both blocks are about as fast


def can_be_fast(blocks: Iterable[nn.Module], config: ModelConfig, device: torch.device, tokens: int) -> bool:
    """Whether `FastRows` computes these blocks: fp32 on a CPU, and every part of them still as block.py made it, and so
    many tokens at once that it pays (frozen blocks always: they fold while a matrix is made, and keep no copy).

    Not so where something has taken hold of a part: a shard, a hook, a compiler; an adapter or a quantised matrix but
    for those that fast_lora.py knows.
    """
    if device.type != "cpu" or torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling():
        return False
    if config.attention_bias or config.mlp_bias:  # rare; only the bias on q, k and v (qwen2) is worth the lines
        return False
    many = tokens >= MANY * config.hidden_size
    return all(is_frozen(block) or (many and all(map(_untouched, block.modules()))) for block in blocks)


def _untouched(part: nn.Module) -> bool:
    if type(part) is Block:  # the block itself is called as ever: its hooks run
        return part._compiled_call_impl is None
    if type(part) not in (nn.Linear, RMSNorm, Attention, FeedForward) or part._forward_hooks or part._forward_pre_hooks:
        return False
    own = [p for p in part._parameters.values() if p is not None]
    return all(type(p) in (nn.Parameter, torch.Tensor) and p.dtype == torch.float32 for p in own)


@dataclass(frozen=True)
class FastRows:
    """What a batch needs, and a block's forward over it. turns: exp(i angle) of each pair; doc_ids: who sees whom."""

    turns_BTp: torch.Tensor
    doc_ids_BT: torch.Tensor

    def __call__(self, block: Block, x_BTD: torch.Tensor) -> torch.Tensor:
        x_ND = x_BTD.flatten(0, 1)
        if is_frozen(block):
            return frozen_block(block, x_ND, self.attend).view_as(x_BTD)
        x_ND = _attention(block.self_attn, block.input_layernorm, x_ND, self)
        return _ffn(block.mlp, block.post_attention_layernorm, x_ND).view_as(x_BTD)

    def attend(self, layer: Attention, qkv_NE: torch.Tensor) -> torch.Tensor:
        """[N, F]: what each token hears, from the joint product of q, k and v as `_folded_qkv` orders it."""
        dim = layer.head_dim
        heads, kv_heads = (features(part) // dim for part in (layer.q_proj, layer.k_proj))
        groups, eps = (kv_heads, heads // kv_heads), layer.q_norm.eps if layer.qk_norm else 0.0
        qkv_BTEd = qkv_NE.view(*self.doc_ids_BT.shape, -1, dim)
        scales_Cd = _folded_qk_norms(layer, groups) if layer.qk_norm else None
        q_BTKGd, k_BTKd, v_BTKd = norm_and_turn(qkv_BTEd, scales_Cd, self.turns_BTp, groups, eps)
        return span_attention(q_BTKGd, k_BTKd, v_BTKd, self.doc_ids_BT).view(len(qkv_NE), -1)


def _attention(layer: Attention, norm: RMSNorm, x_ND: torch.Tensor, rows: FastRows) -> torch.Tensor:
    x_ND, qkv_NE = norm_linear(x_ND, *_folded_qkv(layer, norm), norm.eps)
    return torch.addmm(x_ND, rows.attend(layer, qkv_NE), layer.o_proj.weight.T)


def _folded_qkv(layer: Attention, norm: RMSNorm) -> tuple[torch.Tensor, torch.Tensor | None]:
    """One matrix (and bias) for q, k and v, pairs side by side, with the norm before it and the scale after."""
    q, k, v = layer.q_proj, layer.k_proj, layer.v_proj
    scale = layer.head_dim**-0.5  # with QK-norm it goes into the norm's weight instead
    halves = (-1, layer.head_dim // 2, 2)

    def joined(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        parts = [pairs_first(query if layer.qk_norm else query * scale, layer.head_dim)]
        parts += [pairs_first(key, layer.head_dim), value.view(*halves, *value.shape[1:])]
        return torch.cat(parts).flatten(0, 2)

    bias = None if q.bias is None else joined(q.bias, k.bias, v.bias)
    return joined(q.weight, k.weight, v.weight) * norm.weight, bias


def _folded_qk_norms(layer: Attention, groups: tuple[int, int]) -> torch.Tensor:
    """The QK-norms' weights, a row for each query and key head, pairs side by side, the scale in the queries'."""
    kv_heads, group = groups
    query = pairs_first(layer.q_norm.weight * layer.head_dim**-0.5, layer.head_dim)
    key = pairs_first(layer.k_norm.weight, layer.head_dim)
    return torch.cat([query.expand(kv_heads * group, -1, -1), key.expand(kv_heads, -1, -1)]).flatten(1)


def _ffn(layer: FeedForward, norm: RMSNorm, x_ND: torch.Tensor) -> torch.Tensor:
    gate_up = torch.cat([layer.gate_proj.weight, layer.up_proj.weight]) * norm.weight
    return residual_ffn(x_ND, gate_up, layer.down_proj.weight, norm.eps)
