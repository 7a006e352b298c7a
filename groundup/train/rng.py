"""Where does chance stand? The state of every random generator, as tensors (never a pickle)."""

from __future__ import annotations

import random
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from groundup.dist import World


def seed_all(seed: int) -> None:
    """Seed Python, numpy and torch on every device. Ranks call it with different seeds."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def rng_state() -> dict[str, Tensor]:
    """The generators of Python, numpy, torch and, where there is one, the current GPU."""
    _, words, gauss = random.getstate()
    _, keys, place, has_gauss, cached = cast(tuple[str, Any, int, int, float], np.random.get_state())
    state = {
        "python": torch.tensor(words, dtype=torch.int64),
        "numpy": torch.tensor([*keys.tolist(), place, has_gauss], dtype=torch.int64),
        "gauss": torch.tensor([float("nan") if gauss is None else gauss, cached], dtype=torch.float64),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: dict[str, Tensor]) -> None:
    gauss, cached = state["gauss"].tolist()
    random.setstate((3, tuple(state["python"].tolist()), None if gauss != gauss else gauss))
    *keys, place, has_gauss = state["numpy"].tolist()
    np.random.set_state(("MT19937", np.array(keys, np.uint32), place, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def gather_rng(world: World) -> dict[str, Tensor]:
    """Every rank's state, as `name.rank`. A collective call."""
    return {f"{name}.{r}": t for name, mine in rng_state().items() for r, t in enumerate(world.gather(mine))}


def scatter_rng(state: dict[str, Tensor], rank: int) -> None:
    """Take this rank's part of `gather_rng`; a rank that the run did not have keeps its fresh seed."""
    mine = {key.rsplit(".", 1)[0]: t for key, t in state.items() if key.endswith(f".{rank}")}
    if mine:
        set_rng_state(mine)
