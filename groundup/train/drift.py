"""How far did the policy go from where its answers were sampled, and how far is the engine from the trainer?"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from groundup.dist import World

NOTED = ("low", "high", "drift", "tokens", "kl", "count")


class Drift:
    """What no sum over a count can say. noted: extremes of ratios, and sums over tokens, since they were read; kl and
    count since those were."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.noted = {"low": torch.tensor(math.inf), "high": torch.tensor(-math.inf)}
        self.noted |= {name: torch.tensor(0.0) for name in NOTED[2:]}

    def note(self, ratio_M: Tensor, difference_M: Tensor, kl: Tensor, count: Tensor) -> None:
        """Of a micro-batch's tokens: ratios, differences of the engine's and the trainer's probabilities. kl: their
        sum in the mean of `count`. Nothing here waits for a GPU."""
        noted = self.noted
        noted["kl"] = noted["kl"].to(count.device) + kl
        noted["count"] = noted["count"].to(count.device) + count
        if ratio_M.numel():
            noted["low"] = torch.minimum(noted["low"].to(ratio_M.device), ratio_M.min())
            noted["high"] = torch.maximum(noted["high"].to(ratio_M.device), ratio_M.max())
            noted["drift"] = noted["drift"].to(ratio_M.device) + difference_M.sum()
            noted["tokens"] = noted["tokens"].to(ratio_M.device) + difference_M.numel()

    def read(self) -> tuple[dict[str, float], float]:
        """(extremes of ratios, the mean difference of probabilities) over all ranks, and begin anew. A collective
        call."""
        every = self.world.gather(torch.stack([self.noted[name].cpu() for name in NOTED]))
        low, high = min(float(one[0]) for one in every), max(float(one[1]) for one in every)
        drift, tokens = (sum(float(one[i]) for one in every) for i in (2, 3))
        self.noted |= {"low": torch.tensor(math.inf), "high": torch.tensor(-math.inf)}
        self.noted |= {"drift": torch.tensor(0.0), "tokens": torch.tensor(0.0)}
        return {"ratio_min": low, "ratio_max": high} if low <= high else {}, drift / tokens if tokens else 0.0

    def read_kl(self) -> float:
        """Nats a token since it was read last, over all ranks. A collective call."""
        kl, count = self.world.sum([float(self.noted["kl"]), float(self.noted["count"])])
        self.noted |= {"kl": torch.tensor(0.0), "count": torch.tensor(0.0)}
        return kl / max(count, 1.0)
