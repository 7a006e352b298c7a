"""One layer: listen (attention), then think (ffn), each added to the residual stream from its normalised copy."""

from __future__ import annotations

import torch
from torch import nn

from groundup.model.attention import Attention
from groundup.model.config import ModelConfig
from groundup.model.ffn import FeedForward
from groundup.model.norm import RMSNorm
from groundup.model.rows import Rows


class Block(nn.Module):
    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = FeedForward(config)

    def forward(self, x_BTD: torch.Tensor, rows: Rows) -> torch.Tensor:
        if rows.fast is not None:
            return rows.fast(self, x_BTD)
        x_BTD = x_BTD + self.self_attn(self.input_layernorm(x_BTD), rows)
        return x_BTD + self.mlp(self.post_attention_layernorm(x_BTD))
