"""config.json as GGUF fields, and back."""

from __future__ import annotations

import dataclasses
from typing import Any

from groundup.errors import UserError
from groundup.export.names import ROPE_FACTORS
from groundup.export.reader import GgufFile, shortest
from groundup.export.rope import read_rope_scaling, rope_fields
from groundup.model.config import ARCHITECTURES, ModelConfig


def header_fields(config: ModelConfig) -> dict[str, Any]:
    """The fields of the architecture, without its name before them. UserError for a model that llama.cpp has not."""
    if config.model_type == "qwen3" and config.attention_bias:
        raise UserError("attention_bias", "llama.cpp's qwen3 has no biases", "export to hf instead")
    if config.model_type == "qwen2" and config.num_attention_heads * config.head_dim != config.hidden_size:
        why = f"{config.num_attention_heads} heads of {config.head_dim} are not the width {config.hidden_size}"
        raise UserError("head_dim", f"{why}, as llama.cpp's qwen2 has it", "export to hf instead")
    return {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "vocab_size": config.vocab_size,
        **rope_fields(config),
    }


def read_config(file: GgufFile) -> ModelConfig:
    """The config of a GGUF. UserError for an architecture, or a variant of one, that we would compute wrongly."""
    if file.architecture not in ARCHITECTURES:
        why = f"architecture {file.architecture!r} is not one we compute"
        raise UserError(file.path, why, f"supported: {', '.join(ARCHITECTURES)}")
    _refuse_variants(file)
    heads = file.need("attention.head_count")
    width = file.need("embedding_length")
    key_length = file.own("attention.key_length") or file.own("rope.dimension_count") or width // heads
    config = ModelConfig(
        model_type=file.architecture,
        vocab_size=_rows(file, "token_embd.weight"),
        hidden_size=width,
        intermediate_size=file.need("feed_forward_length"),
        num_hidden_layers=file.need("block_count"),
        num_attention_heads=heads,
        num_key_value_heads=file.need("attention.head_count_kv") if file.own("attention.head_count_kv") else heads,
        head_dim=key_length,
        max_position_embeddings=file.need("context_length"),
        rms_norm_eps=shortest(file.own("attention.layer_norm_rms_epsilon", 1e-5)),
        rope_theta=shortest(file.own("rope.freq_base", 10_000.0)),
        tie_word_embeddings="output.weight" not in file.tensors,
        attention_bias=file.architecture != "qwen2" and "blk.0.attn_q.bias" in file.tensors,
        mlp_bias="blk.0.ffn_gate.bias" in file.tensors,
        bos_token_id=file.get("tokenizer.ggml.bos_token_id"),
        eos_token_id=file.get("tokenizer.ggml.eos_token_id"),
        pad_token_id=file.get("tokenizer.ggml.padding_token_id"),
    )
    factors = file.array(ROPE_FACTORS) if ROPE_FACTORS in file.tensors else None
    return dataclasses.replace(config, rope_scaling=read_rope_scaling(file, config, factors))


def _rows(file: GgufFile, name: str) -> int:
    if name not in file.tensors:
        raise UserError(file.path, f"has no tensor {name}", "fetch or export the file again")
    return int(file.tensors[name].shape[-1])


def _refuse_variants(file: GgufFile) -> None:
    """What the same architecture may carry and we do not compute."""
    faults = {
        "expert_count": "mixtures of experts are not supported",
        "attention.sliding_window": "sliding-window attention is not supported",
        "attention.scale": "its own attention scale is not supported",
        "logit_scale": "scaled logits are not supported",
        "residual_scale": "scaled residuals are not supported",
        "embedding_scale": "scaled embeddings are not supported",
    }
    for key, why in faults.items():
        if file.own(key):
            raise UserError(file.path, f"{file.architecture}.{key} is set: {why}", "use another model")
    key_length = file.own("attention.key_length")
    value_length, turned = file.own("attention.value_length", key_length), file.own("rope.dimension_count", key_length)
    if key_length and (value_length != key_length or turned != key_length):
        raise UserError(file.path, "its heads' keys, values and rotated parts differ in length", "use another model")
