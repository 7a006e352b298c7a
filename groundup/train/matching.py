"""Does a student compute what its teacher computes? Hidden states and attention, layer beside layer.

Layers of different widths are compared through learnt projections, heads of different numbers through learnt mixtures.
They are trained with the student, kept in checkpoints, and left behind when the student is saved.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from groundup.config import DistillConfig
from groundup.data.batch import Batch
from groundup.errors import UserError
from groundup.model.attention import Attention
from groundup.model.block import Block
from groundup.model.foreign import Foreign
from groundup.model.rope import rope_frequencies, rope_table
from groundup.model.transformer import Transformer
from groundup.objectives.distill import match_attention, match_hidden
from groundup.ops.rope import apply_rope


class Matching(nn.Module):
    """The layers that are compared, with what is learnt between them. Its sums are over the batch's trained tokens."""

    def __init__(self, student: nn.Module, teacher: nn.Module, config: DistillConfig, seed: int) -> None:
        super().__init__()
        ours, theirs = cast(Transformer, student), cast(Transformer, teacher)
        _check(ours, theirs, config)
        self.config = config
        self.pairs = pair_layers(config.layers, len(ours.blocks), len(theirs.blocks))
        self.hidden, self.attention = nn.ParameterDict(), nn.ParameterDict()
        generator = torch.Generator().manual_seed(seed)
        widths = theirs.config.hidden_size, ours.config.hidden_size
        heads = theirs.config.num_attention_heads, ours.config.num_attention_heads
        for i, _ in self.pairs:
            if config.hidden_weight and widths[0] != widths[1]:
                self.hidden[str(i)] = nn.Parameter(torch.randn(widths, generator=generator) * widths[1] ** -0.5)
            if config.attention_weight and heads[0] != heads[1]:
                nearest = torch.arange(heads[0]) * heads[1] // heads[0]
                self.attention[str(i)] = nn.Parameter(torch.eye(heads[1])[nearest])
        self.to(ours.head_weight.device)

    def forward(
        self, student: nn.Module, seen: list[Tensor], teacher: nn.Module, taught: list[Tensor], batch: Batch
    ) -> dict[str, Tensor]:
        """{"hidden", "attention"}: sums, of what is asked for. seen, taught: what `hidden(seen=...)` noted of each."""
        sums: dict[str, Tensor] = {}
        labels_BT = batch.labels_BT
        if self.config.hidden_weight:
            each = [match_hidden(seen[i + 1], taught[j + 1], labels_BT, self.hidden.get(str(i))) for i, j in self.pairs]
            sums["hidden"] = torch.stack(each).mean()
        if self.config.attention_weight:
            each = []
            for i, j in self.pairs:
                ours = queries_and_keys(student, i, seen[i], batch.position_ids_BT)
                with torch.no_grad():
                    theirs = queries_and_keys(teacher, j, taught[j], batch.position_ids_BT)
                each.append(match_attention(ours, theirs, labels_BT, batch.doc_ids_BT, self.attention.get(str(i))))
            sums["attention"] = torch.stack(each).mean()
        return sums


class Matched(nn.Module):
    """A model and what is trained beside it, as one: the parameters of the model keep their names."""

    blocks: nn.ModuleList

    def __init__(self, model: Any, matching: Matching) -> None:
        super().__init__()
        self._modules = {**model._modules, "matching": matching}
        self._parameters, self._buffers = model._parameters, model._buffers
        self.__dict__.update(model=model, blocks=model.blocks)

    def train(self, mode: bool = True) -> Matched:
        self.training = mode
        self.__dict__["model"].train(mode)
        return self


def pair_layers(chosen: list[int], ours: int, theirs: int) -> list[tuple[int, int]]:
    """(student's layer, teacher's): the same share of the way up. chosen: the student's; none: all of them."""
    wrong = next((i for i in chosen if not -ours <= i < ours), None)
    if wrong is not None:
        fix = f"they are 0 to {ours - 1}, or -1 for the last"
        raise UserError("distill.layers", f"the student has no layer {wrong}", fix)
    layers = sorted({i % ours for i in chosen}) if chosen else list(range(ours))
    return [(i, max(0, round((i + 1) * theirs / ours) - 1)) for i in layers]


def queries_and_keys(model: nn.Module, layer: int, x_BTD: Tensor, position_ids_BT: Tensor) -> tuple[Tensor, Tensor]:
    """What a layer of ours, given x, compares: queries [B, T, H, d], keys [B, T, K, d], turned by their positions."""
    decoder = cast(Transformer, model)
    block = cast(Block, decoder.blocks[layer])
    listening: Attention = block.self_attn
    normed_BTD = block.input_layernorm(x_BTD)
    q, k = (part(normed_BTD).unflatten(-1, (-1, listening.head_dim)) for part in (listening.q_proj, listening.k_proj))
    if listening.qk_norm:
        q, k = listening.q_norm(q), listening.k_norm(k)
    inv_freq, factor = rope_frequencies(decoder.config)
    rope = rope_table(inv_freq.to(x_BTD.device), factor, position_ids_BT)
    return apply_rope(q, *rope), apply_rope(k, *rope)


def _check(student: Transformer, teacher: Transformer, config: DistillConfig) -> None:
    for key, model in (("model", student), ("distill.teacher", teacher)):
        if not isinstance(model, (Transformer, Foreign)):
            raise UserError("adapt.method", "layers behind a soft prompt are not compared", "use lora, freeze or full")
        kind = model.config.model_type
        if config.attention_weight and not isinstance(model, Transformer):
            why = f"{key}: transformers computes {kind}, and does not show its attention"
            raise UserError("distill.attention_weight", why, "compare hidden states alone: distill.hidden_weight")
        if isinstance(model, Foreign) and model.packing == "apart":
            why = f"{key}: {kind} computes each document in a row of its own, and does not show its hidden states"
            raise UserError("distill.hidden_weight", why, "leave it at 0")
