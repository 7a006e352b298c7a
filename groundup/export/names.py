"""What is a tensor called, and how do its rows lie, on either side?

llama.cpp rotates neighbouring rows of a head for `llama` (as Meta's code did) and rows half a head apart for the Qwens
(as Hugging Face does for all). So for `llama` the rows of q and k are interleaved on the way out.
"""

from __future__ import annotations

import re

import numpy as np

from groundup.model.config import ModelConfig

OUTSIDE = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
ROPE_FACTORS = "rope_freqs.weight"  # computed from config.json, so it has no name there
_PARTS = re.compile(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)")


def gguf_name(name: str) -> str:
    """`model.layers.3.self_attn.q_proj.weight` -> `blk.3.attn_q.weight`. KeyError for a name that is not ours."""
    parts = _PARTS.fullmatch(name)
    return f"blk.{parts[1]}.{LAYER[parts[2]]}.{parts[3]}" if parts else OUTSIDE[name]


def interleave(name: str, array: np.ndarray, config: ModelConfig) -> np.ndarray:
    """The tensor called `name` (Hugging Face's) with its rows as llama.cpp wants them."""
    heads = _rotated_heads(name, config)
    if not heads:
        return array
    return array.reshape(heads, 2, -1, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)


def undo_interleave(name: str, array: np.ndarray, config: ModelConfig) -> np.ndarray:
    """The inverse of `interleave`."""
    heads = _rotated_heads(name, config)
    if not heads:
        return array
    return array.reshape(heads, -1, 2, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)


def _rotated_heads(name: str, config: ModelConfig) -> int:
    """How many heads' rows are to be moved in this tensor; 0: none."""
    if config.model_type != "llama":
        return 0
    if ".q_proj." in name:
        return config.num_attention_heads
    return config.num_key_value_heads if ".k_proj." in name else 0
