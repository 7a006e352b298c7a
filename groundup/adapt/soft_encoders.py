"""What makes a soft prompt's table? Nothing, or a small network, through which all its rows move together.

Each is called without arguments and gives [n, E]. Names and shapes are PEFT's; its files keep the finished table alone.
"""

from __future__ import annotations

import torch
from torch import nn


class Table(nn.Module):
    """The numbers themselves."""

    def __init__(self, start_nE: torch.Tensor) -> None:
        super().__init__()
        self.embedding = nn.Embedding.from_pretrained(start_nE.detach().float().clone(), freeze=False)

    def forward(self) -> torch.Tensor:
        return self.embedding.weight


class PromptEncoder(nn.Module):
    """P-tuning's: n vectors through three matrices."""

    def __init__(self, tokens: int, size: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(tokens, size)
        self.mlp_head = nn.Sequential(
            nn.Linear(size, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, size)
        )

    def forward(self) -> torch.Tensor:
        return self.mlp_head(self.embedding.weight)


class PrefixEncoder(nn.Module):
    """Prefix tuning's: n vectors through two matrices, to the keys and values of all layers at once."""

    def __init__(self, tokens: int, size: int, width: int, layers: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(tokens, size)
        self.transform = nn.Sequential(nn.Linear(size, width), nn.Tanh(), nn.Linear(width, layers * 2 * size))

    def forward(self) -> torch.Tensor:
        return self.transform(self.embedding.weight)
