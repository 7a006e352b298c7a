"""(IA)^3 (arXiv 2205.05638): keys, values and what the feed-forward's last matrix reads, each scaled by a number.

All start at 1. They are few, and merged they cost nothing: they scale rows, or columns, of the frozen matrix.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from groundup.adapt.layers import AdaptedLayers, Part, by_layer, check_shape, layer_of
from groundup.adapt.targets import device_of, features, fits, is_transposed, linear_layers, select, short_names
from groundup.adapt.whole import Whole
from groundup.config import AdaptConfig
from groundup.errors import UserError

NAME = "ia3_l"
# How architectures call keys and values (or queries, keys and values in one), and the last matrix of the feed-forward.
KEYS_VALUES = r"[kv]_proj|key|value|key_proj|value_proj|c_attn|query_key_value|qkv_proj|Wqkv"
FEEDFORWARD = r"down_proj|mlp\.c_proj|fc2|fc_out|dense_4h_to_h|output\.dense|w2"


class Ia3Linear(Part):
    """scale: [E], or [D] where the inputs are scaled."""

    def __init__(self, base: nn.Module, feedforward: bool) -> None:
        super().__init__()
        self.base, self.feedforward = base, feedforward
        inputs, outputs = features(base)
        self.scale = nn.Parameter(torch.ones(inputs if feedforward else outputs, device=device_of(base)))

    def forward(self, x_D: Tensor) -> Tensor:
        if self.feedforward:
            return self.base((x_D * self.scale).to(x_D.dtype))
        y_E = self.base(x_D)
        return (y_E * self.scale).to(y_E.dtype)

    def saved(self) -> dict[str, Tensor]:
        scale = self.scale.detach()
        return {NAME: scale[None] if self.feedforward else scale[:, None]}

    def change(self, weight_ED: Tensor, bias_E: Tensor | None) -> tuple[Tensor, Tensor | None]:
        more = self.scale.float() - 1
        if self.feedforward:
            return weight_ED * more, None
        return weight_ED * more[:, None], None if bias_E is None else bias_E * more


class Ia3(AdaptedLayers):
    peft_type = "IA3"

    def __init__(self, model: nn.Module, parts: dict[str, Ia3Linear], whole: Whole) -> None:
        names = short_names(model, parts)
        super().__init__(model, parts, whole)
        feedforward = {path for path, part in parts.items() if part.feedforward}
        scaled_in = [name for name in names if any(path.endswith(name) for path in feedforward)]
        if any(path.endswith(tuple(scaled_in)) for path in parts.keys() - feedforward):
            names, scaled_in = sorted(parts), sorted(feedforward)  # one name, both ways: gpt2's c_proj
        self.told = {
            "target_modules": names,
            "feedforward_modules": scaled_in,
            "fan_in_fan_out": any(is_transposed(part.base) for part in parts.values()),
            "exclude_modules": None,
            "init_ia3_weights": True,
        }

    def settings(self) -> dict[str, Any]:
        return self.told | super().settings()


def ia3(model: nn.Module, config: AdaptConfig, whole: Whole) -> Ia3:
    """A new adapter on a frozen model. Target "all": the places of the paper, by the names that architectures have."""
    if config.target == ["all"]:
        found = linear_layers(model)
        layers = {p: layer for p, layer in found.items() if fits(p, KEYS_VALUES) or fits(p, FEEDFORWARD)}
        if not layers:
            names = ", ".join(dict.fromkeys(path.rpartition(".")[2] for path in found))
            why = "which layers of this model make keys and values is not known"
            raise UserError("adapt.target", why, f"name them; there are: {names}")
    else:
        layers = select(model, config.target)
    parts = {p: Ia3Linear(layer, fits(p, FEEDFORWARD)) for p, layer in layers.items() if p not in whole.modules}
    return Ia3(model, parts, whole)


def load_ia3(model: nn.Module, told: dict[str, Any], tensors: Mapping[str, Tensor]) -> Ia3:
    """The adapter of a PEFT folder on a frozen model. Inputs are scaled where the vector lies as a row, [1, D]."""
    layers = linear_layers(model)
    found, others = by_layer(tensors, (NAME,))
    parts: dict[str, Ia3Linear] = {}
    for path, saved in found.items():
        layer = layer_of(layers, path)
        inputs, outputs = features(layer)
        feedforward = saved[NAME].shape[0] == 1
        check_shape(f"{path}.{NAME}", saved[NAME], (1, inputs) if feedforward else (outputs, 1))
        parts[path] = Ia3Linear(layer, feedforward)
        parts[path].load(saved)
    return Ia3(model, parts, Whole.read(model, others))
