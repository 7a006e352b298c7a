"""The fast block of fast.py for frozen matrices: alone, quantised, or with LoRA's thin products beside them.

A frozen matrix needs no gradient, so a layer takes two large products where full training takes three. What fast.py
folds into copies of the matrices by autograd is folded here into the buffer that the matrix is made in for each product
(ops/lora.py); only A and B are folded by autograd. So a step holds no second copy of the model, and a quantised base is
one more way to fill that buffer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from groundup.model.attention import Attention
from groundup.model.block import Block
from groundup.model.ffn import FeedForward
from groundup.model.norm import RMSNorm
from groundup.ops.lora import Matrix, norm_linear_lora, residual_ffn_lora, residual_linear_lora
from groundup.ops.rope import pairs_first

Attend = Callable[[Attention, torch.Tensor], torch.Tensor]  # q, k and v [N, E] -> what is heard [N, F]


class Thin(NamedTuple):
    """A linear layer as this file sees it: a frozen base, A [R, D], and B [E, R] with the scale in it; R may be 0."""

    base: Any
    a: torch.Tensor
    b: torch.Tensor


def is_frozen(block: nn.Module) -> bool:
    """Whether `frozen_block` computes this block: a Block of fp32 on a CPU, frozen but for A and B, nothing else in it.

    Not so with dropout, DoRA or another adapter, a hook on a part, a bias elsewhere than on q, k and v.
    """
    if type(block) is not Block or type(block.self_attn) is not Attention or type(block.mlp) is not FeedForward:
        return False
    if block._compiled_call_impl is not None or _hooked(block.self_attn) or _hooked(block.mlp):
        return False
    bases = [_base(linear) for linear in _linears(block)]
    if None in bases or not all(type(norm) is RMSNorm and _frozen(norm) for norm in _norms(block)):
        return False
    return all(getattr(base, "bias", None) is None for base in bases[3:])


def frozen_block(block: Block, x_ND: torch.Tensor, attend: Attend) -> torch.Tensor:
    """The block over tokens [N, D], end to end."""
    x_ND = _attention(block.self_attn, block.input_layernorm, x_ND, attend)
    return _ffn(block.mlp, block.post_attention_layernorm, x_ND)


def features(layer: Any) -> int:
    """Outputs of a linear layer, an adapter's too."""
    out: int = getattr(layer, "base", layer).out_features
    return out


def _linears(block: Block) -> list[nn.Module]:
    attention, ffn = block.self_attn, block.mlp
    return [
        attention.q_proj, attention.k_proj, attention.v_proj,
        attention.o_proj, ffn.gate_proj, ffn.up_proj, ffn.down_proj,
    ]  # fmt: skip


def _norms(block: Block) -> list[RMSNorm]:
    attention = block.self_attn
    own = [attention.q_norm, attention.k_norm] if attention.qk_norm else []
    return [block.input_layernorm, block.post_attention_layernorm, *own]


def _base(layer: Any) -> nn.Module | None:
    """The frozen matrix of a layer, or None where the layer does more than it and a thin product."""
    if hasattr(layer, "base"):
        layer = layer.base if _only_thin(layer) else nn.Identity()
    known = type(layer) is nn.Linear or hasattr(layer, "dequantize")
    return layer if known and _frozen(layer) else None


def _only_thin(adapter: Any) -> bool:
    """Whether all that an adapter does is to add a thin product: LoRA without dropout, not DoRA."""
    if not hasattr(adapter, "thin") or getattr(adapter, "magnitude", None) is not None or _hooked(adapter):
        return False
    dropping = adapter.training and getattr(adapter.dropout, "p", 0) > 0
    return not dropping and all(matrix.dtype == torch.float32 for matrix in adapter.thin())


def _frozen(part: nn.Module) -> bool:
    return not _hooked(part) and all(p.dtype == torch.float32 and not p.requires_grad for p in part.parameters())


def _hooked(part: nn.Module) -> bool:
    return bool(part._forward_hooks or part._forward_pre_hooks)


def _thin(layer: nn.Module) -> Thin:
    adapter: Any = layer
    if not hasattr(adapter, "base"):
        return Thin(layer, torch.empty(0, adapter.in_features), torch.empty(adapter.out_features, 0))
    a, b = adapter.thin()
    return Thin(adapter.base, a, b * adapter.scale)


def _attention(layer: Attention, norm: RMSNorm, x_ND: torch.Tensor, attend: Attend) -> torch.Tensor:
    x_ND, qkv_NE = norm_linear_lora(x_ND, *_qkv(layer, norm), norm.eps)
    o = _thin(layer.o_proj)
    return residual_linear_lora(x_ND, attend(layer, qkv_NE), _alone(o))


def _qkv(layer: Attention, norm: RMSNorm) -> tuple[Matrix, torch.Tensor | None]:
    """One matrix (and bias) for q, k and v: pairs side by side, the norm before it and the scale after folded in."""
    parts = [_thin(linear) for linear in (layer.q_proj, layer.k_proj, layer.v_proj)]
    dim, scale = layer.head_dim, 1.0 if layer.qk_norm else layer.head_dim**-0.5

    def ordered(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> list[torch.Tensor]:
        return [
            pairs_first(query, dim),
            pairs_first(key, dim),
            value.view(len(value) // dim, dim // 2, 2, *value.shape[1:]),
        ]

    def frozen() -> torch.Tensor:
        sources = ordered(*(_stored(part.base) for part in parts))
        heights = [part.b.shape[0] for part in parts]
        out_ED = norm.weight.new_empty(sum(heights), norm.weight.shape[0])
        places = out_ED.split(heights)
        factors = (norm.weight * scale, norm.weight, norm.weight)
        for source, place, factor in zip(sources, places, factors, strict=True):
            torch.mul(source, factor, out=place.view_as(source))
        return out_ED

    wide = [b.flatten(0, 2) for b in ordered(parts[0].b * scale, parts[1].b, parts[2].b)]
    bias = None
    if parts[0].base.bias is not None:
        q, k, v = (part.base.bias.detach() for part in parts)
        bias = torch.cat([b.flatten() for b in ordered(q * scale, k, v)])
    return Matrix(frozen, _stacked(parts, norm), torch.block_diag(*wide)), bias


def _ffn(layer: FeedForward, norm: RMSNorm, x_ND: torch.Tensor) -> torch.Tensor:
    parts, down = [_thin(layer.gate_proj), _thin(layer.up_proj)], _thin(layer.down_proj)

    def frozen() -> torch.Tensor:
        out_ED = norm.weight.new_empty(2 * parts[0].b.shape[0], norm.weight.shape[0])
        for part, place in zip(parts, out_ED.chunk(2), strict=True):
            torch.mul(_stored(part.base), norm.weight, out=place)
        return out_ED

    gate_up = Matrix(frozen, _stacked(parts, norm), torch.block_diag(*(part.b for part in parts)))
    return residual_ffn_lora(x_ND, gate_up, _alone(down), norm.eps)


def _stacked(parts: Sequence[Thin], norm: RMSNorm) -> torch.Tensor:
    """The A of layers that read the same normalised tokens, with the norm's weight in them."""
    return torch.cat([part.a for part in parts]) * norm.weight


def _alone(part: Thin) -> Matrix:
    return Matrix(lambda: _stored(part.base), part.a, part.b, spare=type(part.base) is not nn.Linear)


def _stored(base: Any) -> torch.Tensor:
    """A frozen matrix [E, D]: itself, or what is stored of it in full."""
    return base.weight.detach() if type(base) is nn.Linear else base.dequantize()
