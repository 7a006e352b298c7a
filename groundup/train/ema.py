"""What is the average of the weights on the way? It is smoother than the last ones, and often better."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class EMA:
    """Exponential moving average of a model's weights in fp32. A decay of 0 keeps nothing and does nothing.

    Early on the decay is min(decay, (1 + n) / (10 + n)) after n steps, so that the start is soon forgotten.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay, self.model = decay, model
        self.weights: dict[str, Tensor] = {}
        if decay:
            self.weights = {name: p.detach().clone() for name, p in model.named_parameters()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after optimizer step number `step`, counted from 1."""
        if self.decay:
            decay = min(self.decay, (1 + step) / (10 + step))
            torch._foreach_lerp_(list(self.weights.values()), list(self.model.parameters()), 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the model holds the average; after it, what it held before, bit for bit."""
        if not self.decay:
            yield
            return
        living: list[Tensor] = list(self.model.parameters())
        with torch.no_grad():
            kept = [p.detach().clone() for p in living]
            torch._foreach_copy_(living, list(self.weights.values()))
            try:
                yield
            finally:
                torch._foreach_copy_(living, kept)

    @torch.no_grad()
    def load(self, weights: dict[str, Tensor]) -> None:
        for name, mine in self.weights.items():
            mine.copy_(weights[name])
