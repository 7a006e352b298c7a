"""Which part of a large model does a small one begin as? The directions, neurons and heads that carry most of it.

The residual stream is turned so that its first directions carry the most, and cut behind as many as the small model is
wide (SliceGPT, arXiv 2401.15024). Feed-forward neurons and groups of heads stay by how much they write into the stream,
layers evenly (Minitron, arXiv 2407.14679). What comes out says little that is right; it learns what it lost many times
sooner than fresh weights would learn anything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from groundup.errors import UserError
from groundup.model.attention import Attention
from groundup.model.block import Block
from groundup.model.config import ModelConfig
from groundup.model.norm import RMSNorm
from groundup.model.transformer import Transformer

Tokens = tuple[Tensor, Tensor, Tensor]  # ids, positions, documents (-1: filler), each [B, T]


def smaller(
    config: ModelConfig,
    layers: int | None = None,
    width: int | None = None,
    intermediate: int | None = None,
    heads: int | None = None,
) -> ModelConfig:
    """This shape with less of it; what is not given stays. Key and value heads go with the heads that they serve."""
    group = config.num_attention_heads // config.num_key_value_heads
    wanted: dict[str, int] = {
        "num_hidden_layers": layers or config.num_hidden_layers,
        "hidden_size": width or config.hidden_size,
        "intermediate_size": intermediate or config.intermediate_size,
        "num_attention_heads": heads or config.num_attention_heads,
    }
    for name, value in wanted.items():
        if not 1 <= value <= getattr(config, name):
            raise UserError(
                name, f"{value} is no part of the teacher's {getattr(config, name)}", "choose a smaller number"
            )
    heads = wanted["num_attention_heads"]
    if heads % group and heads > group:
        raise UserError("heads", f"{heads} are no whole groups of {group}", f"use a multiple of {group}")
    shape: dict[str, Any] = {**wanted, "num_key_value_heads": max(1, heads // group)}
    return replace(config, **shape)


@torch.no_grad()
def cut(model: Transformer, config: ModelConfig, batches: Iterable[Tokens]) -> Transformer:
    """A model of the smaller shape `config`, out of the weights of `model`. batches: text to see what matters, on the
    model's device; a few thousand tokens are enough. A full-sized cut is the model itself but for its last norm."""
    seen = _Watch(model)
    for ids_BT, positions_BT, documents_BT in batches:
        seen.look(ids_BT, positions_BT, documents_BT)
    turn_DW, scale = seen.turn(config.hidden_size)
    small = Transformer(config).to(model.head_weight.device).eval()
    small.model.embed_tokens.weight.copy_(model.model.embed_tokens.weight.float() @ turn_DW)
    last = model.model.norm.weight.float()
    if config.tie_word_embeddings:  # the head is the embedding: its norm cannot go into it
        small.model.norm.weight.copy_(scale * torch.einsum("dw,d,dw->w", turn_DW, last, turn_DW))
    else:
        small.model.norm.weight.fill_(1.0)
        small.lm_head.weight.copy_(scale * (model.lm_head.weight.float() * last) @ turn_DW)
    count = len(model.blocks)
    for i, block in enumerate(small.blocks):
        layer = round((i + 1) * count / len(small.blocks)) - 1
        _fill(
            cast(Block, block), cast(Block, model.blocks[layer]), turn_DW, scale, seen.heads[layer], seen.neurons[layer]
        )
    return small


