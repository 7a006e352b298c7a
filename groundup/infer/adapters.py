"""How do several fine-tuned variants share one model? Each request may name a LoRA adapter; all else is the base.

LoRA (arXiv 2106.09685) adds a product of two thin matrices to a large one: y = W x + scale B (A x). In a batch the
large product is made for all rows at once, the thin ones for the rows of each adapter (Punica, arXiv 2310.18547).
Read here: folders as PEFT saves them, adapter_config.json and adapter_model.safetensors.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from groundup.errors import UserError
from groundup.model.transformer import Transformer
from groundup.ops.linear import linear

NAME = re.compile(r"(?:base_model\.model\.)?(model\.layers\.\d+\.\w+\.\w+)\.lora_(A|B)(?:\.default)?\.weight")
PLAIN_LORA = {"use_dora": False, "bias": "none", "modules_to_save": None, "rank_pattern": {}, "alpha_pattern": {}}


@dataclass(frozen=True)
class Adapter:
    """parts: of each nn.Linear that it changes, A [r, D] and B [E, r] with the scale in it."""

    name: str
    parts: Mapping[nn.Module, tuple[torch.Tensor, torch.Tensor]] = field(repr=False)


Rows = Sequence[tuple[Adapter, torch.Tensor]]  # which rows of the batch each adapter answers


def load_adapter(name: str, path: str | Path, model: Transformer) -> Adapter:
    """The LoRA adapter of a PEFT folder, for this model. UserError: no adapter there, or one that does not fit."""
    folder = Path(path)
    file, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        tensors = load_file(weights)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(folder, f"no adapter can be read here ({error})", "name a folder as PEFT saves it") from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA" or not config.get("r"):
        raise UserError(file, "is no LoRA adapter", "name a folder of a LoRA adapter")
    for key, plain in PLAIN_LORA.items():
        if config.get(key) not in (None, plain):
            raise UserError(file, f"{key} = {config[key]!r} is not supported", "merge the adapter into its model")
    scale = config["lora_alpha"] / (config["r"] ** 0.5 if config.get("use_rslora") else config["r"])
    modules = dict(model.named_modules())
    halves: dict[nn.Linear, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        found = NAME.fullmatch(key)
        layer = modules.get(found[1]) if found else None
        if found is None or not isinstance(layer, nn.Linear):
            raise UserError(weights, f"{key} changes nothing that this model has", "use an adapter of this model")
        halves.setdefault(layer, {})[found[2]] = tensor
    parts: dict[nn.Module, tuple[torch.Tensor, torch.Tensor]] = {}
    for layer, half in halves.items():
        a, b = half.get("A"), half.get("B")
        if a is None or b is None or (b.shape[0], a.shape[1]) != (layer.out_features, layer.in_features):
            where = next(name for name, module in modules.items() if module is layer)
            raise UserError(weights, f"{where} does not fit the model's matrix", "use an adapter of this model")
        like = model.head_weight
        parts[layer] = (a.to(like).contiguous(), (b * scale).to(like).contiguous())
    return Adapter(name, parts)


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
