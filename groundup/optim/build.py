"""Who moves which weight? Muon the matrices inside the blocks, AdamW the rest; matrices decay, all else does not."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from groundup.config import OptimConfig
from groundup.optim.muon import Muon
from groundup.optim.paged import paged_adamw


class Optimizers:
    """Several optimizers behind one face: one step, one state_dict, one learning-rate dial."""

    def __init__(self, **parts: torch.optim.Optimizer) -> None:
        self.parts = parts
        for group in self.param_groups:
            group["initial_lr"] = group["lr"]

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [group for part in self.parts.values() for group in part.param_groups]

    def set_lr(self, factor: float) -> None:
        """Every group's learning rate becomes `factor` times its peak."""
        for group in self.param_groups:
            group["lr"] = group["initial_lr"] * factor

    def step(self, closure: Callable[[], float] | None = None) -> None:
        for part in self.parts.values():
            part.step(closure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        for part in self.parts.values():
            part.zero_grad(set_to_none=set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """{part: that optimizer's stock state_dict}."""
        return {name: part.state_dict() for name, part in self.parts.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, part in self.parts.items():
            part.load_state_dict(state[name])


def param_groups(model: torch.nn.Module, muon: bool) -> dict[str, list[torch.nn.Parameter]]:
    """Split trainable weights into muon, decay and plain (no decay). A tied weight appears once."""
    groups: dict[str, list[torch.nn.Parameter]] = {"muon": [], "decay": [], "plain": []}
    tables = {id(part.weight) for part in model.modules() if isinstance(part, torch.nn.Embedding)}  # whatever called
    blocks = getattr(model, "blocks", None)
    inside = {id(p) for p in blocks.parameters()} if isinstance(blocks, torch.nn.Module) else set()
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        if p.ndim < 2 or "embed" in name or id(p) in tables:
            kind = "plain"
        else:
            kind = "muon" if muon and p.ndim == 2 and (".layers." in f".{name}" or id(p) in inside) else "decay"
        groups[kind].append(p)
    return groups


def build_optimizer(
    model: torch.nn.Module, config: OptimConfig, rates: Mapping[str, float] | None = None
) -> Optimizers:
    """The optimizer of a recipe, over the trainable weights of `model` (fp32 masters).

    rates: parameter name -> factor on AdamW's learning rate, where it is not 1 (LoRA+).
    """
    groups = param_groups(model, muon=config.name == "muon")
    factors = {id(p): (rates or {}).get(name, 1.0) for name, p in model.named_parameters()}
    adamw = [
        {
            "params": [p for p in groups[kind] if factors[id(p)] == factor],
            "lr": config.lr * factor,
            "weight_decay": decay,
        }
        for kind, decay in (("decay", config.weight_decay), ("plain", 0.0))
        for factor in sorted(set(factors.values()))
    ]
    parts: dict[str, torch.optim.Optimizer] = {}
    if groups["muon"]:
        parts["muon"] = Muon(
            groups["muon"], lr=config.muon_lr, momentum=config.momentum, weight_decay=config.weight_decay
        )
    adamw = [group for group in adamw if group["params"]]
    if adamw and config.paged:
        parts["adamw"] = paged_adamw(adamw, config.lr, config.betas, config.eps)
    elif adamw:
        parts["adamw"] = torch.optim.AdamW(adamw, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)
    return Optimizers(**parts)
