"""LoRA (arXiv 2106.09685): a frozen matrix and, beside it, a product of two thin ones that moves.

    y = W x + scale B (A dropout(x))        A [r, D], B [E, r]; scale = alpha / r, rsLoRA (2312.03732): alpha / sqrt(r)

B starts at zero, so the adapted model starts as its base. LoRA+ (2402.12354) moves B faster than A. DoRA (2402.09353)
learns the length of each row of the matrix apart from its direction. PiSSA (2404.02948) starts A and B as the principal
part of W and would leave the rest of W as base; here W stays, and what A and B began as is taken off beside them: the
same sum, and the adapter that is saved fits the original base, as a LoRA of twice the rank.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from groundup.adapt.layers import AdaptedLayers, Part, by_layer, check_shape, layer_of
from groundup.adapt.targets import (
    device_of,
    features,
    head_path,
    is_transposed,
    linear_layers,
    matrix,
    select,
    short_names,
)
from groundup.adapt.whole import Whole, is_tied, untie
from groundup.config import AdaptConfig
from groundup.errors import UserError

A, B, LENGTHS = "lora_A.weight", "lora_B.weight", "lora_magnitude_vector"
NAMES = (A, B, LENGTHS)
STARTS = (True, False, "gaussian", "eva", "orthogonal", "mica", "pissa")  # those that leave the base as it is, or PiSSA
# What a LoRA may be told beside all this: PEFT 0.21's keys, as they are where nothing is told.
OTHERS: dict[str, Any] = dict.fromkeys(
    "alora_invocation_tokens arrow_config corda_config eva_config exclude_modules kasa_config layer_replication "
    "layers_pattern layers_to_transform lora_ga_config megatron_config modules_to_save monteclora_config "
    "target_parameters trainable_token_indices use_bdlora velora_config".split()
) | {"bias": "none", "ensure_weight_tying": False, "loftq_config": {}, "lora_bias": False,
     "megatron_core": "megatron.core", "qalora_group_size": 16, "use_qalora": False}  # fmt: skip
# Of these, what changes the result in a way that is not computed here.
REFUSED = (
    "alora_invocation_tokens", "arrow_config", "bias", "kasa_config", "layer_replication", "lora_bias",
    "monteclora_config", "target_parameters", "trainable_token_indices", "use_bdlora", "use_qalora",
)  # fmt: skip


class LoraLinear(Part):
    """a, b: the thin matrices. magnitude: DoRA's lengths [E] or None. start: what PiSSA's a and b began as, or None."""

    start_a: Tensor | None
    start_b: Tensor | None

    def __init__(
        self,
        base: nn.Module,
        a_rD: Tensor,
        b_Er: Tensor,
        scale: float,
        dropout: float = 0.0,
        start: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.base, self.scale = base, scale
        self.a, self.b = nn.Parameter(a_rD), nn.Parameter(b_Er)
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.magnitude: nn.Parameter | None = None
        for name, tensor in zip(("start_a", "start_b"), start or (None, None), strict=True):
            self.register_buffer(name, tensor, persistent=False)

    def thin(self) -> tuple[Tensor, Tensor]:
        """The two matrices whose product is added; PiSSA's with what they began as: [a; a0] and [b, -b0]."""
        if self.start_a is None or self.start_b is None:
            return self.a, self.b
        return torch.cat([self.a, self.start_a]), torch.cat([self.b, -self.start_b], 1)

    def forward(self, x_D: Tensor) -> Tensor:
        y_E = self.base(x_D)
        x_D = self.dropout(x_D)
        if not torch.is_autocast_enabled(x_D.device.type):
            x_D = x_D.to(self.a.dtype)
        a, b = self.thin()
        delta_E = F.linear(F.linear(x_D, a) * self.scale, b)
        if self.magnitude is None:
            return (y_E + delta_E).to(y_E.dtype)
        gain_E = self.gain()
        return (y_E + (gain_E - 1) * self._without_bias(x_D, y_E) + gain_E * delta_E).to(y_E.dtype)

    def gain(self) -> Tensor:
        """DoRA's learnt length over that of W + scale B A, row by row. The latter counts as constant (section 4.3)."""
        assert self.magnitude is not None
        with torch.no_grad():
            a, b = self.thin()
            lengths_E = torch.linalg.norm(matrix(self.base).to(b.dtype) + self.scale * (b @ a), dim=1)
        return self.magnitude / lengths_E

    def _without_bias(self, x_D: Tensor, y_E: Tensor) -> Tensor:
        """W x of the dropped-out x; y holds it already where nothing was dropped."""
        if self.training and isinstance(self.dropout, nn.Dropout):
            return F.linear(x_D, matrix(self.base).to(x_D.dtype))
        bias_E = getattr(self.base, "bias", None)
        return y_E if bias_E is None else y_E - bias_E

    @property
    def weight(self) -> Tensor:
        """As a head is used: without dropout; lengths count as constant here, too."""
        a, b = self.thin()
        whole_ED = matrix(self.base) + self.scale * (b @ a)
        return whole_ED if self.magnitude is None else self.gain()[:, None] * whole_ED

    def saved(self) -> dict[str, Tensor]:
        a, b = self.thin()
        found = {A: a.detach(), B: b.detach()}
        return found if self.magnitude is None else found | {LENGTHS: self.magnitude.detach()}

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        r = len(self.a)
        self.a.copy_(tensors[A][:r])
        self.b.copy_(tensors[B][:, :r])
        if self.start_a is not None and self.start_b is not None:
            self.start_a.copy_(tensors[A][r:])
            self.start_b.copy_(-tensors[B][:, r:])
        if self.magnitude is not None:
            self.magnitude.copy_(tensors[LENGTHS])

    def change(self, weight_ED: Tensor, bias_E: Tensor | None) -> tuple[Tensor, Tensor | None]:
        a, b = self.thin()
        delta_ED = self.scale * (b.float() @ a.float())
        if self.magnitude is None:
            return delta_ED, None
        whole_ED = weight_ED + delta_ED
        gain_E = self.magnitude.float() / torch.linalg.norm(whole_ED, dim=1)
        return gain_E[:, None] * whole_ED - weight_ED, None


