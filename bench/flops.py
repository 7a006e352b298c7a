"""How much arithmetic does a training step need? The formula behind `share_of_peak`.

A weight that multiplies a token costs 2 FLOPs forward and 4 backward: 6 N a token, where N counts every parameter
but the input embedding, which is only looked up (a tied head is counted once, as the head). Causal attention of one
layer multiplies scores and values, 2 x 2 x T x heads x head_dim forward a token, of which the causal half is needed;
with the backward pass that is 6 x T x heads x head_dim a token and layer. Recomputation never counts (PaLM,
arXiv 2204.02311, appendix B, which does not halve).
"""

from __future__ import annotations

from typing import Any


def multiplied_parameters(config: dict[str, Any]) -> int:
    """N of a Llama / Qwen config (Hugging Face's names): matrices and norms of the blocks, last norm, head."""
    width, head_dim = config["hidden_size"], config["head_dim"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    attention = width * head_dim * (2 * heads + 2 * kv_heads)
    ffn = 3 * width * config["intermediate_size"]
    norms = 2 * width + (2 * head_dim if config["model_type"] == "qwen3" else 0)
    return config["num_hidden_layers"] * (attention + ffn + norms) + width + config["vocab_size"] * width


def flops_per_token(config: dict[str, Any], seq_len: int) -> float:
    """FLOPs that one token of a row of `seq_len` needs in forward and backward."""
    attention = 6 * seq_len * config["num_attention_heads"] * config["head_dim"] * config["num_hidden_layers"]
    return 6 * multiplied_parameters(config) + attention
