"""What does a token think on its own? The SwiGLU feed-forward layer: down(silu(gate(x)) * up(x))."""

from __future__ import annotations

import torch
from torch import nn

from groundup.model.config import ModelConfig
from groundup.ops.swiglu import swiglu


class FeedForward(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = nn.Linear(width, inner, bias=bias)
        self.up_proj = nn.Linear(width, inner, bias=bias)
        self.down_proj = nn.Linear(inner, width, bias=bias)

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        return self.down_proj(swiglu(self.gate_proj(x_BTD), self.up_proj(x_BTD)))