class Lora(AdaptedLayers):
    """told: adapter_config.json but for what the parts themselves say (PiSSA's rank, modules trained whole)."""

    peft_type = "LORA"

    def __init__(
        self, model: nn.Module, parts: dict[str, LoraLinear], whole: Whole, told: dict[str, Any], lr_ratio: float = 1.0
    ) -> None:
        super().__init__(model, parts, whole)
        self.told, self.lr_ratio = told, lr_ratio

    def rates(self) -> dict[str, float]:
        if self.lr_ratio == 1.0:
            return {}
        fast = {id(part.b) for part in self.parts.values() if isinstance(part, LoraLinear)}
        return {name: self.lr_ratio for name, p in self.model.named_parameters() if id(p) in fast}

    def settings(self) -> dict[str, Any]:
        told = OTHERS | self.told | super().settings() | {"ensure_weight_tying": self.whole.shared()}
        if not any(isinstance(part, LoraLinear) and part.start_a is not None for part in self.parts.values()):
            return told
        grown = math.sqrt(2) if told["use_rslora"] else 2  # alpha for twice the rank at the same scale
        return told | {
            "init_lora_weights": True,
            "r": 2 * told["r"],
            "lora_alpha": grown * told["lora_alpha"],
            "rank_pattern": {key: 2 * rank for key, rank in (told["rank_pattern"] or {}).items()},
            "alpha_pattern": {key: grown * alpha for key, alpha in (told["alpha_pattern"] or {}).items()},
        }


def lora(model: nn.Module, config: AdaptConfig, seed: int, whole: Whole) -> Lora:
    """A new adapter on a frozen model."""
    if config.dora and config.init == "pissa":
        raise UserError("adapt.init", "pissa and dora each start from the matrix in their own way", "choose one")
    layers = select(model, config.target, without=whole.modules)
    if head_path(model) in layers and is_tied(model):
        untie(model)
    alpha = int(config.alpha) if config.alpha.is_integer() else config.alpha
    scale = alpha / (math.sqrt(config.rank) if config.rslora else config.rank)
    generator = torch.Generator().manual_seed(seed)
    parts: dict[str, LoraLinear] = {}
    for path, layer in layers.items():
        if config.init == "pissa":
            start = principal_part(path, layer, config.rank, scale)
            parts[path] = LoraLinear(layer, start[0].clone(), start[1].clone(), scale, config.dropout, start)
            continue
        (inputs, outputs), device = features(layer), device_of(layer)
        bound = inputs**-0.5  # Kaiming's for sqrt(5), as PEFT and the authors' own code
        a_rD = torch.empty(config.rank, inputs).uniform_(-bound, bound, generator=generator)
        b_Er = torch.zeros(outputs, config.rank, device=device)
        parts[path] = LoraLinear(layer, a_rD.to(device), b_Er, scale, config.dropout)
        if config.dora:
            parts[path].magnitude = nn.Parameter(torch.linalg.norm(matrix(layer).float(), dim=1))
    told: dict[str, Any] = {
        "r": config.rank, "lora_alpha": alpha, "lora_dropout": config.dropout, "use_rslora": config.rslora,
        "use_dora": config.dora, "init_lora_weights": "pissa" if config.init == "pissa" else True,
        "target_modules": short_names(model, layers), "rank_pattern": {}, "alpha_pattern": {},
        "fan_in_fan_out": any(is_transposed(layer) for layer in layers.values()),
    }  # fmt: skip
    return Lora(model, parts, whole, told, config.lr_ratio)