class _Watch:
    """What a model writes into its residual stream: its second moments, and how much each neuron and head adds."""

    def __init__(self, model: Transformer) -> None:
        self.model, config = model, model.config
        device, layers = model.head_weight.device, config.num_hidden_layers
        self.moments_DD = torch.zeros(config.hidden_size, config.hidden_size, device=device)
        self.heads = torch.zeros(layers, config.num_attention_heads, device=device)
        self.neurons = torch.zeros(layers, config.intermediate_size, device=device)
        self.tokens = 0

    def look(self, ids_BT: Tensor, positions_BT: Tensor, documents_BT: Tensor) -> None:
        """At one batch. States count by their direction: later layers' are larger, and a norm stands before each."""
        real_BT, states = documents_BT >= 0, cast("list[Tensor]", [])
        with self._listening(real_BT):
            self.model.hidden(ids_BT, positions_BT, documents_BT, seen=states)
        for state_BTD in states:
            x_ND = state_BTD[real_BT].float()
            x_ND *= (x_ND.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
            self.moments_DD += x_ND.T @ x_ND
            self.tokens += len(x_ND)

    def turn(self, width: int) -> tuple[Tensor, float]:
        """The stream's first directions [D, W], and what states lose in them in size, per number of theirs."""
        if not self.tokens:
            raise UserError("data", "holds no token to look at", "give text or chats")
        parts, directions_DD = torch.linalg.eigh(self.moments_DD.double() / self.tokens)
        kept = float(parts[-width:].sum() / parts.sum())
        return directions_DD[:, -width:].float(), (kept * len(parts) / width) ** 0.5

    @contextmanager
    def _listening(self, real_BT: Tensor) -> Iterator[None]:
        """Hooks on what multiplies into the stream; fast paths, which have no such parts, are then not taken."""
        hooks = []
        for i, block in enumerate(self.model.blocks):
            attention, mlp = cast(Block, block).self_attn, cast(Block, block).mlp
            hooks.append(attention.o_proj.register_forward_pre_hook(self._note(self.heads[i], real_BT)))
            hooks.append(mlp.down_proj.register_forward_pre_hook(self._note(self.neurons[i], real_BT)))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    @staticmethod
    def _note(sums_P: Tensor, real_BT: Tensor) -> Callable[..., None]:
        """Adds up, for each of P equal parts of a matrix's input, the size of what it becomes."""

        def hook(layer: nn.Linear, inputs: tuple[Any, ...]) -> None:
            parts_NPd = inputs[0][real_BT].float().unflatten(-1, (len(sums_P), -1))
            if parts_NPd.shape[-1] == 1:
                sums_P.add_(parts_NPd.squeeze(-1).abs().sum(0) * layer.weight.float().norm(dim=0))
                return
            matrix_DPd = layer.weight.float().unflatten(-1, (len(sums_P), -1))
            for p in range(len(sums_P)):
                sums_P[p] += (parts_NPd[:, p] @ matrix_DPd[:, p].T).norm(dim=-1).sum()

        return hook


def _fill(small: Block, large: Block, turn_DW: Tensor, scale: float, heads_H: Tensor, neurons_F: Tensor) -> None:
    """One layer: the norms' weights go into the matrices behind them, which the turned stream then multiplies."""
    ours, theirs = small.self_attn, large.self_attn
    asking, listening = _heads(ours, theirs, heads_H)
    for name, chosen in (("q_proj", asking), ("k_proj", listening), ("v_proj", listening)):
        _rows_from(getattr(ours, name), getattr(theirs, name), large.input_layernorm, chosen, turn_DW, scale)
    ours.o_proj.weight.copy_(turn_DW.T @ theirs.o_proj.weight.float()[:, asking])
    if theirs.o_proj.bias is not None:
        ours.o_proj.bias.copy_(theirs.o_proj.bias.float() @ turn_DW)
    if ours.qk_norm:
        ours.q_norm.weight.copy_(theirs.q_norm.weight)
        ours.k_norm.weight.copy_(theirs.k_norm.weight)
    neurons = neurons_F.topk(small.mlp.down_proj.in_features).indices.sort().values
    for name in ("gate_proj", "up_proj"):
        _rows_from(
            getattr(small.mlp, name), getattr(large.mlp, name), large.post_attention_layernorm, neurons, turn_DW, scale
        )
    small.mlp.down_proj.weight.copy_(turn_DW.T @ large.mlp.down_proj.weight.float()[:, neurons])
    if large.mlp.down_proj.bias is not None:
        small.mlp.down_proj.bias.copy_(large.mlp.down_proj.bias.float() @ turn_DW)
    small.input_layernorm.weight.fill_(1.0)
    small.post_attention_layernorm.weight.fill_(1.0)


def _rows_from(
    small: nn.Linear, large: nn.Linear, norm: RMSNorm, chosen: Tensor, turn_DW: Tensor, scale: float
) -> None:
    matrix_ED = large.weight.float()[chosen] * norm.weight.float()
    small.weight.copy_(scale * matrix_ED @ turn_DW)
    if large.bias is not None:
        small.bias.copy_(large.bias[chosen])


def _heads(small: Attention, large: Attention, heads_H: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of the query heads that stay, and of the key and value heads: whole groups while more than one is left."""
    dim = large.head_dim
    ours, theirs = (layer.k_proj.out_features // dim for layer in (small, large))
    wanted, group = small.q_proj.out_features // dim // ours, len(heads_H) // theirs
    sums_Kg = heads_H.view(theirs, group)
    groups = sums_Kg.sum(1).topk(ours).indices.sort().values
    chosen = [sums_Kg[k].topk(wanted).indices.sort().values + k * group for k in groups.tolist()]
    within = torch.arange(dim, device=heads_H.device)
    return tuple((each[:, None] * dim + within).flatten() for each in (torch.cat(chosen), groups))  # type: ignore[return-value]
