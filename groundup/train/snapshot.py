"""What is in a checkpoint? All that decides the next step: what moves, optimizer, averages, random state, figures."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from groundup.dist import World
from groundup.errors import UserError
from groundup.optim import Optimizers
from groundup.train.checkpoint import Files
from groundup.train.ema import EMA
from groundup.train.rng import gather_rng, scatter_rng


def pack(
    model: nn.Module, optimizer: Optimizers, ema: EMA, world: World, stage: dict[str, Tensor] | None = None
) -> Files:
    """The tensors of a checkpoint by file. A collective call: every rank's random and stage state are gathered."""
    files: Files = {"model": moving(model), "optimizer": optimizer_tensors(optimizer)}
    if ema.weights:
        files["ema"] = ema.weights
    files["rng"] = gather_rng(world)
    states = world.gather_objects(stage or {})
    if any(states):
        files["stage"] = {f"{name}.{rank}": t for rank, state in enumerate(states) for name, t in state.items()}
    return files


def stage_states(files: Files) -> list[dict[str, Tensor]]:
    """Every rank's stage state, in the order of the ranks; empty where the stage had none."""
    states: dict[int, dict[str, Tensor]] = {}
    for key, tensor in files.get("stage", {}).items():
        name, rank = key.rsplit(".", 1)
        states.setdefault(int(rank), {})[name] = tensor
    return [states[rank] for rank in sorted(states)]


def moving(model: nn.Module) -> dict[str, Tensor]:
    """What training changes: a frozen base is read again from its own folder."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


@torch.no_grad()
def unpack(files: Files, model: nn.Module, optimizer: Optimizers, ema: EMA, world: World) -> None:
    """Put everything back where `pack` took it from."""
    load_weights(files["model"], model)
    load_optimizer(optimizer, files["optimizer"])
    if ema.weights:
        ema.load(files["ema"])
    scatter_rng(files["rng"], world.rank)


@torch.no_grad()
def load_weights(weights: dict[str, Tensor], model: nn.Module) -> None:
    mine = moving(model)
    if mine.keys() != weights.keys():
        odd = sorted(mine.keys() ^ weights.keys())[0]
        raise UserError("checkpoint", f"its model is another one ({odd})", "choose another output")
    for name, p in mine.items():
        p.copy_(weights[name])


def optimizer_tensors(optimizer: Optimizers) -> dict[str, Tensor]:
    """`part.index.name` -> tensor. The rest of a state_dict (rates, betas) comes from the recipe again."""
    return {
        f"{part}.{index}.{name}": tensor
        for part, state in optimizer.state_dict().items()
        for index, tensors in state["state"].items()
        for name, tensor in tensors.items()
    }


def load_optimizer(optimizer: Optimizers, tensors: dict[str, Tensor]) -> None:
    whole: dict[str, Any] = optimizer.state_dict()
    for key, tensor in tensors.items():
        part, index, name = key.split(".")
        whole[part]["state"].setdefault(int(index), {})[name] = tensor
    optimizer.load_state_dict(whole)
