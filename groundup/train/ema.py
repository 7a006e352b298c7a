"""What is the average of the weights on the way? It is smoother than the last ones, and often better."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class EMA:
    """Exponential moving average, in fp32, of a model's weights that move. A decay of 0 keeps nothing, does nothing.

    Early on the decay is min(decay, (1 + n) / (10 + n)) after n steps, so that the start is soon forgotten.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        living = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.living: list[Tensor] = list(living.values())
        self.weights: dict[str, Tensor] = {}
        if decay:
            self.weights = {name: p.detach().clone() for name, p in living.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after optimizer step number `step`, counted from 1."""
        if self.decay:
            decay = min(self.decay, (1 + step) / (10 + step))
            torch._foreach_lerp_(list(self.weights.values()), self.living, 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the model holds the average; after it, what it held before, bit for bit."""
        if not self.decay:
            yield
            return
        with torch.no_grad():
            kept = [p.detach().clone() for p in self.living]
            torch._foreach_copy_(self.living, list(self.weights.values()))
            try:
                yield
            finally:
                torch._foreach_copy_(self.living, kept)

    @torch.no_grad()
    def load(self, weights: dict[str, Tensor]) -> None:
        for name, mine in self.weights.items():
            mine.copy_(weights[name])
