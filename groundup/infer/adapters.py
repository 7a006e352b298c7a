"""How do several fine-tuned variants share one model? Each request may name a LoRA adapter; all else is the base.

LoRA (arXiv 2106.09685) adds a product of two thin matrices to a large one: y = W x + scale B (A x). In a batch the
large product is made for all rows at once, the thin ones for the rows of each adapter (Punica, arXiv 2310.18547).
Folders are PEFT's, read by adapt/folder.py. What thin products cannot say (DoRA, modules trained whole) is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from groundup.adapt.folder import CONFIG, read_adapter
from groundup.adapt.lora import read_lora
from groundup.adapt.targets import head_path, linear_layers
from groundup.errors import UserError
from groundup.model.transformer import Transformer
from groundup.ops.linear import linear

WAY_OUT = "merge it into its model: groundup merge BASE ADAPTER"


@dataclass(frozen=True)
class Adapter:
    """parts: of each nn.Linear that it changes, A [r, D] and B [E, r] with the scale in it."""

    name: str
    parts: Mapping[nn.Module, tuple[torch.Tensor, torch.Tensor]] = field(repr=False)


Rows = Sequence[tuple[Adapter, torch.Tensor]]  # which rows of the batch each adapter answers


def load_adapter(name: str, path: str | Path, model: Transformer) -> Adapter:
    """The LoRA adapter of a PEFT folder, for this model. UserError: no adapter there, or one that does not fit."""
    told, tensors = read_adapter(path)
    file = Path(path) / CONFIG
    if told.get("peft_type") != "LORA":
        raise UserError(file, "is no LoRA adapter", "name a folder of a LoRA adapter")
    for key in ("use_dora", "modules_to_save"):
        if told.get(key):
            raise UserError(file, f"{key} = {told[key]!r} is not supported beside other adapters", WAY_OUT)
    if told.get("init_lora_weights") == "pissa":
        raise UserError(file, "goes with what PiSSA left of its base", WAY_OUT)
    if not getattr(model, "servable", True):
        raise UserError(file, "this model answers without a cache, so without adapters beside each other", WAY_OUT)
    layers = linear_layers(model)
    layers.pop(head_path(model), None)
    try:
        thin, others = read_lora(layers, told, tensors)
    except UserError as error:
        raise UserError(path, error.why, error.fix) from None
    if others:
        raise UserError(path, f"{next(iter(others))} is not supported beside other adapters", WAY_OUT)
    for layer_path in thin:
        if not isinstance(layers[layer_path], nn.Linear):
            raise UserError(path, f"{layer_path} is no nn.Linear, which alone takes adapters here", WAY_OUT)
    like = model.head_weight
    return Adapter(
        name,
        {layers[p]: (t.a.to(like).contiguous(), (t.b * t.scale).to(like).contiguous()) for p, t in thin.items()},
    )


def add_deltas(out_NE: torch.Tensor, x_ND: torch.Tensor, layers: Sequence[nn.Linear], rows: Rows) -> torch.Tensor:
    """out += scale B (A x), in place, on the rows of each adapter. layers: their outputs stand side by side in out."""
    for adapter, index in rows:
        at = 0
        for layer in layers:
            part = adapter.parts.get(layer)
            if part is not None:
                delta = linear(linear(x_ND[index], part[0]), part[1])
                out_NE[index, at : at + layer.out_features] += delta
            at += layer.out_features
    return out_NE
