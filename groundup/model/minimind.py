"""Which stock architecture is a MiniMind model? Its weights have Hugging Face's names: these and shapes nearly say it.

MiniMind 3           normalised queries and keys                              Qwen3, number for number
MiniMind 3, experts  the same, a router and experts, no shared ones           Qwen3-MoE
MiniMind 2           no such norms                                            Llama
MiniMind 2, experts  routed and shared experts, added without a gate          none that computes the same
MiniMind 1           Meta's names, rotated pairs side by side                 none, by these names
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from groundup.errors import UserError

Shapes = Mapping[str, tuple[int, ...]]
VOCABULARY = 6400
HEADS = 8  # in every size of MiniMind 2; of MiniMind 3 the norms say it
LAYER = "model.layers.0."
FIX = "convert it with MiniMind's own scripts/convert_model.py"


def is_minimind(shapes: Shapes) -> bool:
    """Whether these are MiniMind's weights: its vocabulary, under Hugging Face's names or its first version's."""
    embedding = shapes.get("model.embed_tokens.weight") or shapes.get("tok_embeddings.weight")
    return embedding is not None and embedding[0] == VOCABULARY


def stock_config(shapes: Shapes, told: Mapping[str, Any], where: Path) -> tuple[dict[str, Any], list[str]]:
    """The config.json under which a stock architecture computes what MiniMind does, and what had to be assumed.

    told: MiniMind's own config.json, where there is one. UserError: no stock architecture does, or sizes do not fit.
    """
    _refuse(shapes, told, where)
    normed = f"{LAYER}self_attn.q_norm.weight" in shapes
    experts = len({name.split(".")[5] for name in shapes if name.startswith(f"{LAYER}mlp.experts.")})
    vocab_size, width = shapes["model.embed_tokens.weight"]
    queries, keys = (shapes[f"{LAYER}self_attn.{name}_proj.weight"][0] for name in ("q", "k"))
    heads = told.get("num_attention_heads") or HEADS
    head_dim = shapes[f"{LAYER}self_attn.q_norm.weight"][0] if normed else queries // heads
    if queries % head_dim or keys % head_dim:
        why = f"{queries} queries and {keys} keys make no whole heads of {head_dim}"
        raise UserError(where, why, "give --config DIR with the model's config.json")
    inner = shapes[f"{LAYER}mlp.experts.0.gate_proj.weight" if experts else f"{LAYER}mlp.gate_proj.weight"][0]
    assumed = {
        "rope_theta": 1e6,
        "rms_norm_eps": 1e-6 if normed else 1e-5,
        "max_position_embeddings": 32768,
        **({} if normed else {"num_attention_heads": HEADS}),
        **({"num_experts_per_tok": 1, "norm_topk_prob": True} if experts else {}),
    }
    config: dict[str, Any] = {
        "architectures": ["Qwen3MoeForCausalLM" if experts else "Qwen3ForCausalLM" if normed else "LlamaForCausalLM"],
        "model_type": "qwen3_moe" if experts else "qwen3" if normed else "llama",
        "vocab_size": vocab_size,
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": 1 + max(int(name.split(".")[2]) for name in shapes if name.startswith("model.layers.")),
        "num_attention_heads": queries // head_dim,
        "num_key_value_heads": keys // head_dim,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "attention_bias": False,
        "tie_word_embeddings": bool(told.get("tie_word_embeddings", True)),
        "bos_token_id": told.get("bos_token_id", 1),
        "eos_token_id": told.get("eos_token_id", 2),
        "pad_token_id": 0,
    }
    config |= {name: told.get(name, value) for name, value in assumed.items() if name != "num_attention_heads"}
    if experts:
        config |= {
            "num_experts": experts,
            "moe_intermediate_size": inner,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        }
    if not normed:
        config["mlp_bias"] = False
    guesses = [f"{name} {value}" for name, value in assumed.items() if name not in told]
    notes = (
        [f"taken to be MiniMind's own: {', '.join(guesses)}; if trained otherwise, give --config"] if guesses else []
    )
    return config, notes


def _refuse(shapes: Shapes, told: Mapping[str, Any], where: Path) -> None:
    """What would load and then compute something else than MiniMind does."""
    if any(".shared_experts." in name for name in shapes):
        raise UserError(where, "is a MiniMind with shared experts: no stock architecture computes the same", FIX)
    if f"{LAYER}self_attn.q_proj.weight" not in shapes:
        raise UserError(where, "has the names of MiniMind's first version, whose rotated pairs lie otherwise", FIX)
    if told.get("inference_rope_scaling"):
        fix = "set it to false in its config.json: it stretches an untrained range when answering"
        raise UserError(where, "has inference_rope_scaling", fix)
    if told.get("hidden_act", "silu") != "silu":
        raise UserError(where, f"has hidden_act {told['hidden_act']!r}", FIX)
