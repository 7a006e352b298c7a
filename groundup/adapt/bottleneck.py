"""Bottleneck adapters (Houlsby et al. 2019, arXiv 1902.00751): a small network behind attention and feed-forward.

    y = W x;  y + up(gelu(down(y)))         down [width, E], up [E, width]

They stand where a sub-layer's output is ready and not yet added to the residual stream. `up` starts at zero, so the
model starts as its base. Not being linear they cannot be merged, and cost a little at every answer.

PEFT has no such adapter. The files are its own in all but the type: peft_type "BOTTLENECK" with bottleneck_size, and
`<layer>.bottleneck_down.weight`, `.bias`, `.bottleneck_up.weight`, `.bias`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from groundup.adapt.layers import AdaptedLayers, Part, by_layer, check_shape, layer_of
from groundup.adapt.targets import device_of, features, fits, linear_layers, select, short_names
from groundup.adapt.whole import Whole
from groundup.config import AdaptConfig
from groundup.errors import UserError

NAMES = tuple(f"bottleneck_{half}.{kind}" for half in ("down", "up") for kind in ("weight", "bias"))
# How architectures call the last matrix of attention and of the feed-forward.
OUTPUTS = r"o_proj|out_proj|c_proj|(?:self_)?att(?:n|ention)\.dense|down_proj|fc2|fc_out|dense_4h_to_h|w2"
WIDTH = 64


class BottleneckLinear(Part):
    def __init__(self, base: nn.Module, width: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.base = base
        outputs, device = features(base)[1], device_of(base)
        self.bottleneck_down = nn.Linear(outputs, width, device="meta").to_empty(device=device)
        self.bottleneck_up = nn.Linear(width, outputs, device="meta").to_empty(device=device)
        self.dropout = nn.Dropout(dropout)

    @torch.no_grad()
    def start(self, generator: torch.Generator) -> None:
        """nn.Linear's own start below, zeros above."""
        bound = self.bottleneck_down.in_features**-0.5
        for parameter in self.bottleneck_down.parameters():
            parameter.copy_(torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator))
        for parameter in self.bottleneck_up.parameters():
            parameter.zero_()

    def forward(self, x_D: Tensor) -> Tensor:
        y_E = self.base(x_D)
        h_E = y_E if torch.is_autocast_enabled(y_E.device.type) else y_E.to(self.bottleneck_down.weight.dtype)
        change_E = self.bottleneck_up(self.dropout(F.gelu(self.bottleneck_down(h_E))))
        return (y_E + change_E).to(y_E.dtype)

    def saved(self) -> dict[str, Tensor]:
        return {name: self.get_parameter(name).detach() for name in NAMES}

    def change(self, weight_ED: Tensor, bias_E: Tensor | None) -> tuple[Tensor, Tensor | None]:
        raise UserError(
            "adapter", "a bottleneck is not linear, so no matrix can take it in",
            "use it beside its base, or train a LoRA (adapt.method=lora), which merges",
        )  # fmt: skip


class Bottleneck(AdaptedLayers):
    peft_type = "BOTTLENECK"
    mergeable = False

    def __init__(
        self, model: nn.Module, parts: dict[str, BottleneckLinear], whole: Whole, width: int, dropout: float
    ) -> None:
        names = short_names(model, parts)
        super().__init__(model, parts, whole)
        self.told = {
            "target_modules": names, "bottleneck_size": width, "non_linearity": "gelu", "dropout": dropout,
        }  # fmt: skip

    def settings(self) -> dict[str, Any]:
        return self.told | super().settings()


def bottleneck(model: nn.Module, config: AdaptConfig, seed: int, whole: Whole) -> Bottleneck:
    """A new adapter on a frozen model. Target "all": behind every attention and every feed-forward."""
    if config.target == ["all"]:
        found = linear_layers(model)
        layers = {path: layer for path, layer in found.items() if fits(path, OUTPUTS)}
        if not layers:
            names = ", ".join(dict.fromkeys(path.rpartition(".")[2] for path in found))
            why = "which layers of this model end attention and feed-forward is not known"
            raise UserError("adapt.target", why, f"name them; there are: {names}")
    else:
        layers = select(model, config.target)
    width, generator = config.width or WIDTH, torch.Generator().manual_seed(seed)
    parts: dict[str, BottleneckLinear] = {}
    for path, layer in layers.items():
        if path not in whole.modules:
            parts[path] = BottleneckLinear(layer, width, config.dropout)
            parts[path].start(generator)
    return Bottleneck(model, parts, whole, width, config.dropout)


def load_bottleneck(model: nn.Module, told: dict[str, Any], tensors: Mapping[str, Tensor]) -> Bottleneck:
    """The adapter of a folder on a frozen model."""
    if told.get("non_linearity", "gelu") != "gelu":
        raise UserError("adapter", f"non_linearity {told['non_linearity']!r} is not supported", "supported: gelu")
    layers = linear_layers(model)
    found, others = by_layer(tensors, NAMES)
    width, dropout = 0, float(told.get("dropout", 0.0))
    parts: dict[str, BottleneckLinear] = {}
    for path, saved in found.items():
        layer = layer_of(layers, path)
        lacking = next((name for name in NAMES if name not in saved), None)
        if lacking:
            raise UserError("adapter", f"lacks {path}.{lacking}", "save or fetch it again")
        width = len(saved[NAMES[0]])
        part = BottleneckLinear(layer, width, dropout)
        for name, own in part.saved().items():
            check_shape(f"{path}.{name}", saved[name], tuple(own.shape))
        part.load(saved)
        parts[path] = part
    return Bottleneck(model, parts, Whole.read(model, others), width, dropout)