@torch.no_grad()
def principal_part(path: str, layer: nn.Module, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """A [r, D] and B [E, r] with scale B A the best approximation of the layer's matrix of this rank."""
    weight_ED = matrix(layer).float()
    if rank > min(weight_ED.shape):
        why = f"pissa finds at most {min(weight_ED.shape)} directions in {path}, not {rank}"
        raise UserError("adapt.rank", why, "use a lower rank, or adapt.init=default")
    u_Ek, s_k, v_kD = torch.linalg.svd(weight_ED, full_matrices=False)
    root_r = (s_k[:rank] / scale).sqrt()
    return root_r[:, None] * v_kD[:rank], u_Ek[:, :rank] * root_r


@dataclass(frozen=True)
class Thin:
    """What a file says of one layer: A [r, D], B [E, r], DoRA's lengths [E] or None."""

    a: Tensor
    b: Tensor
    scale: float
    lengths: Tensor | None


def read_lora(
    layers: Mapping[str, nn.Module], told: dict[str, Any], tensors: Mapping[str, Tensor]
) -> tuple[dict[str, Thin], dict[str, Tensor]]:
    """What a PEFT folder holds for these layers, and the tensors of modules saved whole. UserError: it does not fit."""
    for key in REFUSED:
        if told.get(key, OTHERS[key]) not in (OTHERS[key], None):
            raise UserError("adapter", f"{key} = {told[key]!r} is not supported", "merge it with PEFT into its model")
    if told.get("init_lora_weights", True) not in STARTS:
        why = f"it goes with a base changed by init_lora_weights = {told['init_lora_weights']!r}"
        fix = "save it with PEFT once more, with path_initial_model_for_weight_conversion"
        raise UserError("adapter", why, fix)
    found, others = by_layer(tensors, NAMES)
    strange = next((name for name in others if ".lora_" in name), None)
    if strange is not None:
        raise UserError("adapter", f"{strange} is not supported", "merge it with PEFT into its model")
    thin: dict[str, Thin] = {}
    for path, parts in found.items():
        inputs, outputs = features(layer_of(layers, path))
        needed = (A, B, LENGTHS) if told.get("use_dora") else (A, B)
        lacking = next((name for name in needed if name not in parts), None)
        if lacking:
            raise UserError("adapter", f"lacks {path}.{lacking}", "save or fetch it again")
        rank = len(parts[A])
        check_shape(f"{path}.{A}", parts[A], (rank, inputs))
        check_shape(f"{path}.{B}", parts[B], (outputs, rank))
        alpha = _of(told.get("alpha_pattern"), path, told.get("lora_alpha", 8))
        scale = alpha / (math.sqrt(rank) if told.get("use_rslora") else rank)
        thin[path] = Thin(parts[A], parts[B], scale, parts.get(LENGTHS))
    return thin, others


def load_lora(model: nn.Module, told: dict[str, Any], tensors: Mapping[str, Tensor]) -> Lora:
    """The adapter of a PEFT folder on a frozen model, ready to be used, trained on or merged."""
    if is_tied(model) and any(f"{head_path(model)}.lora_" in name for name in tensors):
        untie(model)  # an adapter of the head changes the head alone
    layers = linear_layers(model)
    thin, others = read_lora(layers, told, tensors)
    others = _without_base(layers, others)
    parts: dict[str, LoraLinear] = {}
    for path, one in thin.items():
        layer, device = layers[path], device_of(layers[path])
        a, b = (tensor.to(device, torch.float32, copy=True) for tensor in (one.a, one.b))
        start = None
        if told.get("init_lora_weights") == "pissa":  # as PEFT does: the base becomes what PiSSA left of it
            start = principal_part(path, layer, len(a), one.scale)
        parts[path] = LoraLinear(layer, a, b, one.scale, told.get("lora_dropout", 0.0), start)
        if one.lengths is not None:
            parts[path].magnitude = nn.Parameter(one.lengths.to(device, torch.float32, copy=True))
    defaults = {"r": 8, "lora_alpha": 8, "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}}
    return Lora(model, parts, Whole.read(model, others), defaults | told)


def _without_base(layers: Mapping[str, nn.Module], others: dict[str, Tensor]) -> dict[str, Tensor]:
    """Less the base's own head, of which PEFT writes a copy beside an adapter on it. UserError: it is another's."""
    kept = {name: tensor for name, tensor in others.items() if ".base_layer." not in name}
    for name in others.keys() - kept.keys():
        own = matrix(layer_of(layers, name.partition(".base_layer.")[0]))
        if own.shape != others[name].shape or not torch.allclose(own.float(), others[name].to(own).float(), 1e-2, 1e-3):
            raise UserError("adapter", f"{name} is not this model's", "use the base that it was trained on")
    return kept


def _of(patterns: Mapping[str, Any] | None, path: str, default: Any) -> Any:
    """What the first pattern that fits a layer's name says, as PEFT reads them."""
    return next((value for key, value in (patterns or {}).items() if re.match(rf"(.*\.)?({key})$", path)), default)
