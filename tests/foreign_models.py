"""Tiny random models of architectures that transformers computes, as folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM
from transformers.utils import logging

logging.disable_progress_bar()

VOCAB = 97
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 256, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
GROUPED = {**SIZES, "num_key_value_heads": 2}
GPT2 = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256, "bos_token_id": 1}
EXPERTS = {"num_experts_per_tok": 2}
DROP = {"dropout": 0.0, "attention_dropout": 0.0}
LAYERS = ["sliding_attention", "full_attention", "sliding_attention"]

# name -> (transformers' config class, what it is told)
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "opt": ("OPTConfig", {**SIZES, **DROP, "ffn_dim": 48, "word_embed_proj_dim": 32}),
    "opt-350m": (  # norms behind, a narrower embedding
        "OPTConfig",
        {**SIZES, **DROP, "ffn_dim": 48, "word_embed_proj_dim": 16, "do_layer_norm_before": False},
    ),
    "gpt2": ("GPT2Config", {**GPT2, "eos_token_id": 2, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}),
    "gpt_neox": ("GPTNeoXConfig", {**SIZES, "hidden_dropout": 0.0, "attention_dropout": 0.0}),
    "gptj": ("GPTJConfig", {**GPT2, "rotary_dim": 4, "eos_token_id": 2}),  # no attention interface, a head with a bias
    "gemma": ("GemmaConfig", {**GROUPED, "head_dim": 16}),
    "gemma3": (  # scores scaled by another number than 1 / sqrt(d), windows in two of three layers
        "Gemma3TextConfig",
        {
            **GROUPED, "num_hidden_layers": 3, "head_dim": 16, "sliding_window": 6, "layer_types": LAYERS,
            "query_pre_attn_scalar": 24,
        },
    ),
    "phi": ("PhiConfig", {**SIZES, "resid_pdrop": 0.0}),  # a head with a bias
    "qwen3_moe": (
        "Qwen3MoeConfig",
        {**GROUPED, **EXPERTS, "head_dim": 16, "num_experts": 4, "moe_intermediate_size": 24},
    ),
    "mixtral": ("MixtralConfig", {**GROUPED, **EXPERTS, "num_local_experts": 4}),
    "mistral": ("MistralConfig", {**GROUPED, "sliding_window": 6}),
    "qwen2": ("Qwen2Config", {**GROUPED, "use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}),
    "cohere": ("CohereConfig", {**GROUPED, "logit_scale": 0.25}),
    "deepseek_v3": (  # values narrower than keys
        "DeepseekV3Config",
        {
            **SIZES, **EXPERTS, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "q_lora_rank": 16,
            "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
            "moe_intermediate_size": 16, "first_k_dense_replace": 1,
        },
    ),
    "bloom": (  # distances instead of positions
        "BloomConfig",
        {
            "vocab_size": VOCAB, "hidden_size": 32, "n_layer": 2, "n_head": 4, "bos_token_id": 1, "eos_token_id": 2,
            "pad_token_id": 0, "hidden_dropout": 0.0, "attention_dropout": 0.0,
        },
    ),
    "mamba": ("MambaConfig", {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "pad_token_id": 0}),
}  # fmt: skip


def make_stock(name: str, **changes: Any) -> Any:
    """transformers' model with random weights, norms and biases too, whose logits lie far apart."""
    kind, told = CONFIGS[name]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(getattr(transformers, kind)(**{**told, **changes})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.2)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def save_stock(name: str, folder: Path, **changes: Any) -> Any:
    """The model, and its folder."""
    model = make_stock(name, **changes)
    model.save_pretrained(folder)
    return model
