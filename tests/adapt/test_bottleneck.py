"""Bottleneck adapters. No library here has them as files, so a second way to write the sum is the reference."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from adapt_helpers import close, config, logits, trained

from groundup.adapt.build import adapt
from groundup.adapt.folder import load_adapter, save_adapter
from groundup.errors import UserError


def test_a_small_network_behind_each_sublayer(ours, stock, ids) -> None:
    """The same as hooks on transformers' own model that add what the adapter adds."""
    model, plain = ours("qwen2"), stock("qwen2")
    adapted = trained(model, config("bottleneck", width=8))
    saved = {name.removeprefix("base_model.model."): t for name, t in adapted.tensors().items()}
    assert len(saved) == 2 * 2 * 4

    def behind(path):
        down, down_bias, up, up_bias = (
            saved[f"{path}.bottleneck_{n}"] for n in ("down.weight", "down.bias", "up.weight", "up.bias")
        )
        return lambda layer, args, y: y + F.gelu(y @ down.T + down_bias) @ up.T + up_bias

    for i in range(2):
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            path = f"model.layers.{i}.{name}"
            plain.get_submodule(path).register_forward_hook(behind(path))
    close(logits(model, ids), logits(plain, ids))


@pytest.mark.parametrize("base", ["qwen3", "gpt2"])
def test_starts_as_its_base_bit_for_bit_and_moves_alone(base, stock, ids) -> None:
    model = stock(base)
    before = logits(model, ids)
    adapted = adapt(model, config("bottleneck"), seed=0)
    assert torch.equal(logits(model, ids), before)
    assert len(adapted.parts) == 4
    moving = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert moving == 4 * (64 * 64 + 64 + 64 * 64 + 64) == sum(t.numel() for t in adapted.tensors().values())


def test_same_seed_same_start(ours) -> None:
    one, same, other = (adapt(ours("qwen3"), config("bottleneck"), seed).tensors() for seed in (1, 1, 2))
    down = [name for name in one if name.endswith("down.weight")]
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert down and not any(torch.equal(one[name], other[name]) for name in down)


def test_files_and_dropout(ours, ids, tmp_path: Path) -> None:
    model, again = ours("qwen3"), ours("qwen3")
    adapted = trained(model, config("bottleneck", width=5, dropout=0.2, target=["up_proj"], save=["embed_tokens"]))
    save_adapter(adapted, tmp_path / "a", "base")
    told = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert (told["peft_type"], told["bottleneck_size"], told["target_modules"]) == ("BOTTLENECK", 5, ["up_proj"])
    loaded = load_adapter(again, tmp_path / "a")
    assert torch.equal(logits(again, ids), logits(model, ids))
    assert loaded.settings() == adapted.settings()
    model.train()
    assert not torch.equal(logits(model, ids), logits(again, ids))


def test_cannot_be_merged(ours) -> None:
    adapted = adapt(ours("qwen3"), config("bottleneck"), seed=0)
    with pytest.raises(UserError, match=r"not linear.*train a LoRA"):
        adapted.merge()


def test_another_base_or_kind_is_refused(ours, tmp_path: Path) -> None:
    adapted = adapt(ours("qwen3"), config("bottleneck"), seed=0)
    save_adapter(adapted, tmp_path / "a", "base")
    with pytest.raises(UserError, match="changes nothing that this model has"):
        load_adapter(ours("gpt2"), tmp_path / "a")
    file = tmp_path / "a" / "adapter_config.json"
    file.write_text(file.read_text().replace("gelu", "relu"))
    with pytest.raises(UserError, match="non_linearity 'relu' is not supported"):
        load_adapter(ours("qwen3"), tmp_path / "a")
