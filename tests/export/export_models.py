"""Tiny models of every family that goes out, with logits far enough apart that rounding decides no first choice."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch

from groundup.model.config import ModelConfig
from groundup.model.io import load_model, save_model
from groundup.model.transformer import Transformer
from groundup.tokenizer import Tokenizer, load_tokenizer

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
FAMILIES = {
    "qwen3": {"model_type": "qwen3"},
    "qwen3-untied": {"model_type": "qwen3", "tie_word_embeddings": False, "rope_theta": 10_000.0},
    "qwen2": {"model_type": "qwen2", "num_attention_heads": 2, "num_key_value_heads": 1},
    "llama": {"model_type": "llama", "rope_theta": 10_000.0, "rms_norm_eps": 1e-5},
    "llama-untied-biases": {
        "model_type": "llama",
        "tie_word_embeddings": False,
        "attention_bias": True,
        "mlp_bias": True,
    },
    "qwen3-linear": {"model_type": "qwen3", "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    "qwen2-yarn": {"model_type": "qwen2", "num_attention_heads": 2, "num_key_value_heads": 1, "rope_scaling": YARN},
    "llama-yarn": {"model_type": "llama", "rope_scaling": {**YARN, "attention_factor": 0.9}},
    "llama-llama3": {
        "model_type": "llama",
        "rope_theta": 500_000.0,
        "rope_scaling": {"rope_type": "llama3", "factor": 8.0, **LLAMA3},
    },
}


def make_model(tokenizer: Tokenizer, folder: Path, spare_rows: int = 0, **changes: object) -> Path:
    """Write a stock folder of random weights."""
    config = ModelConfig(vocab_size=tokenizer.vocab_size + spare_rows, **{**SIZES, **changes})  # type: ignore[arg-type]
    model = Transformer(config)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        size = 0.1 if name.endswith("bias") else 0.2
        shift = 1.0 if "norm" in name else 0.0
        parameter.data = torch.randn(parameter.shape, generator=generator) * size + shift
    save_model(model, folder)
    tokenizer.save(folder)
    return folder


def same_model(before: Path, after: Path) -> None:
    """Assert that two folders hold the same config, weights (bit for bit), tokenizer and template."""
    first, second = load_model(before), load_model(after)
    ignored = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    assert dataclasses.replace(first.config, **ignored) == dataclasses.replace(second.config, **ignored)
    for (name, a), b in zip(first.state_dict().items(), second.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    one, two = load_tokenizer(before), load_tokenizer(after)
    assert one.backend.get_vocab(True) == two.backend.get_vocab(True)
    assert (one.eos_id, one.bos_id, one.pad_id, one.stop_ids) == (two.eos_id, two.bos_id, two.pad_id, two.stop_ids)
    assert one.chat_template == two.chat_template


def greedy(folder: Path, prompt: list[int], new: int, never: Sequence[int] = ()) -> list[int]:
    """The plainest greedy decoding there is: the whole text through the model for every token, but those of `never`."""
    model, ids = load_model(folder), list(prompt)
    with torch.no_grad():
        for _ in range(new):
            logits_V = model(torch.tensor([ids]))[0, -1]
            logits_V[list(never)] = -torch.inf
            ids.append(int(logits_V.argmax()))
    return ids[len(prompt) :]
