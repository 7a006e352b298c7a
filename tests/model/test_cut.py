"""A cut model keeps what carries most: exactly all, where the rest carried nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign_models import make_stock

from groundup.errors import UserError
from groundup.model.config import ModelConfig
from groundup.model.cut import cut, smaller
from groundup.model.io import load_model, save_model
from groundup.model.transformer import Transformer
from groundup.tokenizer import load_tokenizer, train_tokenizer
from groundup.train.cut import cut_folder

CONFIG = ModelConfig(61, 48, 40, 3, 4, 2, 16, max_position_embeddings=64)


def model_of(config: ModelConfig) -> Transformer:
    """Random everywhere, norms and biases too; the last norm even: only such a one can be turned with a tied head."""
    model, generator = Transformer(config).eval(), torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            p.copy_(1 + 0.2 * noise if "norm" in name else 0.3 * noise)
        model.model.norm.weight.fill_(1.5)
    return model


def text(rows: int = 4, length: int = 24) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    ids = torch.randint(0, 61, (rows, length), generator=torch.Generator().manual_seed(1))
    places = torch.arange(length).expand(rows, -1)
    return ids, places, torch.zeros_like(places, dtype=torch.int32)


def agree(a: Transformer, b: Transformer) -> None:
    with torch.no_grad():
        torch.testing.assert_close(a(*text()), b(*text()), atol=2e-4, rtol=2e-4)


KINDS = {
    "qwen3": CONFIG,
    "untied": replace(CONFIG, tie_word_embeddings=False),
    "qwen2": replace(CONFIG, model_type="qwen2"),
    "llama, biases": replace(CONFIG, model_type="llama", attention_bias=True, mlp_bias=True),
}


@pytest.mark.parametrize("config", KINDS.values(), ids=KINDS.keys())
def test_a_cut_that_takes_nothing_away_is_the_model(config: ModelConfig) -> None:
    model = model_of(config)
    if not config.tie_word_embeddings:
        torch.nn.init.normal_(model.model.norm.weight)
    before = model(*text())
    agree(cut(model, smaller(config), [text()]), model)
    assert torch.equal(before, model(*text())) and not any(m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("config", KINDS.values(), ids=KINDS.keys())
def test_what_carries_nothing_is_cut_away_without_a_trace(config: ModelConfig) -> None:
    """Half the neurons, one group of heads and a third of the stream's directions are silent, at unknown places."""
    model, generator = model_of(config), torch.Generator().manual_seed(5)
    subspace = torch.linalg.qr(torch.randn(48, 32, generator=generator)).Q
    within = subspace @ subspace.T
    silent = torch.randperm(40, generator=generator)[:20]
    with torch.no_grad():
        for i, block in enumerate(model.blocks):
            block.mlp.down_proj.weight[:, silent] = 0
            block.self_attn.o_proj.weight.view(48, 2, 32)[:, i % 2] = 0
            for matrix in (block.mlp.down_proj, block.self_attn.o_proj):
                matrix.weight.copy_(within @ matrix.weight)
                if matrix.bias is not None:
                    matrix.bias.copy_(within @ matrix.bias)
        model.model.embed_tokens.weight.copy_(model.model.embed_tokens.weight @ within)
    small = cut(model, smaller(config, width=32, intermediate=20, heads=2), [text()])
    assert (small.config.hidden_size, small.config.num_key_value_heads) == (32, 1)
    agree(small, model)


def test_the_first_directions_are_those_that_carry_most() -> None:
    """Nearer to the model than a cut along directions at random would be, and the nearer the wider."""
    model = model_of(CONFIG)
    whole = model(*text()).log_softmax(-1)

    def far(small: Transformer) -> float:
        return (whole.exp() * (whole - small(*text()).log_softmax(-1))).sum(-1).mean().item()

    with torch.no_grad():
        distances = [far(cut(model, smaller(CONFIG, width=width), [text()])) for width in (48, 44, 36, 24)]
        fresh = Transformer(CONFIG)
        fresh.init_weights(0)
        assert distances == sorted(distances) and distances[0] < 1e-3 and distances[1] < far(fresh)


def test_layers_stay_evenly_the_last_among_them() -> None:
    model = model_of(replace(CONFIG, num_hidden_layers=4))
    with torch.no_grad():
        for i in (0, 2):  # these two do nothing
            model.blocks[i].mlp.down_proj.weight.zero_()
            model.blocks[i].self_attn.o_proj.weight.zero_()
    agree(cut(model, smaller(model.config, layers=2), [text()]), model)


@pytest.mark.parametrize(
    ("changes", "said"),
    [({"width": 49}, "hidden_size: 49"), ({"heads": 3}, "whole groups of 2"), ({"layers": 4}, "num_hidden_layers: 4")],
)
def test_sizes_that_are_no_part_of_it_are_refused(changes: dict[str, int], said: str) -> None:
    with pytest.raises(UserError, match=said):
        smaller(CONFIG, **changes)
    assert smaller(CONFIG, heads=1).num_key_value_heads == 1
    with pytest.raises(UserError, match="no token"):
        cut(model_of(CONFIG), CONFIG, [])


def test_a_folder_is_cut_on_the_command_line(groundup: Callable, tmp_path: Path) -> None:
    tokenizer = train_tokenizer(["a cat sat on a mat"] * 9, 300)
    save_model(model_of(replace(CONFIG, vocab_size=tokenizer.vocab_size)), tmp_path / "teacher")
    tokenizer.save(tmp_path / "teacher")
    chat: Any = {"messages": [{"role": "user", "content": "a cat"}, {"role": "assistant", "content": "sat on a mat"}]}
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for _ in range(20)))
    (tmp_path / "text.jsonl").write_text('{"text": "a mat sat"}\n' * 5)
    common = ("distill", "cut", tmp_path / "teacher", "--width", 32, "--heads", 2, "--intermediate", 24, "--layers", 2)
    files = ("--data", tmp_path / "chats.jsonl", "--data", tmp_path / "text.jsonl")
    done = groundup(*common, *files, "--output", tmp_path / "student", "--json")
    assert done.code == 0, done.err
    student = load_model(tmp_path / "student")
    assert done.json()["parameters"] == sum(p.numel() for p in student.parameters())
    assert done.json()["share"] == pytest.approx(0.43, abs=0.1)
    assert load_tokenizer(tmp_path / "student").fingerprint() == tokenizer.fingerprint()
    assert "holds a model already" in groundup(*common, *files, "--output", tmp_path / "student").err
    assert "data: is missing" in groundup(*common, "--output", tmp_path / "b").err
    assert groundup(*common, "--fresh", "--output", tmp_path / "fresh").code == 0
    fresh = load_model(tmp_path / "fresh")
    assert fresh.config == student.config and not any(p.any() for n, p in fresh.named_parameters() if "down_proj" in n)
    make_stock("opt").save_pretrained(tmp_path / "foreign")
    tokenizer.save(tmp_path / "foreign")
    with pytest.raises(UserError, match="cannot be cut"):
        cut_folder(tmp_path / "foreign", tmp_path / "c", [tmp_path / "text.jsonl"], width=16)
