"""Logits equal transformers' for every type and RoPE rule, through folders saved by either side."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F

from groundup.model.config import ModelConfig, num_parameters
from groundup.model.io import load_model, save_model
from groundup.model.transformer import Transformer
from groundup.objectives.next_token import next_token

transformers = pytest.importorskip("transformers")

ROPES = {
    "default": None,
    "linear": {"rope_type": "linear", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    "yarn-set": {
        "rope_type": "yarn",
        "factor": 8.0,
        "original_max_position_embeddings": 16,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
        "mscale": 1.0,
        "mscale_all_dim": 0.8,
        "truncate": False,
    },
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
}
SIZES = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 128,
}


def stock(model_type: str, rope: str = "default", **changes):
    """A random transformers model whose norms and biases are random, too: all-one norms would hide mistakes."""
    torch.manual_seed(0)
    sizes = {**SIZES, **changes}
    if model_type == "qwen2":
        sizes["head_dim"] = sizes["hidden_size"] // sizes["num_attention_heads"]
    rope_parameters = {"rope_type": "default", **(ROPES[rope] or {}), "rope_theta": 5000.0}
    config = transformers.AutoConfig.for_model(model_type, **sizes, rope_parameters=rope_parameters)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def ids(rows: int = 2, length: int = 100) -> torch.Tensor:
    return torch.randint(0, SIZES["vocab_size"], (rows, length), generator=torch.Generator().manual_seed(1))


def assert_same(ours: Transformer, theirs, tolerance: float = 1e-4) -> None:
    with torch.no_grad():
        torch.testing.assert_close(ours(ids()), theirs(ids()).logits, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3"])
def test_a_stock_folder_gives_the_same_logits(model_type, rope, tmp_path):
    theirs = stock(model_type, rope)
    theirs.save_pretrained(tmp_path)
    ours = load_model(tmp_path)
    assert not ours.training
    assert num_parameters(ours.config) == theirs.num_parameters()
    assert_same(ours, theirs)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3"])
def test_the_loss_and_one_steps_gradients(model_type, tied, tmp_path):
    theirs = stock(model_type, tie_word_embeddings=tied)
    theirs.save_pretrained(tmp_path)
    ours, rows = load_model(tmp_path), ids(length=40)
    loss = theirs(rows, labels=rows).loss
    loss.backward()
    total, count = next_token(ours.hidden(rows), ours.head_weight, F.pad(rows[:, 1:], (0, 1), value=-100))
    (total / count).backward()
    torch.testing.assert_close(total / count, loss, atol=1e-4, rtol=1e-4)
    wanted = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    assert wanted.keys() == {name for name, _ in ours.named_parameters()}
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[name], atol=1e-4, rtol=1e-3, msg=name)


@pytest.mark.parametrize(
    "model_type, changes",
    [
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("qwen3", {"attention_bias": True}),
        ("qwen3", {"tie_word_embeddings": True, "num_key_value_heads": 4}),
        ("qwen2", {"tie_word_embeddings": True, "num_key_value_heads": 1}),
    ],
)
def test_biases_and_ties(model_type, changes, tmp_path):
    theirs = stock(model_type, **changes)
    theirs.save_pretrained(tmp_path)
    ours = load_model(tmp_path)
    assert num_parameters(ours.config) == sum(p.numel() for p in ours.parameters()) == theirs.num_parameters()
    assert_same(ours, theirs)


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3"])
def test_transformers_loads_what_we_save(model_type, rope, tmp_path):
    rope_scaling = ROPES[rope]
    ours = Transformer(
        ModelConfig(**{**SIZES, "head_dim": 16}, model_type=model_type, rope_theta=5000.0, rope_scaling=rope_scaling)
    )
    ours.init_weights(0)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    save_model(ours, tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert theirs.dtype == torch.float32
    assert_same(ours, theirs.eval())
    assert theirs.generation_config.eos_token_id == 2


def test_old_and_new_spelling_of_config_mean_the_same(tmp_path):
    theirs = stock("llama", "llama3")
    theirs.save_pretrained(tmp_path)
    new = ModelConfig.from_dir(tmp_path)
    found = json.loads((tmp_path / "config.json").read_text())
    rope = found.pop("rope_parameters")
    found["torch_dtype"] = found.pop("dtype")
    found["rope_theta"], found["rope_scaling"] = rope.pop("rope_theta"), rope
    assert ModelConfig.from_hf_dict(found) == new
    found["rope_scaling"]["type"] = found["rope_scaling"].pop("rope_type")
    assert ModelConfig.from_hf_dict(found) == new
    assert ModelConfig.from_hf_dict(new.to_hf_dict()) == new


def test_sharded_folder(tmp_path):
    theirs = stock("qwen3")
    theirs.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert_same(load_model(tmp_path), theirs)


def test_half_precision_folder_loads_as_asked(tmp_path):
    stock("qwen3").to(torch.bfloat16).save_pretrained(tmp_path)
    assert load_model(tmp_path).head_weight.dtype == torch.float32
    half = load_model(tmp_path, dtype=torch.bfloat16)
    assert half.head_weight.dtype == torch.bfloat16
    assert half(ids()).dtype == torch.bfloat16
