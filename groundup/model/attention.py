"""What does a token hear from those before it? Grouped-query attention with rotary positions.

H query heads share K key/value heads (GQA, arXiv 2305.13245), which makes the cache H/K times smaller. Qwen3
normalises each head's query and key, so that no logit can run away (arXiv 2010.04245).
"""

from __future__ import annotations

import torch
from torch import nn

from groundup.model.config import ModelConfig
from groundup.model.norm import RMSNorm
from groundup.model.rows import Rows
from groundup.ops.attention import attention
from groundup.ops.rope import apply_rope


class Attention(nn.Module):
    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        width, q_width = config.hidden_size, config.num_attention_heads * config.head_dim
        kv_width = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(width, q_width, bias=config.qkv_bias)
        self.k_proj = nn.Linear(width, kv_width, bias=config.qkv_bias)
        self.v_proj = nn.Linear(width, kv_width, bias=config.qkv_bias)
        self.o_proj = nn.Linear(q_width, width, bias=config.attention_bias)
        if config.qk_norm:
            self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
            self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
        self.qk_norm = config.qk_norm

    def forward(self, x_BTD: torch.Tensor, rows: Rows) -> torch.Tensor:
        heads = (*x_BTD.shape[:2], -1, self.head_dim)
        q_BTHd, k_BTKd, v_BTKd = (p(x_BTD).view(heads) for p in (self.q_proj, self.k_proj, self.v_proj))
        if self.qk_norm:
            q_BTHd, k_BTKd = self.q_norm(q_BTHd), self.k_norm(k_BTKd)
        q_BTHd, k_BTKd = apply_rope(q_BTHd, *rows.rope), apply_rope(k_BTKd, *rows.rope)
        if rows.cache is not None:
            out_BTHd = rows.cache.attend(self.layer, q_BTHd, k_BTKd, v_BTKd, rows.mask)
        else:
            out_BTHd = attention(q_BTHd, k_BTKd, v_BTKd, rows.mask)
        return self.o_proj(out_BTHd.reshape(*x_BTD.shape[:2], -1))
