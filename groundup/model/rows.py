"""How do the tokens of this batch lie? Worked out once a batch, read by every layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from groundup.model.cache import Cache


@dataclass(frozen=True)
class Rows:
    """What a block needs to know beside its input.

    rope: cos and sin, [B or 1, T, d / 2]. mask: who sees whom as ops/attention.py takes it; None is plain causal.
    fast: computes (block, x) in the block's place, where fast.py can.
    """

    rope: tuple[torch.Tensor, torch.Tensor]
    mask: Any = None
    cache: Cache | None = None
    fast: Callable[..., torch.Tensor] | None = None
